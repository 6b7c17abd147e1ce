"""The report on any number of runs: one self-contained HTML file and a Markdown table, both from the figures that the runs keep."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.compute as pc
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from ctrlrl.attributes import enumerated
from ctrlrl.data.atomic import write_text
from ctrlrl.evaluation import charts
from ctrlrl.evaluation.bench_tables import bench_pages
from ctrlrl.evaluation.costs import Cost, evaluation_cost, generation_cost, training_cost
from ctrlrl.evaluation.exhibits import Data, Evaluated, Exhibits, Study
from ctrlrl.evaluation.grid import JUDGES
from ctrlrl.evaluation.metrics import METRICS
from ctrlrl.evaluation.refusals import PATTERNS_MISS
from ctrlrl.evaluation.tables import ABSENT, Figure, Method, Row, comparison, examples, gaps

HTML, MARKDOWN = "report.html", "report.md"
_EXAMPLES = 3
_JUDGE_WORDS = {"optimisation": "Optimisation reward models", "held_out": "Held-out reward models"}
_COOL, _WARM = (0, 114, 178), (213, 94, 0)  # of the heat map: positive and negative, the colours of the pictures


def write_report(found: Exhibits, out: Path, title: str = "") -> tuple[Path, Path]:
    """Write report.html and report.md into the directory `out`; returns their paths."""
    pages = Environment(
        loader=PackageLoader("ctrlrl.evaluation"),
        autoescape=select_autoescape(["html.j2"], default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {
        "duration": duration, "percent": percent, "tint": tint, "decimals": lambda n: Figure(n).text,
        "count": lambda n: ABSENT if n is None else f"{n:,.0f}", "line": one_line,
    }
    content = contents(found, title or f"How far {enumerated([a.noun for a in found.attributes.shown])} follow the control")
    for name in (HTML, MARKDOWN):
        write_text(out / name, pages.get_template(f"{name}.j2").render(content))
    return out / HTML, out / MARKDOWN


def contents(found: Exhibits, title: str) -> dict:
    """All that the templates show."""
    detailed = [run for run in found.evaluated if run.details]
    methods, of = [_method(run) for run in found.evaluated], found.attributes
    return {
        "title": title,
        "attributes": [a.name for a in of.shown],
        "dials": of.each,
        "words": {a.name: a.noun for a in of},
        "metrics": METRICS,
        "judge_words": _JUDGE_WORDS,
        "comparisons": {judge: comparison(methods, judge, of) for judge in _judges(found.evaluated)},
        "gaps": gaps(found.evaluated, methods, of) if any(run.details["over_optimisation"] for run in detailed) else [],
        "systems": [(run.name, judge, s) for run in detailed for judge, b in run.judged.items() if (s := b["system"])],
        "templates": [(run.name, _template_tables(run)) for run in detailed if run.details["templates"]],
        "studies": [(study, _study_tables(study, found)) for study in found.studies],
        "evaluated": len(all_evaluated(found)),
        "detailed": detailed,
        "told": how_told(detailed),
        "calibrations": [charts.calibration({j: b["calibration"] for j, b in r.judged.items()}, r.name, of) for r in detailed],
        "distributions": [
            p for r in detailed for p in charts.distributions({j: b["distribution"] for j, b in r.judged.items()}, r.name, of)
        ],
        "curves": [(run.name, len(run.rows), charts.training_curves(run.rows, run.name, of)) for run in found.trained],
        "distilled": [(data, charts.class_balance(data.facts["classes"], data.name, of)) for data in found.distilled],
        "benches": bench_pages(found.benches),
        "bench_told": bench_told(found.benches),
        "examples": examples(found.evaluated, _EXAMPLES),
        "costs": costs(found),
        "missing": missing(found),
        "absent": ABSENT,
    }


def how_told(runs: Sequence[Evaluated]) -> str:
    """What told the refusals of the runs, and what it is known to miss."""
    told = [run.details.get("refusals_told") or {"by": "patterns", "agreement": None} for run in runs]
    by_judge = [(run.name, facts["agreement"]) for run, facts in zip(runs, told, strict=True) if facts["by"] == "judge"]
    said = [PATTERNS_MISS] if any(facts["by"] == "patterns" for facts in told) else []
    agreed = "; ".join(name + ("" if share is None else f" (the patterns agree with it on {share:.0%})") for name, share in by_judge)
    return " ".join([*said, *([f"By a judge, with that judge's own faults: {agreed}."] if by_judge else [])])


def bench_told(benches: Sequence[Data]) -> str:
    """What told the refusals of the benches."""
    by = {bench.name: bench.facts["refusals_told"]["by"] for bench in benches}
    judged = [name for name, told in by.items() if told == "judge"]
    said = [PATTERNS_MISS] if len(judged) < len(by) else []
    return " ".join([*said, *([f"By a judge, with that judge's own faults: {', '.join(judged)}."] if judged else [])])


def costs(found: Exhibits) -> list[Cost]:
    """What every run cost that keeps such figures."""
    every = [generation_cost(run) for run in found.generated]
    every += [cost for run in found.trained if (cost := training_cost(run))]
    return every + [cost for run in all_evaluated(found) if (cost := evaluation_cost(run))]


def all_evaluated(found: Exhibits) -> list[Evaluated]:
    """Every evaluation once; one that stands in studies alone under the study's name."""
    named = [*found.evaluated]
    named += [replace(run, name=f"{study.title}: {run.name}") for study in found.studies for _, run in study.rows if run]
    once: dict[Path, Evaluated] = {}
    for run in named:
        once.setdefault(run.path.resolve(), run)
    return list(once.values())


def missing(found: Exhibits) -> list[str]:
    """What the report cannot show, and what would supply it."""
    said = []
    kinds = (("evaluation", "ctrlrl evaluate", found.evaluated), ("training run", "ctrlrl ppo or finetune", found.trained))
    for kind, command, given in (*kinds, ("distillation", "ctrlrl distill", found.distilled)):
        said += [] if given or found.studies else [f"no {kind} among the runs: give a directory of {command}"]
    for run in found.evaluated:
        if run.details is None:
            said.append(f"{run.name}: no details.json (run ctrlrl evaluate --table on its table.parquet)")
        said += [f"{run.name}: {what}" for what in (run.details or {}).get("missing", [])]
        said += [f"{run.name}: no cost.json, so its cost is not known"] if run.cost is None else []
        said += [f"{run.name}: no table.parquet, so no answers of it are shown"] if run.table is None else []
    said += differently_asked([run for run in found.evaluated if run.details])
    for run in found.trained:
        said += [f"{run.name}: no rows of metrics yet"] if not run.rows else []
        said += [f"{run.name}: no seconds in its metrics"] if run.rows and not training_cost(run) else []
    said += [f"{data.name}: a distillation keeps no times" for data in found.distilled]
    said += [f"study “{study.title}”: {name} is not evaluated yet" for study in found.studies for name, run in study.rows if run is None]
    return said


def differently_asked(runs: Sequence[Evaluated]) -> list[str]:
    """Whether evaluations cannot be compared, having been asked other prompts or under other controls than each other."""
    said = []
    prompts = {run.name: run.details["prompts"] for run in runs}
    sets = {frozenset(pc.unique(run.table["prompt_id"]).to_pylist()) for run in runs if run.table is not None}
    if len(set(prompts.values())) > 1 or len(sets) > 1:
        said.append("the methods were not asked the same prompts: " + ", ".join(f"{name} {count}" for name, count in prompts.items()))
    if len(sets) > 1 and not frozenset.intersection(*sets):
        said.append("no prompt was answered by all of them, so no answers are shown side by side")
    grids = {run.name: run.details["controls"] for run in runs if run.details["method"] != "system"}
    if len(set(map(tuple, grids.values()))) > 1:
        counts = ", ".join(f"{name} {len(controls)}" for name, controls in grids.items())
        said.append(f"the methods were not asked under the same controls: {counts}")
    return said


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 48 s, 12 min, 3.4 h."""
    if seconds is None:
        return ABSENT
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def percent(share: float | None) -> str:
    """A share with one decimal."""
    return ABSENT if share is None else f"{100 * share:.1f} %"


def tint(value: float) -> str:
    """Background of a correlation in the heat map: white at 0, blue towards 1, vermilion towards -1; light enough for dark text."""
    colour, strength = (_COOL if value >= 0 else _WARM), min(abs(value), 1) * 0.6
    return "rgb({}, {}, {})".format(*(round(255 + (part - 255) * strength) for part in colour))


def one_line(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _judges(runs: Sequence[Evaluated]) -> list[str]:
    return [judge for judge in JUDGES if any(judge in run.metrics for run in runs)]


def _study_tables(study: Study, found: Exhibits) -> Mapping[str, list[Row]]:
    """The study's comparison for each set of reward models; before anything is evaluated, an empty one for the first."""
    methods = [_method(run) if run else Method(name, "not evaluated yet", None) for name, run in study.rows]
    return {judge: comparison(methods, judge, found.attributes) for judge in _judges([run for _, run in study.rows if run]) or JUDGES[:1]}


def _template_tables(run: Evaluated) -> dict[str, list[Row]]:
    """All templates of a prompting run, for each set of reward models."""
    counts = run.details["best_template"]
    methods = [
        Method(f"template {t['template']}", "counts" * (t["template"] == counts), t["metrics"], run.attributes.names)
        for t in run.details["templates"]
    ]
    return {judge: comparison(methods, judge, run.attributes) for judge in run.judged}


def _method(run: Evaluated) -> Method:
    """A run's row, with what must be known to read it."""
    if not run.details:
        return Method(run.name, "", run.metrics, run.attributes.names)
    method, best = run.details["method"], run.details["best_template"]
    notes = {"prompting": f"best of {len(run.details['templates'])} templates: {best}", "system": "system prompts, ask for safety alone"}
    constant = [
        f"{a.noun} scores are constant for {share:.0%} of the prompts"
        for a in run.attributes
        if method != "system" and (share := next(iter(run.judged.values()))[a.name]["constant"]) >= 0.05
    ]
    note = "; ".join([*([notes[method]] if method in notes else []), *constant])
    return Method(run.name, note, run.metrics, ("harmless",) if method == "system" else run.attributes.names)
