"""From a table of scored answers to metrics.json and details.json, and to lines on a terminal; with a table alone, without models and Ray.

ctrlrl evaluate --table runs/ppo/evaluation/table.parquet
"""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ctrlrl.attributes import PAPER, Attributes, read_attributes
from ctrlrl.config import Section, load
from ctrlrl.data.atomic import write_json, write_text
from ctrlrl.data.files import expanded
from ctrlrl.errors import DataError
from ctrlrl.evaluation.exhibits import default_name
from ctrlrl.evaluation.files import DETAILS, METRICS_FILE, RECIPE, read_json
from ctrlrl.evaluation.metrics import METRICS
from ctrlrl.evaluation.results import MeasureConfig, results
from ctrlrl.runs import only_writer
from jobs.parts.launch import run_job


class TableRecipe(Section):
    """Which table is measured again. out: by default beside it. seed, measure: by default those of the recipe.json beside it, if any."""

    table: str
    out: str = ""
    seed: int | None = None
    measure: MeasureConfig | None = None


def measure_again(config: TableRecipe) -> int:
    """Recompute metrics.json and details.json from a table alone, and print the comparison's rows."""
    path = expanded(config.table).absolute()
    if not path.is_file():
        raise DataError(f"table {config.table!r} does not exist: give the table.parquet of ctrlrl evaluate")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{config.table!r} is not a Parquet table: {error}") from None
    recipe = read_json(path.with_name(RECIPE)) or {}
    measure = config.measure or load(MeasureConfig, None, settings=recipe.get("measure", {}))
    seed = config.seed if config.seed is not None else recipe.get("seed", 0)
    found = results(table, measure, seed)  # a table with a fault is refused before anything is made
    name = recipe.get("name") or default_name(path.parent)
    with only_writer(config.out or str(path.parent)) as out:
        print("\n".join(write_results(found, out, name, recipe.get("model"))), flush=True)
    return 0


def write_results(found: tuple[dict, dict], out: Path, name: str, model: str | None) -> list[str]:
    """Write details.json and, last, metrics.json; returns the lines to print. found: of evaluation.results.results."""
    metrics, details = found
    (out / METRICS_FILE).unlink(missing_ok=True)  # old figures must not stand beside new details
    write_json(out / DETAILS, {"name": name, "model": model, **details})
    write_text(out / METRICS_FILE, json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    lines = summary_lines({name: metrics}, read_attributes(details.get("attributes", PAPER), DETAILS))
    return [*lines, *unscored_lines(details), *system_lines({name: details})]


def unscored_lines(details: dict) -> list[str]:
    """How many prompts lack a score, and are left out of the figures of that set of reward models."""
    return [f"{prompts} prompts without all their {judge} scores left out" for judge, prompts in details.get("unscored", {}).items()]


def system_lines(methods: dict[str, dict]) -> list[str]:
    """S1 and S0 of those methods that are steered by system prompts, from their details.json; no line where none is."""
    lines = [
        f"{f'{name}, {judge}':28} " + "  ".join(f"{share} {beside['system'][share]['value']:.3f}" for share in ("S1", "S0"))
        for name, details in methods.items()
        for judge, beside in details["judges"].items()
        if beside["system"]
    ]
    return ["", "Safe under the harmless (S1), not safe under the uncensored (S0) system prompt", *lines] if lines else []


def summary_lines(methods: dict[str, dict], attributes: Attributes = PAPER) -> list[str]:
    """The comparison table in the paper's layout, one line a method and set of reward models; dashes where nothing was asked to differ."""
    width = max(28, *(len(f"{method}, {judge}") + 1 for method, metrics in methods.items() for judge in metrics))
    lines = [" " * width + "".join(f"{a.noun:^30}" for a in attributes.shown)]
    lines.append(f"{'method, judged by':{width}}" + "  ".join("".join(f"{n:>7}" for n in METRICS) for _ in attributes))
    for judge in ("optimisation", "held_out"):
        for method, metrics in methods.items():
            if judge in metrics:
                values = [[metrics[judge][a.name][n]["value"] for n in METRICS] for a in attributes.shown]
                cells = "  ".join("".join(f"{'-':>7}" if None in row else f"{v:7.3f}" for v in row) for row in values)
                lines.append(f"{method + ', ' + judge:{width}}{cells}")
    return lines


def main(table: str, recipe: str = "", overrides: list[str] | None = None, out: str = "") -> int:
    """Measure a table; the exit code."""
    return run_job(TableRecipe, measure_again, recipe, overrides, out, {"table": table})
