"""Rewarded soups: the weights between two models, whatever their files, and what does not mix, named before anything is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from ctrlrl.cli import app
from ctrlrl.errors import ModelError, RecipeError, RunError
from ctrlrl.models import soup as module
from ctrlrl.models.loading import check_policy, load_policy
from ctrlrl.models.soup import mixed, soup

SHARE = 0.3


@pytest.fixture(scope="module")
def other(models, tmp_path_factory):
    """A function: another model of the make of `name`, of other weights; its configuration and shards can be changed."""
    root = tmp_path_factory.mktemp("others")

    def make(name="policy", dtype=torch.float32, shards="5GB", **changes) -> str:
        folder = root / str(len(list(root.iterdir())))
        config = AutoModelForCausalLM.from_pretrained(models[name]).config
        for key, value in changes.items():
            setattr(config, key, value)
        torch.manual_seed(7)
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=shards)
        AutoTokenizer.from_pretrained(models[name]).save_pretrained(folder)
        return str(folder)

    return make


def weights(folder):
    return {key: value for file in Path(folder).glob("*.safetensors") for key, value in load_file(file).items()}


@pytest.mark.parametrize(("name", "shards"), [("policy", "5GB"), ("policy", "60KB"), ("tied", "5GB")])
def test_every_tensor_lies_between_those_of_the_two_models(models, other, tmp_path, name, shards):
    second = other(name, shards=shards, attention_dropout=0.1, classifier_dropout=0.0)  # as training sets them, or not
    ours, theirs = weights(models[name]), weights(second)
    if name == "tied":  # a file may name the head all the same
        whole = theirs | {"lm_head.weight": theirs["model.embed_tokens.weight"].clone()}
        save_file(whole, Path(second, "model.safetensors"), metadata={"format": "pt"})
    out = soup(models[name], second, SHARE, str(tmp_path / "soup"))
    found = weights(out)
    assert set(found) == set(ours) == set(theirs) and ("lm_head.weight" in found) == (name == "policy")
    for key, value in found.items():
        assert torch.equal(value, 0.7 * ours[key] + 0.3 * theirs[key])
        assert "norm" in key or not torch.equal(value, ours[key])
    check_policy(str(out))
    model = load_policy(str(out), "float32")
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, found["model.layers.1.mlp.up_proj.weight"])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "tied")
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(models[name]).chat_template
    told = json.loads((out / "soup.json").read_text())
    assert told["share"] == SHARE and len(set(told["models"])) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["soup"]


def test_the_soup_has_the_files_and_dtypes_of_the_first_model(models, other, tmp_path):
    first = other(dtype=torch.bfloat16, shards="60KB")
    out = soup(first, models["policy"], 0.5, str(tmp_path / "soup"))
    assert sorted(p.name for p in out.glob("*.safetensors")) == sorted(p.name for p in Path(first).glob("*.safetensors"))
    assert len(list(out.glob("*.safetensors"))) > 1
    index, theirs = (json.loads((Path(folder) / "model.safetensors.index.json").read_text()) for folder in (out, first))
    assert index["weight_map"] == theirs["weight_map"] and index["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert weights(out)["model.norm.weight"].dtype == torch.bfloat16
    key = "model.layers.0.mlp.up_proj.weight"
    a, b = weights(first)[key], weights(models["policy"])[key]
    assert torch.equal(weights(out)[key], (0.5 * a.float() + 0.5 * b).to(torch.bfloat16))
    load_policy(str(out), "bfloat16")


def test_the_ends_are_the_two_models_and_sums_are_wide(models, other, tmp_path):
    second = other()
    for share, whole in ((0.0, models["policy"]), (1.0, second)):
        found, expected = weights(soup(models["policy"], second, share, str(tmp_path / str(share)))), weights(whole)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    a, b = (torch.randn(1000, generator=torch.Generator().manual_seed(i)).to(torch.float16) for i in (0, 1))
    assert torch.equal(mixed(a, b, SHARE), (0.7 * a.float() + 0.3 * b.float()).to(torch.float16))
    assert not torch.equal(mixed(a, b, SHARE), 0.7 * a + 0.3 * b)  # rounded once, not at every step
    assert mixed(torch.tensor([3]), torch.tensor([3]), 0.5).dtype == torch.int64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 64}, "of another architecture: intermediate_size is 96 in the first and 64 in the second"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "of another architecture: rope_parameters is "),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is False in the first and True in the second"),
    ],
)
def test_another_architecture_is_refused(models, other, tmp_path, changes, message):
    with pytest.raises(ModelError, match=message):
        soup(models["policy"], other(**changes), SHARE, str(tmp_path / "soup"))
    assert not list(tmp_path.iterdir())


def test_other_tokenizers_tensors_shapes_and_numbers_are_refused(models, other, tmp_path):
    def changed(edit) -> str:
        folder = other()
        edit(Path(folder))
        return folder

    def tokens(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["loaves!"])
        tokenizer.save_pretrained(folder)

    def template(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = "Other: " + tokenizer.chat_template
        tokenizer.save_pretrained(folder)

    def tensors(edit):
        def write(folder):
            found = load_file(folder / "model.safetensors")
            edit(found)
            save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

        return write

    key = "model.norm.weight"
    cases = {
        "have other chat templates": template,
        "have other tensors: 1 are in one alone, extra.weight .the second": tensors(lambda t: t.update({"extra.weight": t[key] + 1})),
        "is not finite in the soup": tensors(lambda t: t[key].fill_(float("inf"))),
    }
    for message, edit in cases.items():
        with pytest.raises(ModelError, match=message):
            soup(models["policy"], changed(edit), SHARE, str(tmp_path / "soup"))
        assert not list(tmp_path.iterdir()), message
    with pytest.raises(ModelError, match="tokens beyond|other vocabulary"):
        soup(models["policy"], changed(tokens), SHARE, str(tmp_path / "soup"))
    with pytest.raises(ModelError, match="LlamaForSequenceClassification"):
        soup(models["policy"], models["helpful"], SHARE, str(tmp_path / "soup"))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_leaves_nothing_and_an_existing_directory_stays(models, other, tmp_path, monkeypatch):
    second = other()
    (tmp_path / "there").mkdir()
    with pytest.raises(RunError, match="there' exists: give another --out"):
        soup(models["policy"], second, SHARE, str(tmp_path / "there"))
    with pytest.raises(RecipeError, match="1.5 is not a share"):
        soup(models["policy"], second, 1.5, str(tmp_path / "soup"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        with pytest.raises(RunError, match="No space left|full"):
            soup(models["policy"], second, SHARE, str(tmp_path / "soup"))
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_the_command_says_what_is_in_it_and_mistakes_end_with_2(models, other, tmp_path):
    second = other()
    result = CliRunner().invoke(app, ["soup", models["policy"], second, "--share", ".25", "--out", str(tmp_path / "soup")])
    assert result.exit_code == 0 and f"0.75 of {models['policy']} and 0.25 of {second}: {tmp_path / 'soup'}" in result.output
    shutil.rmtree(tmp_path / "soup")
    wrong = CliRunner().invoke(app, ["soup", models["policy"], "./gone", "--share", ".25", "--out", str(tmp_path / "soup")])
    assert wrong.exit_code == 2 and "'./gone' does not exist" in wrong.output and not list(tmp_path.iterdir())
