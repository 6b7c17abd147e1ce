"""Checkpoints that others made: whole, or refused by name before anything is started; and exports that are tried in advance."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctrlrl.errors import ModelError, RecipeError, RunError
from ctrlrl.models.exporting import check_export
from ctrlrl.models.fingerprint import model_fingerprint
from ctrlrl.models.forward import RewardModule, lay_out
from ctrlrl.models.loading import (
    check_backbone,
    check_causal,
    check_policy,
    check_reward_model,
    check_value,
    load_classifier,
    load_policy,
    load_reward_model,
    load_value_model,
    save_control_tokenizer,
    within_positions,
)
from ctrlrl.models.lora import LoraConfig, check_adapters
from ctrlrl.models.pooling import conversation_batch
from ctrlrl.models.reading import existing, load_config, load_tokenizer
from ctrlrl.models.scorer import Scorer, ScorerConfig
from ctrlrl.models.vocabulary import check_same_vocabulary, end_token_ids, final_token_id
from tests.models.tiny import tiny_config

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def changed(models, tmp_path):
    """A function: a copy of one of the tiny models in which weights, config.json or files are changed."""

    def change(model, weights=None, files=None, **config):
        folder = tmp_path / "model"
        shutil.copytree(models[model], folder)
        if weights:
            tensors = load_file(folder / "model.safetensors")
            weights(tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if config:
            written = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(written | config))
        for name, content in (files or {}).items():
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(folder)

    return change


def refused(match, *calls):
    for call in calls:
        with pytest.raises(ModelError, match=match):
            call()


def test_a_reward_model_whose_head_has_another_name_is_refused_with_both(changed):
    name = changed("helpful", lambda w: w.update({"value_head.weight": w.pop("score.weight")}))
    wanted = r"lacks 1 weights of a reward model, such as 'score.weight'; its checkpoint has 'value_head.weight' instead"
    refused(wanted, lambda: check_reward_model(name), lambda: load_reward_model(name, "float32"))
    refused("lacks 1 weights of a sequence classifier", lambda: check_backbone(name), lambda: load_classifier(name, "float32"))


def test_a_language_model_with_a_classifiers_configuration_is_refused(changed):
    name = changed("policy", architectures=["LlamaForSequenceClassification"], num_labels=1, id2label={"0": "x"}, label2id={"x": 0})
    refused("lacks 1 weights.*'score.weight'; its checkpoint has 'lm_head.weight'", lambda: check_reward_model(name))


def test_layers_that_are_absent_or_too_many_are_refused_and_a_new_head_is_not(changed, models):
    check_backbone(models["policy"])
    check_value(models["policy"])
    assert not load_value_model(models["policy"], "float32").score.weight.any()
    assert load_classifier(models["policy"], "float32").score.weight.any()
    layer = "model.layers.1.mlp.up_proj.weight"
    name = changed("policy", lambda w: w.pop(layer))
    checks = (check_backbone, check_value, check_policy, lambda n: load_value_model(n, "float32"), lambda n: load_classifier(n, "float32"))
    for check in checks:
        refused(f"lacks 1 weights of a .*, such as '{layer}'", lambda check=check: check(name))


def test_a_configuration_of_fewer_layers_is_refused(changed):
    name = changed("policy", num_hidden_layers=1)
    refused("has more layers than its config.json says, such as 'model.layers.1", lambda: check_policy(name))


def test_other_shapes_are_refused(changed):
    name = changed("policy", intermediate_size=95)
    refused(r"other shapes than its config.json says: .*is \[64, 96\] in place of \[64, 95\]", lambda: check_causal(name, "reference"))


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("config.json", "[]", "config.json' holds a list"),
        ("config.json", "{", "config.json' cannot be read as JSON"),
        ("config.json", '{"model_type": "é"}'.encode("latin-1"), "config.json' cannot be read as JSON in UTF-8"),
        ("config.json", '{"model_type": "llama", "hidden_size": "many"}', "config.json.*hidden_size"),
        ("config.json", '{"model_type": "never_heard_of"}', "never_heard_of"),
        ("config.json", '{"auto_map": {"AutoConfig": "mine.Config"}, "model_type": "mine"}', "needs code of its own, which is never run"),
        ("generation_config.json", "[1]", "generation_config.json' holds a list"),
        ("tokenizer.json", POINTER, "tokenizer.json' is a pointer of Git LFS"),
        ("tokenizer.json", '{"version": "9", "model": {"type": "New"}}', "tokenizer .* from tokenizer.json"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json' holds a list"),
        ("model.safetensors", POINTER, "model.safetensors' is a pointer of Git LFS"),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0notjson!", "model.safetensors' has no header"),
        ("model.safetensors", b"\xff\xff\0\0", "model.safetensors' is cut"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors' is missing, though"),
        ("model.safetensors.index.json", '{"weight_map": ["a"]}', "has no weight_map"),
    ],
)
def test_what_cannot_be_read_is_named(changed, file, content, match):
    name = changed("policy", files={file: content})
    refused(match, lambda: check_policy(name))


def test_a_cut_weight_file_is_named_and_a_pointer_has_no_fingerprint(changed, models):
    whole = Path(models["policy"], "model.safetensors").read_bytes()
    name = changed("policy", files={"model.safetensors": whole[:-100]})
    wanted = "model.safetensors' has .* bytes of weights, its header tells of"
    refused(wanted, lambda: check_policy(name), lambda: load_policy(name, "float32"))
    (Path(name) / "tokenizer.json").write_text(POINTER)
    refused("tokenizer.json' is a pointer of Git LFS", lambda: model_fingerprint(name))


def test_weights_that_two_readers_would_read_differently_are_refused(changed, models):
    layer = "model.layers.0.mlp.up_proj.weight"
    checks = (lambda n: check_policy(n), lambda n: load_policy(n, "float32"))
    for check in checks:
        name = changed("policy", lambda w: w.update({layer: w[layer].to(torch.int8)}))
        refused(f"has '{layer}' in I8, but config.json has no quantization_config", lambda check=check, name=name: check(name))
        shutil.rmtree(name)
    check_causal(models["tied"], "reference")
    name = changed("policy", tie_word_embeddings=True)  # transformers reads its head, vLLM the embedding
    refused("has a 'lm_head.weight' of its own, though config.json says tie_word_embeddings", lambda: check_causal(name, "reference"))
    shutil.rmtree(name)
    name = changed("tied", lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    check_causal(name, "reference")  # the same twice is one
    shutil.rmtree(name)
    name = changed("policy", architectures=["MistralForCausalLM"])
    refused("reference .* is a MistralForCausalLM and a llama by its config.json", lambda: check_causal(name, "reference"))


def test_what_no_model_has_is_refused(changed, models):
    name = changed("policy", num_hidden_layers=-1)
    refused("has -1 layers by its config.json", lambda: check_policy(name))
    shutil.rmtree(name)
    for end in (9999, 384, -1):
        name = changed("policy", files={"generation_config.json": json.dumps({"eos_token_id": [2, end]})})
        refused(f"lists the end token {end}, and its embedding has 384 rows", lambda name=name: check_policy(name))
        shutil.rmtree(name)
    written = json.loads(Path(models["helpful"], "tokenizer_config.json").read_text())
    name = changed("helpful", files={"tokenizer_config.json": json.dumps(written | {"model_max_length": 0})})
    refused("takes 0 tokens", lambda: check_reward_model(name))
    shutil.rmtree(name)
    name = changed("policy", files={"adapter_config.json": '{"peft_type": "LORA", "r": 4}'})
    refused(r"holds an adapter \(adapter_config.json\)", lambda: check_policy(name), lambda: load_policy(name, "float32"))
    refused("cannot be read: .*File name too long", lambda: load_config("x" * 300))
    with pytest.raises(RecipeError, match="lora.targets = '\\[' cannot be adapted: unterminated"):
        check_adapters(models["policy"], LoraConfig(rank=4, targets="["))


def test_quantised_weights_are_not_trained(changed):
    name = changed("policy", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refused("is quantised", lambda: check_policy(name, trained=True), lambda: check_value(name), lambda: check_backbone(name))
    refused("cannot load", lambda: load_policy(name, "float32"))  # the package is not there


def test_what_looks_like_a_path_is_never_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("runs/policy", "models/x", "mine/policy", "ppo/model", "a/b/c", "./x", "policy/", ""):
        refused("does not exist", lambda name=name: existing(name))
    for name in ("gpt2", "Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B-Instruct"):
        assert existing(name) == name
    assert existing("mine") == "mine"


GENERATION = [
    ({"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}, {"do_sample": True, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}),
    ({"do_sample": False, "temperature": 1e-6, "eos_token_id": [2, 1]}, {"do_sample": False, "eos_token_id": [2, 1]}),
    ({"eos_token_id": "<end>"}, {"eos_token_id": [2]}),
    ({"eos_token_id": [2, None, "<s>"]}, {"eos_token_id": [1, 2]}),
]


@pytest.mark.parametrize(("given", "written"), GENERATION)
def test_a_generation_configuration_is_mended_so_that_it_can_be_written(changed, tmp_path, given, written):
    name = changed("policy", files={"generation_config.json": json.dumps(given)})
    ends = written["eos_token_id"]
    assert end_token_ids(name) == sorted(ends if isinstance(ends, list) else [ends])
    load_policy(name, "float32").save_pretrained(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {key: value for key, value in saved.items() if key != "transformers_version"} == written


def test_what_an_export_needs_is_tried_before_the_first_step(changed, tmp_path):
    out = str(tmp_path / "runs" / "new")
    name = changed("policy", files={"generation_config.json": '{"num_beams": 1, "num_return_sequences": 4}'})
    tokenizer = load_tokenizer(name)
    check = partial(check_export, name, out, tokenizer.save_pretrained, generates=True)
    refused("cannot load the generation configuration .* from generation_config.json: .*num_return_sequences", check)
    (Path(name) / "generation_config.json").write_text('{"cache_implementation": "no such cache"}')
    refused("generation_config.json.*cache_implementation", check)
    check_export(name, out, lambda folder: save_control_tokenizer(tokenizer, folder))
    refused("tokenizer for the trained model", lambda: check_export(name, out, lambda folder: {}["no such template"]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]  # nothing is left
    with pytest.raises(RunError, match="nothing can be written"):
        check_export(name, "/proc/self/run", tokenizer.save_pretrained)
    (Path(name) / "generation_config.json").write_text('{"eos_token_id": "what"}')
    refused("end token 'what', which its tokenizer does not have", lambda: end_token_ids(name), lambda: check_policy(name))


def test_an_answer_ends_with_the_templates_end_of_turn(models, tmp_path):
    tokenizer = load_tokenizer(models["policy"])
    assert final_token_id(models["policy"], tokenizer) == 2
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}<turn>\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    load_config(models["policy"]).save_pretrained(tmp_path)
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    assert final_token_id(str(tmp_path), tokenizer) == turn and end_token_ids(str(tmp_path)) == [2, turn]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert final_token_id(str(tmp_path), tokenizer) == 2


def test_tokens_that_a_model_or_its_companion_cannot_read_are_refused(changed, models, tmp_path):
    tokenizer = load_tokenizer(models["policy"])
    rows = load_config(models["policy"]).vocab_size
    name = changed("policy")
    tokenizer.add_tokens([f"[new {i}]" for i in range(rows)])
    tokenizer.save_pretrained(name)
    refused(r"tokens beyond the 384 rows of the model's embedding, such as '\[new", lambda: check_policy(name))
    wanted = "reference .* has another vocabulary.*is missing in the other"
    refused(wanted, lambda: check_same_vocabulary(name, models["tied"], "reference"))
    check_same_vocabulary(models["policy"], models["tied"], "reference")


def test_positions_with_an_offset_hold_fewer_tokens(tmp_path, tokenizer):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = dict(vocab_size=384, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_labels=1)
    RobertaForSequenceClassification(RobertaConfig(**sizes, max_position_embeddings=34, pad_token_id=3)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert within_positions(str(tmp_path), 1000) == 30
    model = load_reward_model(str(tmp_path), "float32")
    ids = torch.full((1, 30), 5)
    assert torch.isfinite(model(ids, attention_mask=torch.ones_like(ids)).logits).all()


@pytest.mark.parametrize("pad", [None, 2, 0, 9999])
@pytest.mark.parametrize("tokenizers", [None, "<end>", "<s>"])
def test_scores_do_not_depend_on_what_pads(changed, models, pad, tokenizers):
    talks = [([{"role": "user", "content": f"How do I bake {n} loaves?"}], "Mix flour. " * n) for n in (1, 7, 3)]
    name = changed("helpful", pad_token_id=pad)
    tokenizer = load_tokenizer(name)
    tokenizer.pad_token = tokenizers
    tokenizer.save_pretrained(name)
    reference, scorer = Scorer(ScorerConfig(model=models["helpful"])), Scorer(ScorerConfig(model=name))
    for each in (reference, scorer):
        each.model.double()  # in single precision some processors round a row alone otherwise than among others, by 1e-6 here
    wanted = reference.raw(talks)
    assert scorer.raw(talks) == pytest.approx(wanted, abs=1e-6)
    assert [scorer.raw([talk])[0] for talk in talks] == pytest.approx(wanted, abs=1e-6)
    batch = conversation_batch([scorer._encode(*talk) for talk in talks], typed=False)
    module = RewardModule(load_classifier(name, "float32").double(), token_types=False)
    assert module(lay_out(batch, "padded", torch.device("cpu")))[0].detach().numpy() == pytest.approx(wanted, abs=1e-6)


def test_an_architecture_without_a_token_classifier_is_no_value_model_and_the_way_out_is_said(tmp_path):
    tiny_config("gemma3_text").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match='no token classifier.* for gemma3_text models .*set algorithm.advantage = "rloo"'):
        check_value(str(tmp_path))
