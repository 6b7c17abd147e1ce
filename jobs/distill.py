"""Distillation ([SH] section 2.3): from a self-generation directory to a training table of prompts, controls and answers.

python jobs/distill.py runs/generated --method moec --out runs/moec
"""

from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import Field

from ctrlrl.attributes import Attributes
from ctrlrl.config import Section
from ctrlrl.data.calibration import fit_to_store, fit_within_prompts
from ctrlrl.data.distill import REPORT, TABLE, ScoredSamples, calibrated_by, shards_of
from ctrlrl.data.distill import distill as distil_shards
from ctrlrl.data.generation import OPTIMISATION, Layout
from ctrlrl.data.outlook import few_kept
from ctrlrl.errors import DataError, RunError
from ctrlrl.evaluation.files import read_json
from ctrlrl.evaluation.plots import score_distribution
from ctrlrl.runs import absolute_out, only_writer
from jobs.parts.launch import Data, Out, Recipe, Set, run_job

Method = Annotated[str, typer.Option(help="vanilla, oversampling or moec.")]
Calibrate = Annotated[str, typer.Option(help="Spread the stored outputs of the reward models over [0, 1] first: quantile, or prompt.")]
PICTURE = "scores.png"
LEAST = 0.01  # of the prompts: a table of fewer teaches nothing


class DistillRecipe(Section):
    """What is distilled, how, and where to. scores: which set of scores. memory_gib: what grouping by prompt may use. calibrate: takes, in
    place of the scores, the raw outputs that are stored with them: "quantile", each attribute's calibrated by its own quantiles; "prompt",
    by their place among the answers to the same prompt, 0 the lowest and 1 the highest."""

    data: str
    out: str = "runs/distilled"
    scores: str = OPTIMISATION
    method: Literal["vanilla", "oversampling", "moec"] = "moec"
    seed: int = 0
    per_cell: int = Field(1, gt=0)
    precision: int = Field(4, ge=1, le=6)
    memory_gib: float = Field(1.0, gt=0)
    calibrate: Literal["", "quantile", "prompt"] = ""


def distill(config: DistillRecipe) -> int:
    """Write train.parquet, report.json and scores.png, and print the report."""
    layout = Layout(absolute_out(config.data)).existing()
    sets = layout.score_sets()
    whole = [name for name, scored in sets.items() if set(scored) == set(layout.attributes(name).names)]
    if config.scores not in whole:
        of = layout.attributes(config.scores).names
        have = f"has no scores {config.scores!r} for {'both' if len(of) == 2 else 'all'} attributes; it has {', '.join(whole) or 'none'}"
        raise RunError(f"{config.data!r} {have}: run ctrlrl score")
    source = source_of(config)
    source.samples.manifest()  # an unfinished directory is refused before anything is made
    settings = config.model_dump(include={"method", "seed", "per_cell", "precision"})
    with only_writer(config.out) as out:
        source = calibrated(source, config)
        report = distil_shards(source, out, memory=int(config.memory_gib * 2**30), **settings)
        pictures = draw_scores(report, out, source.attributes)
        if report["prompts"]["after"] < LEAST * report["prompts"]["before"]:
            (out / REPORT).unlink()  # without it the table does not count
            raise DataError(f"{few_kept(report)}. {' and '.join(map(str, pictures)) or out} shows the scores")
        print("\n".join(report_lines(report, out, pictures)), flush=True)
    return 0


def calibrated(source: ScoredSamples, config: DistillRecipe) -> ScoredSamples:
    """The samples with the scores that the recipe asks for; DataError if their raw outputs are not stored, or all the same."""
    if not config.calibrate:
        return source
    fit = fit_to_store if config.calibrate == "quantile" else fit_within_prompts
    maps = {a: fit(store) for a, store in source.stores.items() if a != "samples"}
    for attribute, fitted in maps.items():
        if fitted is None:
            folder = source.stores[attribute].directory
            raise DataError(f"{folder} keeps no raw outputs, or only one: score these samples anew, or leave out --calibrate")
    return ScoredSamples(source.samples, *source.scores, source.prompts, maps=maps, attributes=source.attributes)


def source_of(config: DistillRecipe) -> ScoredSamples:
    """The stores that are distilled."""
    layout = Layout(absolute_out(config.data))
    attributes = layout.attributes(config.scores)
    scores = tuple(layout.score_stores(config.scores).values())
    return ScoredSamples(layout.samples(), *scores, layout.prompts, attributes=attributes)


def is_finished(config: DistillRecipe) -> bool:
    """Whether the table is there, and made from the shards that are there (a report of an older version does not say of which)."""
    report = read_json(absolute_out(config.out) / REPORT)
    source = source_of(config)
    if report is None or not all(store.finished for store in source.stores.values()) or config.calibrate != calibrated_by(report):
        return False
    return report.get("shards", shards_of(source)) == shards_of(source)


def draw_scores(report: dict, out: Path, attributes: Attributes) -> list[Path]:
    """Draw the joint distribution of every pair of scores; returns the pictures."""
    found, extremes = report["histogram"], report["classes"]["extreme"]
    if len(attributes) == 2:
        return [score_distribution(found, out / PICTURE, extremes=extremes)]
    return [
        score_distribution(histogram, out / f"scores-{pair.replace(' with ', '-')}.png", extremes=extremes, pair=pair_of(attributes, pair))
        for pair, histogram in found.items()
    ]


def pair_of(attributes: Attributes, pair: str) -> Attributes:
    """The two attributes that a report calls `pair`, "a with b"."""
    return Attributes(tuple(a for a in attributes if a.name in pair.split(" with ")))


def report_lines(report: dict, out: Path, pictures: list[Path]) -> list[str]:
    """The report as a table of classes, and its figures."""
    rows, prompts, classes = report["rows"], report["prompts"], report["classes"]
    kept = f"{prompts['after']:,} of {prompts['before']:,} prompts kept ({prompts['share']:.1%})"
    lines = [f"{report['method']}: {rows['before']:,} samples -> {rows['after']:,} rows, {kept}"]
    lines += [f"{report['unscored']:,} samples without all their scores were left out"] if report.get("unscored") else []
    width = max(30, *(len(name) + 2 for name in classes["before"]))
    lines.append(f"{'class':{width}}{'before':>12}{'extreme':>12}{'after':>12}")
    for name in classes["before"]:
        lines.append(f"{name:{width}}" + "".join(f"{classes[when][name]:12,}" for when in ("before", "extreme", "after")))
    joint = report["entanglement"]
    for pair, entanglement in ({"helpful with harmless": joint} if "pearson" in joint else joint).items():
        lines.append(f"{pair}: Pearson {entanglement['pearson']:.3f}, Spearman {entanglement['spearman']:.3f}")
    return [*lines, *(str(path) for path in (out / TABLE, out / REPORT, *pictures))]


def main(
    data: Data,
    method: Method = "",
    recipe: Recipe = "",
    overrides: Set = None,
    out: Out = "",
    calibrate: Calibrate = "",
) -> None:
    """Distil a self-generation directory into a training table."""
    options = {"data": data, "method": method, "calibrate": calibrate}
    raise typer.Exit(run_job(DistillRecipe, distill, recipe, overrides, out, options))


if __name__ == "__main__":
    typer.run(main)
