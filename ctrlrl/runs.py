"""Run directories: the resolved recipe, metrics as they come (JSON lines, TensorBoard), and checkpoints that are whole or absent."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from ctrlrl.config import Section, differences, dump
from ctrlrl.data.atomic import remove_directory, write_directory, write_text
from ctrlrl.errors import RunError
from ctrlrl.evaluation.files import TRAINING, read_rows


class Run:
    """One run's directory. Layout: recipe.json, metrics.jsonl, tensorboard/, checkpoints/step-N/, checkpoints/latest, model/."""

    def __init__(self, directory: Path, recipe: str, keep: int):
        self.directory, self._recipe, self._keep = directory, recipe, keep
        self._metrics = self._board = None

    @classmethod
    def open(cls, out: str, config: Section, *, resume: bool, keep: int = 2, free: tuple[str, ...] = ()) -> "Run":
        """A run in `out`, new or continued; nothing is written before `begin`. free: recipe keys that may change at resume.

        RunError: it is in use already and `resume` is not asked; another recipe is being resumed; a relative path in a submitted job.
        """
        directory = absolute_out(out)
        recipe = directory / "recipe.json"
        if recipe.exists() and not resume:
            raise RunError(f"{out!r} holds a run already: add --resume to continue it, or give another out")
        if recipe.exists():
            old, new = json.loads(recipe.read_text()), json.loads(dump(config))
            changed = [d for d in differences(old, new) if not d.startswith(tuple(f"{key}{end}" for key in free for end in ":."))]
            if changed:
                raise RunError(f"{out!r} was started with another recipe ({'; '.join(changed)}): undo the change, or give another out")
        return cls(directory, dump(config) + "\n", keep)

    def begin(self) -> None:
        """Make the directory, write the resolved recipe, open the metrics."""
        output_directory(str(self.directory))
        write_text(self.directory / "recipe.json", self._recipe)
        self._metrics = (self.directory / "metrics.jsonl").open("a")
        self._board = SummaryWriter(str(self.directory / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one row of metrics and show it in TensorBoard."""
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        """Make checkpoints/step-N with `write(folder)`, then point `latest` at it; older ones beyond `keep` are removed."""
        folder = self.directory / "checkpoints"
        folder.mkdir(exist_ok=True)
        final = folder / f"step-{step:06d}"
        write_directory(final, write)
        write_text(folder / "latest", final.name + "\n")
        for old in sorted(folder.glob("step-*"), key=_step_of)[: -self._keep]:
            remove_directory(old)

    def whole_directory(self, name: str, write: Callable[[Path], None]) -> None:
        """Make the directory `name` with `write(folder)`; an earlier one is replaced."""
        write_directory(self.directory / name, write)

    def latest(self) -> tuple[int, Path] | None:
        """(steps done, folder) of the last whole checkpoint, and metrics cut back to it; None if there is none."""
        pointer = self.directory / "checkpoints" / "latest"
        if not pointer.exists():
            self._cut_metrics(0)
            return None
        name = pointer.read_text().strip()
        folder = pointer.parent / name
        if not folder.is_dir():
            raise RunError(f"{str(pointer)!r} names {name!r}, which is missing: restore it, or start a new run")
        step = _step_of(folder)
        self._cut_metrics(step)
        return step, folder

    def close(self) -> None:
        """Flush and close the metrics."""
        if self._metrics:
            self._metrics.close()
            self._board.close()

    def _cut_metrics(self, step: int) -> None:
        """Drop rows of steps that will be done again, so that each step appears once."""
        path = self.directory / "metrics.jsonl"
        self._metrics.close()
        rows = [line for line in path.read_text().splitlines() if line and json.loads(line)["step"] < step]
        write_text(path, "".join(row + "\n" for row in rows))
        self._metrics = path.open("a")


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def absolute_out(out: str) -> Path:
    """`out` as an absolute path; RunError for a relative path in a submitted job."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not Path(out).is_absolute():
        raise RunError(
            f"out = {out!r} is relative: a submitted job runs in a temporary copy, where its results would be lost; give an absolute path"
        )
    try:
        return Path(out).expanduser().absolute()
    except RuntimeError as error:  # the home of nobody
        raise RunError(f"out = {out!r}: {error} Write ./{out} if it is the name of a folder") from None


def output_directory(out: str) -> Path:
    """The absolute directory of a job's results, made if need be; RunError if it cannot be."""
    directory = absolute_out(out)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"out = {out!r} cannot be made: {error.strerror}; give a directory that can be written") from error
    return directory


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """Rows of a run's metrics.jsonl."""
    return read_rows(directory / TRAINING)
