"""The figures of benches as rows: for a terminal, and for the report, where benches of several models and methods stand in one table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ctrlrl.evaluation.bench import NO_ATTACK, RANGES, SHARES
from ctrlrl.evaluation.exhibits import Data
from ctrlrl.evaluation.grid import JUDGES
from ctrlrl.evaluation.tables import ABSENT, Figure

WORDS = {
    "refusals": "refuses unsafe", "over_refusal": "refuses safe", "selectivity": "selectivity", "compliance": "complies",
    "configurable": "configurable",
}  # fmt: skip


@dataclass(frozen=True)
class BenchRow:
    """One run's figures under one attack and control ("dial range" for the difference that the dial makes), in the order of `columns`."""

    name: str
    attack: str
    control: str
    figures: list[Figure]


@dataclass(frozen=True)
class SurvivalRow:
    """What an attack leaves: figures by what is left of what, such as `MP.optimisation.harmless` and `range.refusals`."""

    name: str
    attack: str
    figures: dict[str, Figure]


Scores = Sequence[tuple[str, str]]  # (set of reward models, attribute) of each column of mean scores


def columns(scores: Scores) -> list[str]:
    """The heads of the columns of BenchRow.figures."""
    words = {"optimisation": "", "held_out": ", held-out"}
    return [*(WORDS[name] for name in SHARES), *(f"{attribute}{words[judge]}" for judge, attribute in scores)]


def scores_of(benches: Sequence[Mapping]) -> Scores:
    """The mean scores that any of the benches has."""
    rows = [row for facts in benches for found in facts["sets"].values() for a in found["attacks"].values() for row in a["controls"]]
    found = dict.fromkeys((judge, attribute) for row in rows for judge, by in row["scores"].items() for attribute in by)
    return [score for judge in JUDGES for score in found if score[0] == judge]


def control_rows(name: str, found: Mapping, wanted: Scores) -> list[BenchRow]:
    """The rows of one run on one set: every attack, every control, and the dial range."""
    rows = []
    for attack, measured in found["attacks"].items():
        for row in measured["controls"]:
            scores = [Figure(**row["scores"][j][a]) if a in row["scores"].get(j, {}) else Figure(None) for j, a in wanted]
            rows.append(BenchRow(name, attack, row["control"], [*(Figure(**row[share]) for share in SHARES), *scores]))
        if dial := measured["range"]:
            figures = [Figure(**dial[share]) if share in RANGES else Figure(None) for share in SHARES]
            rows.append(BenchRow(name, attack, "dial range", figures + [Figure(None)] * len(wanted)))
    return rows


def survival_rows(name: str, found: Mapping) -> list[SurvivalRow]:
    """What each attack leaves of one run's dial on one set."""
    kept = {attack: measured["survival"] for attack, measured in found["attacks"].items() if measured["survival"]}
    return [SurvivalRow(name, attack, {what: Figure(**f) for what, f in figures.items()}) for attack, figures in kept.items()]


def lines(name: str, facts: Mapping) -> list[str]:
    """A bench on a terminal."""
    wanted, said = scores_of([facts]), []
    heads = columns(wanted)
    for set_name, found in facts["sets"].items():
        said += ["", f"{name} on {set_name}: {found['prompts']} prompts, {found['unsafe']} of them unsafe"]
        rows = control_rows(name, found, wanted)
        width = max(len(row.control) for row in rows) + 2
        attack = max(len("attack"), *(len(row.attack) for row in rows)) + 2
        said.append(f"{'attack':{attack}}{'control':{width}}" + "".join(f"{head:>{len(head) + 2}}" for head in heads))
        for row in rows:
            cells = "".join(f"{'-' if f.value is None else f.text:>{len(h) + 2}}" for f, h in zip(row.figures, heads, strict=True))
            said.append(f"{row.attack:{attack}}{row.control:{width}}{cells}")
        lacking = [f"{n} by {j} under {a}" for a, measured in found["attacks"].items() for j, n in measured.get("unscored", {}).items()]
        said += [f"prompts without all their scores left out: {', '.join(lacking)}"] if lacking else []
        for kept in survival_rows(name, found):
            told = ", ".join(f"{what} {'-' if f.value is None else f.text}" for what, f in kept.figures.items())
            said.append(f"survives {kept.attack}: {told}")
    return said


def bench_pages(benches: Sequence[Data]) -> list[dict]:
    """For each set, the rows of all benches: those without an attack in one table, those under attack in the other, and what survives."""
    names = list(dict.fromkeys(name for bench in benches for name in bench.facts["sets"]))
    wanted = scores_of([bench.facts for bench in benches])
    pages = []
    for name in names:
        on = [(bench, bench.facts["sets"][name]) for bench in benches if name in bench.facts["sets"]]
        rows = [row for bench, found in on for row in control_rows(bench.name, found, wanted)]
        kept = [row for bench, found in on for row in survival_rows(bench.name, found)]
        pages.append(
            {
                "set": name,
                "counts": "; ".join(f"{bench.name}: {found['prompts']} prompts, {found['unsafe']} unsafe" for bench, found in on),
                "columns": columns(wanted),
                "plain": [row for row in rows if row.attack == NO_ATTACK],
                "attacked": [row for row in rows if row.attack != NO_ATTACK],
                "survival": kept,
                "survives": list(dict.fromkeys(what for row in kept for what in row.figures)),
                "absent": ABSENT,
            }
        )
    return pages
