"""Fit quantile calibrations to the raw outputs of reward models on a self-generation directory (METHOD, score calibration).

python jobs/calibrate.py runs/generated --out runs/calibration
"""

from pathlib import Path
from typing import Annotated

import typer

from ctrlrl.config import Section
from ctrlrl.data.calibration import Calibration, fit_quantile, load_calibration, raw_outputs
from ctrlrl.data.generation import OPTIMISATION, Layout
from ctrlrl.errors import DataError, RunError
from ctrlrl.runs import absolute_out, only_writer
from jobs.parts.launch import Data, mistakes_told

Name = Annotated[str, typer.Option("--scores", help="Which set of scores: that of ctrlrl generate, or a name of ctrlrl score.")]
Folder = Annotated[str, typer.Option(help="Directory for helpful.json and harmless.json.")]


class CalibrateRecipe(Section):
    """What is calibrated: the set `scores` of the samples in `data`."""

    out: str = "runs/calibration"
    data: str
    scores: str = OPTIMISATION


def calibrate(config: CalibrateRecipe) -> int:
    """Write one calibration file per attribute and print how it is used; returns the exit code."""
    absolute_out(config.out)
    for path, (calibration, told) in fitted(config).items():
        with only_writer(config.out):
            calibration.save(path)
        print(f"{path.stem}: {told}, {len(calibration.knots)} knots")
        print(f"  --set reward.{path.stem}.calibration=quantile --set reward.{path.stem}.calibration_file={path}")
    return 0


def is_finished(config: CalibrateRecipe) -> bool:
    """Whether the files are there, and what would be fitted now."""
    if not Layout(absolute_out(config.data)).finished:
        return False
    now = fitted(config)
    return all(path.exists() and load_calibration(path) == calibration for path, (calibration, _) in now.items())


def fitted(config: CalibrateRecipe) -> dict[Path, tuple[Calibration, str]]:
    """The calibration of every attribute and what it was fitted on, by the file that it belongs in."""
    layout, found = Layout(absolute_out(config.data)).existing(), {}
    sets = layout.score_sets()
    if config.scores not in sets:
        raise RunError(f"{config.data!r} has no scores {config.scores!r}; it has {', '.join(sets) or 'none'}: run ctrlrl score")
    for attribute in sets[config.scores]:
        store = layout.scores(config.scores, attribute)
        raw = raw_outputs(store)
        if raw is None:
            raise DataError(f"{store.directory} keeps no raw outputs: score these samples anew")
        calibration = fit_quantile(raw, model=store.fingerprint.get("reward", {}).get("sha256", ""))
        unscored = store.manifest()["rows"] - len(raw)
        told = f"{len(raw):,} outputs from {raw.min():.3f} to {raw.max():.3f}"
        told += f" ({unscored:,} answers without one left out)" if unscored else ""
        found[absolute_out(config.out) / f"{attribute}.json"] = calibration, told
    return found


def main(data: Data, out: Folder, scores: Name = OPTIMISATION) -> None:
    """Fit quantile calibrations to the raw outputs of a set of scores."""
    with mistakes_told():
        raise typer.Exit(calibrate(CalibrateRecipe(data=data, scores=scores, out=out)))


if __name__ == "__main__":
    typer.run(main)
