"""Names of the files of an evaluation, a training run, a distillation and a study, and reading them."""

import json
from pathlib import Path

from ctrlrl.errors import DataError

TABLE, METRICS_FILE, DETAILS, COST = "table.parquet", "metrics.json", "details.json", "cost.json"  # of ctrlrl evaluate
BENCH = "bench.json"  # of ctrlrl bench
RECIPE = "recipe.json"  # of every run
TRAINING = "metrics.jsonl"  # of a training run
DISTILLED, DISTILLED_REPORT = "train.parquet", "report.json"  # of ctrlrl distill
STUDY = "study.json"


def read_json(path: Path) -> dict | None:
    """The object in a JSON file, None if there is no such file; DataError if it is something else."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no JSON object")
    return found


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line that was cut off counts as not there. DataError names a damaged line."""
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            if number < len(lines):
                raise DataError(f"{path}:{number} is damaged: {error}") from None
            continue
        if not isinstance(row, dict) or not all(value is None or isinstance(value, int | float) for value in row.values()):
            raise DataError(f"{path}:{number} is no row of metrics: it must be an object of numbers")
        rows += [row] if row else []
    return rows


def is_result(name: str) -> bool:
    """Whether a file of this name is one that jobs write into their output directories."""
    return name.endswith((".json", ".jsonl", ".parquet", ".html", ".md", ".png"))
