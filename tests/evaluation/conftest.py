"""Tables of answers with known scores, as the evaluation job writes them, and evaluated directories made from them."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from ctrlrl.control import ATTRIBUTES, CORNERS
from ctrlrl.data.sources import Prompt
from ctrlrl.evaluation.baselines import SYSTEM_CONTROLS
from ctrlrl.evaluation.grid import make_cells, make_table
from ctrlrl.evaluation.results import MeasureConfig, results


@pytest.fixture(scope="session")
def make_answers():
    """A function: a table of `prompts` prompts by a method, with random scores (few different ones, so that ties occur)."""

    def make(prompts=6, method="control", judges=("optimisation", "held_out"), seed=0, controls=None, responses=None):
        asked = [Prompt(f"p{i}", ({"role": "user", "content": f"Question {i} | <b>really</b>?"},), f"f:{i}") for i in range(prompts)]
        templates = {"prompting": (1, 2, 3, 4), "reranking": (1,)}.get(method, (None,))
        controls = controls or (SYSTEM_CONTROLS if method == "system" else CORNERS)
        cells = make_cells(asked, controls, method, templates)
        rng = np.random.default_rng(seed)
        scores = {judge: {a: rng.choice([0.0, 0.25, 0.5, 0.75, 1.0], len(cells)) for a in ATTRIBUTES} for judge in judges}
        said = responses or [f"Answer {i} & more" for i in range(len(cells))]
        return make_table(cells, said, np.arange(len(cells)) % 7 + 1, np.arange(len(cells)) % 5 > 0, scores)

    return make


@pytest.fixture(scope="session")
def write_evaluation(make_answers):
    """A function: an evaluated directory with a table, metrics, details and costs; returns (metrics, details)."""

    def write(path, **settings):
        path.mkdir(parents=True)
        table = make_answers(**settings)
        metrics, details = results(table, MeasureConfig(draws=20), 1)
        details["name"] = path.name
        pq.write_table(table, path / "table.parquet")
        cost = {"answers": len(table), "tokens": 1000, "start_s": 10.0, "wall_s": 30.0, "engine_s": 20.0}
        for name, content in (("metrics", metrics), ("details", details), ("cost", cost)):
            (path / f"{name}.json").write_text(json.dumps(content, sort_keys=name != "metrics"))
        return metrics, details

    return write
