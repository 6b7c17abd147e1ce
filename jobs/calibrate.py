"""Fit quantile calibrations to the raw outputs of reward models on a self-generation directory (METHOD, score calibration).

python jobs/calibrate.py runs/generated --out runs/calibration
"""

from typing import Annotated

import typer

from ctrlrl.data.calibration import fit_quantile, raw_outputs
from ctrlrl.data.generation import OPTIMISATION, Layout
from ctrlrl.errors import DataError, RunError
from ctrlrl.runs import absolute_out, only_writer
from jobs.parts.launch import Data, mistakes_told

Name = Annotated[str, typer.Option("--scores", help="Which set of scores: that of ctrlrl generate, or a name of ctrlrl score.")]
Folder = Annotated[str, typer.Option(help="Directory for helpful.json and harmless.json.")]


def calibrate(data: str, scores: str, out: str) -> int:
    """Write one calibration file per attribute and print how it is used; returns the exit code."""
    layout = Layout(absolute_out(data)).existing()
    sets = layout.score_sets()
    if scores not in sets:
        raise RunError(f"{data!r} has no scores {scores!r}; it has {', '.join(sets) or 'none'}: run ctrlrl score")
    absolute_out(out)
    for attribute in sets[scores]:
        store = layout.scores(scores, attribute)
        raw = raw_outputs(store)
        if raw is None:
            raise DataError(f"{store.directory} keeps no raw outputs: score these samples anew")
        calibration = fit_quantile(raw, model=store.fingerprint.get("reward", {}).get("sha256", ""))
        path = absolute_out(out) / f"{attribute}.json"
        with only_writer(out):
            calibration.save(path)
        print(f"{attribute}: {len(raw):,} outputs from {raw.min():.3f} to {raw.max():.3f}, {len(calibration.knots)} knots")
        print(f"  --set reward.{attribute}.calibration=quantile --set reward.{attribute}.calibration_file={path}")
    return 0


def main(data: Data, out: Folder, scores: Name = OPTIMISATION) -> None:
    """Fit quantile calibrations to the raw outputs of a set of scores."""
    with mistakes_told():
        raise typer.Exit(calibrate(data, scores, out))


if __name__ == "__main__":
    typer.run(main)
