"""The tables of the report as rows of cells: the comparison in the paper's layout with the best values marked, gaps, corners, answers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from ctrlrl.attributes import PAPER, Attributes
from ctrlrl.control import Control, corners
from ctrlrl.evaluation.exhibits import Evaluated
from ctrlrl.evaluation.metrics import METRICS, request_columns

_SHOWN = 8  # corners of a table of answers at most
ABSENT = "–"  # a figure that does not exist, such as BT without pairs


@dataclass(frozen=True)
class Figure:
    """One value as it is shown, its interval, and whether it is the best of its column. value: None where it does not exist."""

    value: float | None
    low: float | None = None
    high: float | None = None
    best: bool = False

    @property
    def text(self) -> str:
        """Three decimals, without a minus before zero."""
        return ABSENT if self.value is None else f"{self.value:.3f}".replace("-0.000", "0.000")

    @property
    def interval(self) -> str:
        """The interval with two decimals; empty where there is none."""
        return "" if self.low is None or self.high is None else f"{self.low:.2f} to {self.high:.2f}"


@dataclass(frozen=True)
class Row:
    """A method and its figures in the order of `columns`; figures: None where the method was not evaluated."""

    name: str
    note: str
    figures: list[Figure] | None


@dataclass(frozen=True)
class Method:
    """A row to be: metrics.json (None: not evaluated), and the attributes that the method asks for; those it does not have no figures."""

    name: str
    note: str
    metrics: Mapping | None
    asked: tuple[str, ...] = PAPER.names

    def figure(self, judge: str, attribute: str, metric: str) -> Figure:
        """One value of metrics.json; it does not exist for an attribute that is not asked for."""
        return Figure(**self.metrics[judge][attribute][metric]) if attribute in self.asked else Figure(None)


def columns(attributes: Attributes) -> list[tuple[str, str]]:
    """(attribute, metric) of the columns of a comparison, safety first, as in the paper's tables."""
    return [(attribute.name, metric) for attribute in attributes.shown for metric in METRICS]


def comparison(methods: Sequence[Method], judge: str, attributes: Attributes = PAPER) -> list[Row]:
    """The rows of one set of reward models.

    Best is the largest value, for Err the smallest; values that look alike with three decimals share it. One row alone has no best, and
    a method that is not asked for all attributes, an easier task, competes only where none is.
    """
    rows = [[m.figure(judge, *column) for column in columns(attributes)] if m.metrics and judge in m.metrics else None for m in methods]
    whole = [row for row, method in zip(rows, methods, strict=True) if row and method.asked == attributes.names]
    rivals = whole or [row for row in rows if row]
    for index, (_, metric) in enumerate(columns(attributes)):
        shown = [float(row[index].text) for row in rivals if row[index].value is not None]
        best = (min if metric == "Err" else max)(shown, default=None)
        for row in rivals:
            if len(shown) > 1 and row[index].value is not None:
                row[index] = replace(row[index], best=float(row[index].text) == best)
    return [Row(method.name, method.note, row) for method, row in zip(methods, rows, strict=True)]


def gaps(runs: Sequence[Evaluated], methods: Sequence[Method], attributes: Attributes = PAPER) -> list[Row]:
    """Optimisation minus held-out, per metric; only runs that both sets have judged have figures."""
    rows = []
    for run, method in zip(runs, methods, strict=True):
        gap = (run.details or {}).get("over_optimisation")
        figures = [Figure(gap[a][metric] if a in method.asked else None) for a, metric in columns(attributes)] if gap else None
        rows.append(Row(run.name, "", figures))
    return rows


@dataclass(frozen=True)
class Answer:
    """An answer and its scores in words; text: None where the method does not ask for the corner."""

    text: str | None
    scores: str


@dataclass(frozen=True)
class Example:
    """One prompt and each method's answers at the corners."""

    prompt: str
    corners: list[Control]  # of many attributes some
    answers: dict[str, list[Answer]]


def examples(runs: Sequence[Evaluated], count: int) -> list[Example]:
    """`count` prompts, evenly spaced among those that every run with a table has answered, with all answers at the corners
    (of many attributes: at `_SHOWN` of them, evenly spaced)."""
    indexed = {run.name: _answers(run) for run in runs if run.table is not None and "response" in run.table.column_names}
    if not indexed:
        return []
    first = next(iter(indexed.values()))
    shared = [prompt for prompt in dict.fromkeys(key[0] for key in first) if all((prompt in found.prompts) for found in indexed.values())]
    chosen = [shared[i * len(shared) // min(count, len(shared))] for i in range(min(count, len(shared)))] if shared else []
    asked = corners(runs[0].attributes)
    asked = [asked[i * (len(asked) - 1) // max(min(len(asked), _SHOWN) - 1, 1)] for i in range(min(len(asked), _SHOWN))]
    return [
        Example(
            first.prompts[prompt],
            asked,
            {name: [found.get((prompt, *corner.levels), Answer(None, "")) for corner in asked] for name, found in indexed.items()},
        )
        for prompt in chosen
    ]


class _Indexed(dict):
    """Answers by prompt_id and the levels asked, and the text of each prompt."""

    prompts: dict[str, str]


def _answers(run: Evaluated) -> _Indexed:
    found = _Indexed()
    found.prompts = {}
    for row in _rows(run.table, (run.details or {}).get("best_template")):
        found.prompts.setdefault(row["prompt_id"], row.get("prompt") or row["prompt_id"])
        scores = {a: row.get(f"optimisation.{a.name}") for a in run.attributes}
        words = "" if None in scores.values() else ", ".join(f"{a.synonyms[0]} {score:.2f}" for a, score in scores.items())
        found[row["prompt_id"], *(row[column] for column in request_columns(run.attributes))] = Answer(row["response"], words)
    return found


def _rows(table: pa.Table, template: int | None) -> Iterator[dict]:
    """Rows of the table; of prompting those of its best template."""
    for row in table.to_pylist():
        if template is None or row.get("template") == template:
            yield row
