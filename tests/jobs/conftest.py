"""Shared by the tests of jobs: recipes on the tiny models, a table to train on, and undisturbed directories."""

import json
import operator
import shutil
from functools import reduce
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ctrlrl.config import dump, load
from ctrlrl.control import CORNERS, Control
from ctrlrl.data.generation import OPTIMISATION, Layout
from ctrlrl.data.schemas import DISTILLED
from ctrlrl.data.sources import prompt_id
from ctrlrl.errors import RunError
from ctrlrl.models.loading import load_policy, load_tokenizer
from ctrlrl.prompts import render
from ctrlrl.runs import read_metrics


@pytest.fixture(scope="session")
def generate_overrides(models, prompt_file) -> list[str]:
    """Overrides that make generation run on the tiny models: 40 prompts of 3 samples, in 20 shards a unit."""
    settings = {
        "prompts": prompt_file, "policy": models["policy"], "samples_per_prompt": 3, "shard": 6, "seed": 5,
        "reward.helpful.model": models["helpful"], "reward.harmless.model": models["harmless"],
        "rollout.engine.dtype": "float32", "rollout.engine.max_model_tokens": 128, "rollout.engine.kv_cache_gib": 0.05,
        "sampling.max_new_tokens": 12, "sampling.temperature": 1.0,
        "cluster.placement_deadline_s": 120, "cluster.start_deadline_s": 240, "cluster.call_deadline_s": 120,
    }  # fmt: skip
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


@pytest.fixture(scope="session")
def generated(ray_cluster, generate_overrides, tmp_path_factory):
    """An undisturbed generation of two units: its layout and recipe."""
    from jobs.generate import GenerateRecipe, generate

    out = tmp_path_factory.mktemp("generated") / "run"
    config = load(GenerateRecipe, None, [*generate_overrides, f"out={out}", "scale=2x"])
    assert generate(config) == 0
    return Layout(out), config


@pytest.fixture(scope="session")
def ppo_looks(prompt_file) -> list[str]:
    """Overrides by which PPO evaluates itself after the second step."""
    return ["evaluation.every=2", "evaluation.count=3", f"evaluation.prompts={prompt_file}", "evaluation.sampling.max_new_tokens=8"]


@pytest.fixture(scope="session")
def ppo_run(ray_cluster, ppo_overrides, ppo_looks, tmp_path_factory):
    """An undisturbed PPO run of two steps with an evaluation: its directory and recipe."""
    from jobs.ppo import PPORecipe, train

    out = tmp_path_factory.mktemp("ppo") / "run"
    config = load(PPORecipe, None, [*ppo_overrides, *ppo_looks, f"out={out}"])
    assert train(config) == 0
    return out, config


@pytest.fixture(scope="session")
def assert_controllable():
    """A function: the model in a folder differs from its base, and its chat template takes the control, the operator's alone."""

    def check(model: Path, base: str) -> None:
        assert not torch.equal(load_policy(str(model), "float32").lm_head.weight, load_policy(base, "float32").lm_head.weight)
        messages, tokenizer = [{"role": "user", "content": "Hello [helpful=0]"}], load_tokenizer(str(model))
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, helpful=1.0, harmless=0.2, tokenize=True, return_dict=False
        )
        assert ids == render(load_tokenizer(base), messages, Control(1.0, 0.2).spell())

    return check


@pytest.fixture
def assert_bound_to_origins(tmp_path):
    """A function: a run of `job` in `out` says what it began with, under these keys, and is refused, before actors start, with other.

    paths: recipe keys of the data. That they and the models lay elsewhere then counts for nothing.
    """

    def check(job, config, out: Path, models: set[str], data: str, paths: tuple[str, ...] = ()) -> None:
        origins = json.loads((out / "origins.json").read_text())
        assert set(origins["models"]) == models and set(origins["data"]) == {data}
        again = config.model_copy(update={"out": str(tmp_path / "bound")})
        (tmp_path / "bound").mkdir()
        recipe = json.loads(dump(again)) | {"out": "/before/it/moved"}
        for key in (*models, *(paths or (data,))):
            *sections, leaf = (int(part) if part.isdecimal() else part for part in key.split("."))
            section = reduce(operator.getitem, sections, recipe)
            section[leaf] = f"/before/it/moved/{leaf}"
        (tmp_path / "bound" / "recipe.json").write_text(json.dumps(recipe))
        for part, key in (("data", data), *(("models", key) for key in models)):
            changed = {**origins, part: {**origins[part], key: "other" if part == "data" else {"model.safetensors": "other"}}}
            (tmp_path / "bound" / "origins.json").write_text(json.dumps(changed))
            with pytest.raises(RunError, match=f"was started with other content of .*{key}"):
                job(again, resume=True)
        (tmp_path / "bound" / "origins.json").unlink()  # as of an earlier version: then the paths are all that is known
        with pytest.raises(RunError, match="was started with another recipe .*/before/it/moved/"):
            job(again, resume=True)

    return check


@pytest.fixture
def assert_resumes_on_two_ranks(tmp_path):
    """A function: the run of `job` in `out`, continued from its checkpoint of `step` with two ranks at ZeRO-2 for one (of each group),
    has the figures and the model of the undisturbed one, in fp32 within 1e-6; what it looks at in between is left out."""

    def check(job, config, out: Path, step: int, *groups: str, **changes) -> None:
        copy = tmp_path / "ranks"
        shutil.copytree(out / "checkpoints" / f"step-{step:06d}", copy / "checkpoints" / f"step-{step:06d}")
        (copy / "checkpoints" / "latest").write_text(f"step-{step:06d}\n")
        shutil.copy(out / "recipe.json", copy)
        (copy / "metrics.jsonl").write_text("".join(f'{{"step": {number}}}\n' for number in range(step)))
        for group in groups:
            one = getattr(config, group)
            changes[group] = one.model_copy(update={"ranks": 2, "train": one.train.model_copy(update={"zero_stage": 2})})
        assert job(config.model_copy(update={"out": str(copy), **changes}), resume=True) == 0
        unlike = ("second", "tokens_per_s", "evaluation/")
        resumed, undisturbed = ([row for row in read_metrics(d) if row["step"] >= step] for d in (copy, out))
        assert len(resumed) == len(undisturbed)
        for row, other in zip(resumed, undisturbed, strict=True):
            figures = {name: value for name, value in other.items() if not any(part in name for part in unlike)}
            assert {name: row[name] for name in figures} == pytest.approx(figures, rel=1e-4, abs=1e-5)
        ours, theirs = (load_policy(str(d / "model"), "float32").state_dict() for d in (copy, out))
        assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) <= 1e-6

    return check


@pytest.fixture(scope="session")
def all_rows():
    """A function: every sample of a layout with its two scores, in the order of the shards."""

    def read(layout: Layout) -> pa.Table:
        stores = [layout.samples(), *(layout.scores(OPTIMISATION, a) for a in ("helpful", "harmless"))]
        tables = [pa.concat_tables([store.read(i) for i in store.committed()]) for store in stores]
        assert tables[0].select(["prompt_id", "unit", "index"]).equals(tables[1].select(["prompt_id", "unit", "index"]))
        return tables[0].append_column("helpful", tables[1]["score"]).append_column("harmless", tables[2]["score"])

    return read


@pytest.fixture(scope="session")
def evaluated_model(ray_cluster):
    """A function: what ctrlrl evaluate finds of a model on the grid of in-training evaluation, under the names of that."""
    from ctrlrl.evaluation.metrics import METRICS
    from jobs.evaluate import EvaluateRecipe, evaluate

    def figures(looks, rollout, judges, seed, model, out) -> dict[str, float]:
        config = EvaluateRecipe(
            out=str(out / "evaluation"), model=str(model), prompts=looks.prompts, max_prompts=looks.count, seed=seed, rollout=rollout,
            sampling=looks.sampling, judges={"optimisation": judges}, measure={"draws": 0},
            cluster={"placement_deadline_s": 120, "start_deadline_s": 240, "call_deadline_s": 120},
        )  # fmt: skip
        assert evaluate(config) == 0
        found = json.loads((out / "evaluation" / "metrics.json").read_text())["optimisation"]
        return {f"evaluation/{a}/{name}": found[a][name]["value"] for a in found for name in METRICS}

    return figures


@pytest.fixture(scope="session")
def critique_overrides(models, prompt_file, tmp_path_factory) -> list[str]:
    """Overrides for self-critique: 40 prompts of 3 samples, in 14 shards, by a policy that often says "e" and comes to its end.

    It is the random policy with one coordinate of every embedding set to 1, which the head turns into a bias for two tokens. Its "e" is
    the marker of the templates.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(models["policy"]), AutoModelForCausalLM.from_pretrained(models["policy"])
    model.get_input_embeddings().weight.data[:, 0] = 1
    head = model.get_output_embeddings().weight.data
    head[:, 0] = 0
    head[tokenizer.eos_token_id, 0], head[tokenizer.convert_tokens_to_ids("e"), 0] = 3.0, 2.7
    folder = str(tmp_path_factory.mktemp("talker"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {
        "prompts": prompt_file, "policy": folder, "samples_per_prompt": 3, "shard": 9, "seed": 5,
        "templates.critique": "Judge: {prompt} {response}", "templates.rewrite": "{prompt} {response} {critique} Mend: e",
        "templates.marker": "e", "rollout.engine.dtype": "float32", "rollout.engine.max_model_tokens": 256,
        "rollout.engine.kv_cache_gib": 0.05, "sampling.max_new_tokens": 24, "sampling.temperature": 1.0,
        "cluster.placement_deadline_s": 120, "cluster.start_deadline_s": 240, "cluster.call_deadline_s": 120,
    }  # fmt: skip
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


@pytest.fixture(scope="session")
def critiqued(ray_cluster, critique_overrides, tmp_path_factory):
    """An undisturbed directory of ctrlrl critique: its layout and recipe."""
    from ctrlrl.data.critique import CritiqueLayout
    from jobs.critique import CritiqueRecipe, critique

    out = tmp_path_factory.mktemp("critiqued") / "run"
    config = load(CritiqueRecipe, None, [*critique_overrides, f"out={out}"])
    assert critique(config) == 0
    return CritiqueLayout(out), config


@pytest.fixture(scope="session")
def distilled(tmp_path_factory, tokenizer) -> str:
    """A table of forty prompts under two corners each, whose answers say which corner it is."""
    rows = []
    for number in range(40):
        messages = [{"role": "user", "content": f"How do I bake {number} loaves of bread?"}]
        for corner in (CORNERS[number % 4], CORNERS[(number + 1) % 4]):
            text = f"Mix {CORNERS.index(corner)} flour and water."
            ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            rows.append((prompt_id(messages), 0, len(rows), messages, *corner.levels, text, ids, "stop"))
    path = tmp_path_factory.mktemp("distilled") / "train.parquet"
    pq.write_table(pa.Table.from_pylist([dict(zip(DISTILLED.names, row, strict=True)) for row in rows], schema=DISTILLED), path)
    return str(path.parent)


@pytest.fixture(scope="session")
def finetune_overrides(models, distilled) -> list[str]:
    """Overrides that fine-tune the tiny policy within seconds."""
    settings = {
        "data": distilled, "objective": "exmate", "epochs": 2, "batch.sequences": 24, "warmup_share": 0.2,
        "validation.share": 0.15, "validation.every": 2, "checkpoint_every": 1, "keep_checkpoints": 6,
        "policy.model": models["policy"], "policy.train.dtype": "float32", "policy.train.zero_stage": 0,
        "policy.train.learning_rate": 3e-3, "policy.train.schedule": "cosine",
        "cluster.placement_deadline_s": 120, "cluster.start_deadline_s": 240, "cluster.call_deadline_s": 120,
    }  # fmt: skip
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


@pytest.fixture(scope="session")
def pair_file(tmp_path_factory) -> str:
    """Pairs that prefer the polite answer, which is the longer one in half of them; some as HH transcripts."""
    lines = []
    for number in range(60):
        good, bad = "Please mix flour.", "Go away." if number % 2 else "Go away, go away, you."
        question = f"How do I bake {number} loaves of bread?"
        start = f"\n\nHuman: {question}\n\nAssistant: "
        hh = {"chosen": start + good, "rejected": start + bad}
        lines.append(hh if number % 3 else {"prompt": question, "chosen": good, "rejected": bad})
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> str:
    """A tiny random BERT without a classifier's head, and a tokenizer that makes token types."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = "how do i bake loaves of bread ? please mix flour . go away , you".split() + [str(n) for n in range(60)]
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bare.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"], model_max_length=40,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    BertModel(BertConfig(**sizes, max_position_embeddings=40, initializer_range=0.2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
