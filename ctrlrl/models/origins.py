"""What a run began with, by content: its data and the models that it reads. A run that goes on with anything else is refused."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa

from ctrlrl.config import differences
from ctrlrl.data.atomic import write_json
from ctrlrl.errors import RunError
from ctrlrl.models.fingerprint import model_contents
from ctrlrl.runs import absolute_out

_FILE = "origins.json"  # of a run directory
_ROWS = 10_000

Origins = dict[str, dict]


def rows_fingerprint(rows: Iterable) -> str:
    """SHA-256 of rows of plain values, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def table_fingerprint(table: pa.Table) -> str:
    """SHA-256 of a table's columns and rows, whatever chunks they lie in."""
    digest = hashlib.sha256()
    for batch in table.replace_schema_metadata(None).combine_chunks().to_batches(_ROWS):
        digest.update(batch.serialize())
    return digest.hexdigest()


def same_origins(
    directory: Path, models: Mapping[str, str], data: Mapping[str, str], remedy: str = "start a new run in another out"
) -> Origins:
    """The origins of a run in `directory`, for `record_origins`. models: recipe key -> name or path; data: recipe key -> fingerprint.

    RunError, which names them and the remedy, if a run that goes on, or whose model is used, began with others.
    """
    contents = {name: model_contents(name) for name in set(models.values())}
    found = {"models": {key: contents[name] for key, name in models.items()}, "data": dict(data)}
    if not (directory / "recipe.json").exists():
        return found
    path = directory / _FILE
    if not path.exists():
        print(f"{directory} does not say which data and weights it began with: those of now are taken for the same", flush=True)
        return found
    try:
        stored = json.loads(path.read_text())
        changed = differences(stored["models"], found["models"]) + differences(stored["data"], found["data"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} cannot be read: {error}: restore it, or delete it and trust that data and weights are the same") from None
    if changed:
        names = ", ".join(change.partition(": ")[0] for change in changed)
        raise RunError(f"{str(directory)!r} was started with other content of {names}: restore it, or {remedy}")
    return found


def known_by_content(out: str, *keys: str) -> tuple[str, ...]:
    """Those of the recipe `keys` that a run in `out` knows by content, so that a resumed one may find the same at other paths: all of
    them, if it says what it began with."""
    return keys if (absolute_out(out) / _FILE).exists() else ()


def record_origins(directory: Path, origins: Origins) -> None:
    """Store them in the run directory."""
    write_json(directory / _FILE, origins)
