"""What a report is made from: evaluations, training runs, distillations, generations and studies, found by what directories hold."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ctrlrl.attributes import PAPER, Attributes, read_attributes, unlike
from ctrlrl.data.files import expanded
from ctrlrl.errors import DataError
from ctrlrl.evaluation.files import (
    BENCH,
    COST,
    DETAILS,
    DISTILLED,
    DISTILLED_REPORT,
    METRICS_FILE,
    RECIPE,
    STUDY,
    TABLE,
    TRAINING,
    read_json,
    read_rows,
)
from ctrlrl.evaluation.grid import JUDGES
from ctrlrl.evaluation.metrics import METRICS, request_columns

# What the report reads of details.json.
_DETAILED = ("method", "prompts", "controls", "judges", "over_optimisation", "corners", "best_template", "templates", "missing")
# Folders of a run that hold no runs.
_PASSED_OVER = {"checkpoints", "model", "tensorboard", "answers", "shards", "samples", "scores"}


@dataclass(frozen=True)
class Evaluated:
    """A directory of ctrlrl evaluate. details, cost and table are None where they are absent."""

    name: str
    path: Path
    metrics: dict
    details: dict | None
    cost: dict | None
    table: pa.Table | None

    @property
    def attributes(self) -> Attributes:
        """What was asked for; the paper's two where the details do not say."""
        return read_attributes((self.details or {}).get("attributes", PAPER), self.path / DETAILS)

    @property
    def judged(self) -> dict[str, dict]:
        """What the details tell of each set of reward models, the optimisation set first."""
        given = self.details["judges"] if self.details else {}
        return {judge: given[judge] for judge in JUDGES if judge in given}


@dataclass(frozen=True)
class Trained:
    """A training run: the rows of its metrics.jsonl."""

    name: str
    path: Path
    rows: list[dict]


@dataclass(frozen=True)
class Data:
    """A distillation (its report.json), a generation or self-critique (its manifest.json), or a bench (its bench.json)."""

    name: str
    path: Path
    facts: dict


@dataclass(frozen=True)
class Study:
    """A folder with a study.json: {"title", "note" (optional), "rows": [{"name", "run"}]}, `run` relative to the folder.

    rows: name and evaluation of each variant; None where it is not evaluated yet.
    """

    title: str
    note: str
    path: Path
    rows: list[tuple[str, Evaluated | None]]


@dataclass
class Exhibits:
    """All that was found, in the order of finding; names are different within each kind."""

    evaluated: list[Evaluated] = field(default_factory=list)
    trained: list[Trained] = field(default_factory=list)
    distilled: list[Data] = field(default_factory=list)
    generated: list[Data] = field(default_factory=list)
    studies: list[Study] = field(default_factory=list)
    benches: list[Data] = field(default_factory=list)

    @property
    def attributes(self) -> Attributes:
        """Those of all runs. DataError: evaluations of different ones, which no table compares."""
        runs = [*self.evaluated, *(run for study in self.studies for _, run in study.rows if run)]
        for run in runs:
            if other := unlike(run.attributes, runs[0].attributes):
                raise DataError(f"{run.path} and {runs[0].path} are of different attributes ({other}): report on them one by one")
        made = [(run.path / RECIPE, (read_json(run.path / RECIPE) or {}).get("attributes")) for run in self.trained]
        made += [(data.path / DISTILLED_REPORT, data.facts.get("attributes")) for data in self.distilled]
        return runs[0].attributes if runs else next((read_attributes(found, at) for at, found in made if found), PAPER)

    def __len__(self) -> int:
        return sum(map(len, (self.evaluated, self.trained, self.distilled, self.generated, self.studies, self.benches)))


def collect(runs: Sequence[str]) -> Exhibits:
    """The exhibits in the directories `runs` and below them. `NAME=DIR` names what is found there.

    A study is taken as a whole: what lies in its folder stands in its table alone. DataError: no such directory, nothing found in one,
    or a damaged file, which is named.
    """
    found = Exhibits()
    for run in runs:
        name, folder = ("", run) if "=" not in run or expanded(run).is_dir() else run.split("=", 1)
        root = expanded(folder)
        if not root.is_dir():
            raise DataError(f"{folder!r} is no directory: give directories of runs, or NAME=DIR")
        before = len(found)
        for path in _folders(root):
            _take(found, path, _name(path, root, name))
        if len(found) == before:
            kinds = f"{METRICS_FILE}, {TRAINING}, {DISTILLED_REPORT} with {DISTILLED}, {BENCH}, or {STUDY}"
            what = "evaluation, training run, distillation, bench or study"
            raise DataError(f"{folder!r} holds no {what}: none of {kinds} is in it or below")
    for kind in (found.evaluated, found.trained, found.distilled, found.generated, found.benches):
        _tell_apart(kind)
    return found


def read_evaluated(path: Path, name: str = "") -> Evaluated | None:
    """The evaluation in `path`, None if there is none. Its name: the given one, its recipe's, or its folder's."""
    metrics = read_json(path / METRICS_FILE)
    if metrics is None:
        return None
    details = read_json(path / DETAILS)
    table = path / TABLE
    try:
        rows = pq.read_table(table) if table.exists() else None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{table} is damaged: {error}") from None
    attributes = read_attributes((details or {}).get("attributes", PAPER), path / DETAILS)
    if not _is_metrics(metrics, attributes):
        needed = f"{', '.join(METRICS)} of {' and '.join(attributes.names)} by {' or '.join(JUDGES)}"
        raise DataError(f"{path / METRICS_FILE} is not of ctrlrl evaluate: it needs {needed}")
    if absent := [key for key in _DETAILED if details is not None and key not in details]:
        raise DataError(f"{path / DETAILS} has no {', '.join(absent)}: run ctrlrl evaluate --table on its table.parquet")
    if absent := [name for name in ("prompt_id", *request_columns(attributes)) if rows is not None and name not in rows.column_names]:
        raise DataError(f"{table} has no column {', '.join(absent)}: give a table of ctrlrl evaluate")
    own = (details or {}).get("name") or default_name(path)
    return Evaluated(name or own, path, metrics, details, read_json(path / COST), rows)


def _is_metrics(found: dict, attributes: Attributes) -> bool:
    """Whether it has the layout of metrics.json."""
    try:
        figures = [found[judge][a][metric] for judge in found for a in attributes.names for metric in METRICS]
        return bool(found) and set(found) <= set(JUDGES) and all({"value", "low", "high"} == set(figure) for figure in figures)
    except (KeyError, TypeError):
        return False


def default_name(path: Path) -> str:
    """What an evaluation is called that has no name: its folder, or the run that it lies in if that is only `evaluation`."""
    path = path.absolute()
    return path.parent.name if path.name == "evaluation" else path.name


def _take(found: Exhibits, path: Path, name: str) -> None:
    """Add what `path` itself holds."""
    if (path / STUDY).exists():
        found.studies.append(_read_study(path))
        return
    if evaluated := read_evaluated(path, name):
        found.evaluated.append(evaluated)
    if (path / TRAINING).exists():
        found.trained.append(Trained(name or path.absolute().name, path, read_rows(path / TRAINING)))
    if (path / DISTILLED_REPORT).exists() and (path / DISTILLED).exists():
        found.distilled.append(Data(name or path.absolute().name, path, read_json(path / DISTILLED_REPORT)))
    if bench := read_json(path / BENCH):
        if not isinstance(bench.get("sets"), dict):
            raise DataError(f"{path / BENCH} is not of ctrlrl bench: it needs sets")
        found.benches.append(Data(name or bench.get("name") or default_name(path), path, bench))
    manifest = read_json(path / "manifest.json") if any((path / made).is_dir() for made in ("samples", "critiques")) else None
    if manifest and "counts" in manifest:
        found.generated.append(Data(name or path.absolute().name, path, manifest))


def _read_study(path: Path) -> Study:
    study = read_json(path / STUDY)
    rows = study.get("rows")
    shaped = isinstance(rows, list) and all(isinstance(r, dict) and {"name", "run"} <= set(r) for r in rows)
    if not shaped or not isinstance(study.get("title"), str):
        raise DataError(f'{path / STUDY} needs a "title" and "rows", a list of {{"name", "run"}}')
    found = [(row["name"], read_evaluated(path / row["run"], row["name"])) for row in rows]
    return Study(study["title"], study.get("note", ""), path, found)


def _folders(root: Path) -> list[Path]:
    """`root` and the folders below it that may be runs, in order; nothing below a study or a model."""
    found = []
    for folder, below, files in os.walk(root):
        found.append(Path(folder))
        is_leaf = STUDY in files or "config.json" in files
        below[:] = [] if is_leaf else sorted(name for name in below if name not in _PASSED_OVER and not name.startswith("."))
    return found


def _name(path: Path, root: Path, given: str) -> str:
    """`given` for the directory itself, `given/…` for what lies below it; empty where nothing is given."""
    below = path.relative_to(root).as_posix()
    return given if not given or below in (".", "evaluation") else f"{given}/{below}"


def _tell_apart(kind: list) -> None:
    """Where two of a kind have the same name, both get their paths as names."""
    names = [item.name for item in kind]
    for index, item in enumerate(kind):
        if names.count(item.name) > 1:
            kind[index] = type(item)(**{**vars(item), "name": str(item.path)})
