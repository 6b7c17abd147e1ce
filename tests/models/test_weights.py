"""Weights on their way out: in the form of the model's own files, adapters merged without losing small updates, heads kept."""

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ctrlrl.errors import ModelError, RecipeError
from ctrlrl.models.architectures import check_engine_takes, engine_architectures
from ctrlrl.models.loading import load_classifier, load_config, load_policy
from ctrlrl.models.lora import LoraConfig, check_adapters, save_adapter, with_adapters
from ctrlrl.models.weights import full_weights, message_of, model_weights
from tests.benchmarks.families import tiny_config, tiny_model


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "olmo3", "gemma3_text"])
def test_full_weights_are_what_the_model_writes_into_its_files(kind, tmp_path):
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    written, named = load_file(tmp_path / "model.safetensors"), dict(full_weights(model))
    assert named.keys() == written.keys()
    assert all(torch.equal(named[name], written[name]) for name in written)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)  # which may know other forms of its files
    assert full_weights_equal(again, written)


@pytest.mark.parametrize(("kind", "renamed"), [("deepseek_v3", "mlp.gate"), ("minimax_m2", "block_sparse_moe")])
def test_buffers_that_files_hold_are_published_as_they_are(kind, renamed):
    model = tiny_model(kind)
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.copy_(1 + torch.arange(4) * 1e-3)  # bfloat16 makes this four times 1
    sent = dict(message_of(model, "bfloat16", 1).tensors())
    exact = {name: tensor for name, tensor in sent.items() if tensor.dtype != torch.bfloat16}
    assert exact and all(name.endswith(f"{renamed}.e_score_correction_bias") for name in exact)
    assert all(torch.equal(tensor, 1 + torch.arange(4) * 1e-3) for tensor in exact.values())


def full_weights_equal(model, written) -> bool:
    """Whether the names and values are those of a file."""
    named = dict(full_weights(model))
    return named.keys() == written.keys() and all(torch.equal(named[name], written[name]) for name in written)


def test_merged_bfloat16_weights_keep_small_updates(models):
    adapted = with_adapters(load_policy(models["policy"], "float32"), LoraConfig(rank=8)).to(torch.bfloat16)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 3e-4 * torch.randn(parameter.shape, generator=draw).sign().to(parameter.dtype)
    exact, rounded = dict(full_weights(adapted)), dict(full_weights(adapted, merged=torch.bfloat16))
    base = dict(full_weights(load_policy(models["policy"], "bfloat16")))
    update = {name: exact[name].float() - base[name].float() for name in base}
    moved = {name: rounded[name].float() - base[name].float() for name in base}
    whole = sum(float((u * u).sum()) for u in update.values())
    assert whole > 0
    assert sum(float((u * moved[name]).sum()) for name, u in update.items()) / whole == pytest.approx(1, abs=0.05)
    nearest = sum(float((u * (exact[name].bfloat16().float() - base[name].float())).sum()) for name, u in update.items())
    assert nearest / whole < 0.7  # so that rounding matters here
    assert all(torch.equal(rounded[n], base[n]) for n in base if not update[n].any())
    assert all(torch.equal(rounded[name], again) for name, again in full_weights(adapted, merged=torch.bfloat16))
    assert {p.dtype for p in adapted.parameters()} == {torch.bfloat16}  # the model is as it was


def test_the_head_of_a_classifier_is_trained_beside_adapters_and_survives_both_exports(models, tmp_path):
    adapted = with_adapters(load_classifier(models["policy"], "float32"), LoraConfig(rank=4))
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("score" in name for name in trained) and all("lora_" in n or "score" in n for n in trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.05)
    ids = torch.arange(3, 30)[None]
    expected = adapted(input_ids=ids).logits
    save_adapter(adapted, tmp_path / "adapter", True, None)
    again = peft.PeftModel.from_pretrained(load_classifier(models["policy"], "float32"), tmp_path / "adapter")
    assert torch.allclose(again(input_ids=ids).logits, expected, atol=1e-5)
    adapted.get_base_model().save_pretrained(tmp_path / "merged", state_dict=dict(model_weights(adapted)))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "targets", "told"),
    [
        ("policy", ["q_proj", "lm_head"], "'lm_head'"),
        ("tied", ["embed_tokens"], "'embed_tokens'"),
        ("policy", ["no_such_layer"], "no_such_layer"),
        ("policy", r".*\.attention\.query", "query"),
    ],
)
def test_targets_that_adapters_cannot_train_are_refused(models, model, targets, told):
    with pytest.raises(RecipeError, match=rf"lora.targets = .*{told}"):
        with_adapters(load_policy(models[model], "float32"), LoraConfig(rank=4, targets=targets))
    with pytest.raises(RecipeError, match=rf"lora.targets = .*{told}"):  # and by the configuration alone
        check_adapters(models[model], LoraConfig(rank=4, targets=targets))


def test_targets_that_adapters_can_train_pass(models):
    check_adapters(models["policy"], LoraConfig(rank=0, targets=["no_such_layer"]))
    for head in ("tokens", "value", "reward"):
        check_adapters(models["tied"], LoraConfig(rank=4), head)
        check_adapters(models["policy"], LoraConfig(rank=4, targets=["embed_tokens"]), head)


def test_untied_embeddings_are_adapted_and_merged(models, tmp_path):
    adapted = with_adapters(load_policy(models["policy"], "float32"), LoraConfig(rank=4, targets=["embed_tokens"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05)
    ids = torch.arange(3, 30)[None]
    adapted.get_base_model().save_pretrained(tmp_path, state_dict=dict(model_weights(adapted)))
    assert torch.allclose(load_policy(str(tmp_path), "float32")(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-5)


def test_adapted_experts_are_merged(tmp_path):
    adapted = with_adapters(tiny_model("qwen3_moe"), LoraConfig(rank=4)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05)
    assert any("experts" in name for name, _ in adapted.named_parameters() if "lora_" in name)
    ids = torch.arange(3, 30)[None]
    adapted.get_base_model().save_pretrained(tmp_path, state_dict=dict(model_weights(adapted)))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.allclose(merged(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-4)
    assert dict(full_weights(adapted)).keys() == load_file(tmp_path / "model.safetensors").keys()


def named(directory, models, **changes) -> str:
    """A model directory whose configuration says something else."""
    config = load_config(models["policy"])
    config.update(changes)
    config.save_pretrained(directory)
    return str(directory)


def test_models_that_the_engine_cannot_take_are_refused_by_name(models, tmp_path):
    check_engine_takes(models["policy"])
    assert {"LlamaForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM"} < engine_architectures().keys()
    with pytest.raises(ModelError, match="is a XGLMForCausalLM, which the rollout engine .* does not know"):
        check_engine_takes(named(tmp_path, models, architectures=["XGLMForCausalLM"]))
    with pytest.raises(ModelError, match="no safetensors weights"):  # the class is known, but only its configuration is there
        check_engine_takes(named(tmp_path, models, architectures=["LlamaForCausalLM"]))
    tiny_model("gpt_bigcode").config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a gpt_bigcode: .* the rollout engine's logprobs are up to 1.0 nats off"):
        check_engine_takes(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "told"),
    [(kind, "whose layers carry a state") for kind in ("lfm2", "jamba", "mamba", "qwen3_next", "qwen3_5_text")]
    + [("deepseek_v3", "latent attention")],
)
def test_models_that_the_engine_does_not_compute_rightly_on_cpus_are_refused(kind, told, tmp_path, monkeypatch):
    config = tiny_config(kind)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"is a {kind}, .*{told}.*CPU"):
        check_engine_takes(str(tmp_path))
    monkeypatch.setattr("ctrlrl.models.architectures.engine_on_cpu", lambda: False)
    with pytest.raises(ModelError, match="no safetensors weights"):
        check_engine_takes(str(tmp_path))
