"""Shared by the tests of self-generation: its recipe on the tiny models, and one undisturbed directory of two units."""

import json

import pyarrow as pa
import pytest

from ctrlrl.config import load
from ctrlrl.data.generation import OPTIMISATION, Layout


@pytest.fixture(scope="session")
def generate_overrides(models, prompt_file) -> list[str]:
    """Overrides that make generation run on the tiny models: 40 prompts of 3 samples, in 20 shards a unit."""
    settings = {
        "prompts": prompt_file, "policy": models["policy"], "samples_per_prompt": 3, "shard": 6, "seed": 5,
        "reward.helpful.model": models["helpful"], "reward.harmless.model": models["harmless"],
        "rollout.engine.dtype": "float32", "rollout.engine.max_model_tokens": 128, "rollout.engine.kv_cache_gib": 0.05,
        "sampling.max_new_tokens": 12, "sampling.temperature": 1.0,
        "cluster.placement_deadline_s": 30, "cluster.start_deadline_s": 240, "cluster.call_deadline_s": 120,
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
def all_rows():
    """A function: every sample of a layout with its two scores, in the order of the shards."""

    def read(layout: Layout) -> pa.Table:
        stores = [layout.samples(), *(layout.scores(OPTIMISATION, a) for a in ("helpful", "harmless"))]
        tables = [pa.concat_tables([store.read(i) for i in store.committed()]) for store in stores]
        assert tables[0].select(["prompt_id", "unit", "index"]).equals(tables[1].select(["prompt_id", "unit", "index"]))
        return tables[0].append_column("helpful", tables[1]["score"]).append_column("harmless", tables[2]["score"])

    return read
