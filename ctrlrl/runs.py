"""Run directories: the resolved recipe, metrics as they come (JSON lines, TensorBoard), and checkpoints that are whole or absent."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ctrlrl.board import Board
from ctrlrl.config import Section, completed, differences, dump
from ctrlrl.data.atomic import append_whole, clear_leftovers, remove_directory, write_directory, write_text
from ctrlrl.data.disk import disk_told
from ctrlrl.data.lock import DirectoryLock
from ctrlrl.errors import DataError, RunError
from ctrlrl.evaluation.files import RECIPE, TRAINING, is_result, read_rows

_STEP = re.compile(r"step-(\d{6,})")
_MODEL = "model"
_ALIKE = '.layout: "packed" -> "auto"'  # what had to be packed is packed by itself


class Run:
    """One run's directory. Layout: recipe.json, metrics.jsonl, tensorboard/, checkpoints/step-N/, checkpoints/latest, model/.

    It has one writer at a time (ctrlrl.data.lock), from `open` to `close`. A context: `close` at its end.
    """

    def __init__(self, directory: Path, recipe: str, keep: int):
        self.directory, self._recipe, self._keep = directory, recipe, keep
        self._checkpoints, self._metrics_file = directory / "checkpoints", directory / TRAINING
        self._metrics = self._board = None
        self._lock = DirectoryLock(directory).take()

    @classmethod
    def open(cls, out: str, config: Section, *, resume: bool, keep: int = 2, free: tuple[str, ...] = ()) -> "Run":
        """A run in `out`, new or continued; nothing but its lock is written before `begin`. free: recipe keys that may change at resume, as
        `out` may: a run's directory may be moved.

        RunError: another process writes there; it is in use already and `resume` is not asked; another recipe is being resumed; a
        relative path in a submitted job.
        """
        directory = absolute_out(out)
        _refuse_inside_a_run(directory)
        run = cls(directory, dump(config) + "\n", keep)
        try:
            recipe = directory / RECIPE
            if recipe.exists() and not resume:
                raise RunError(f"{out!r} holds a run already: add --resume to continue it, or give another out")
            if recipe.exists():
                old, new = completed(type(config), recipe.read_text()), json.loads(dump(config))
                found = [d for d in differences(old, new) if not d.endswith(_ALIKE)]
                changed = [d for d in found if not d.startswith(tuple(f"{key}{end}" for key in (*free, "out") for end in ":."))]
                if changed:
                    raise RunError(f"{out!r} was started with another recipe ({'; '.join(changed)}): undo the change, or give another out")
        except BaseException:
            run.close()
            raise
        return run

    def begin(self) -> None:
        """Put right what a killed writer left, write the resolved recipe, open the metrics."""
        clear_leftovers(self.directory, lambda name: name == _MODEL or is_result(name))
        self._clear_checkpoints()
        write_text(self.directory / RECIPE, self._recipe)
        with disk_told(self._metrics_file):
            self._metrics = self._metrics_file.open("ab", buffering=0)
            self._board = Board(self.directory / "tensorboard")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one row of metrics, whole or not at all, and show it in TensorBoard."""
        with disk_told(self._metrics_file):
            append_whole(self._metrics, (json.dumps({"step": step, **values}) + "\n").encode())
            self._board.add(step, values)

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        """Make checkpoints/step-N with `write(folder)`, then point `latest` at it; older ones beyond `keep` are removed."""
        self._lock.check()
        with disk_told(self._checkpoints):
            self._checkpoints.mkdir(exist_ok=True)
            self._clear_checkpoints()
            os.fsync(self._metrics.fileno())  # the rows of the steps that it holds
        final = self._checkpoints / f"step-{step:06d}"
        write_directory(final, write)
        write_text(self._checkpoints / "latest", final.name + "\n")
        self._prune(step)

    def whole_directory(self, name: str, write: Callable[[Path], None]) -> None:
        """Make the directory `name` with `write(folder)`; an earlier one is replaced."""
        self._lock.check()
        write_directory(self.directory / name, write)

    def latest(self) -> tuple[int, Path] | None:
        """(steps done, folder) of the checkpoint to go on from, and metrics cut back to it; None if there is none.

        That is the one that `latest` names, or, if it is gone or was never named, the newest that the metrics reach to. RunError if there
        is no such one.
        """
        pointer, found, rows = self._checkpoints / "latest", self._whole(), read_metrics(self.directory)
        name = pointer.read_text(errors="replace").strip() if pointer.exists() else ""
        step = next((made for made, folder in found.items() if folder.name == name), None)
        if step is not None:
            self._prune(step)  # a run that was killed had not come to it
        if step is None and (found or name):
            last = max((row.get("step", -1) for row in rows), default=None)
            step = max((made for made in found if last is None or made <= last + 1), default=None)
            lack = f"{str(pointer)!r} names {name!r}, which is missing" if name else f"{str(pointer)!r} is missing"
            if step is None:
                raise RunError(f"{lack}: restore it, or start a new run")
            print(f"ctrlrl: {lack}: going on from {found[step].name}, the newest whole checkpoint", file=sys.stderr, flush=True)
        self._cut_metrics(step or 0)
        return None if step is None else (step, found[step])

    def close(self) -> None:
        """Flush and close the metrics, and let another process write; a directory that holds nothing yet is removed."""
        try:
            if self._metrics:
                self._metrics.close()
            if self._board:
                self._board.close()
        finally:
            self._metrics = self._board = None
            self._lock.release()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _whole(self) -> dict[int, Path]:
        """The checkpoints by step; they bear their names since they were whole. Whatever else lies there is not ours."""
        entries = self._checkpoints.iterdir() if self._checkpoints.is_dir() else []
        named = {int(match[1]): entry for entry in entries if (match := _STEP.fullmatch(entry.name)) and entry.is_dir()}
        return {step: entry for step, entry in named.items() if entry.name == f"step-{step:06d}"}

    def _clear_checkpoints(self) -> None:
        clear_leftovers(self._checkpoints, lambda name: name == "latest" or _STEP.fullmatch(name) is not None)

    def _prune(self, step: int) -> None:
        """Keep the checkpoint of `step`, which `latest` names, and those before it that are to be kept.

        One beyond it is what a killed run made and did not come to name: it stays until that step is done again.
        """
        older = [folder for made, folder in sorted(self._whole().items()) if made < step]
        for folder in older[: max(0, len(older) + 1 - self._keep)]:
            remove_directory(folder)

    def _cut_metrics(self, step: int) -> None:
        """Drop rows of steps that will be done again, so that each step appears once, and a last row that was cut off."""
        self._metrics.close()
        rows = read_metrics(self.directory)
        if any("step" not in row for row in rows):
            raise DataError(f"{self._metrics_file} has a row without a step: it is no file of a run, or damaged; take the row out")
        kept = [json.dumps(row) + "\n" for row in rows if row["step"] < step]
        write_text(self._metrics_file, "".join(kept))
        self._metrics = self._metrics_file.open("ab", buffering=0)


def _refuse_inside_a_run(directory: Path) -> None:
    """RunError if `directory` lies in a part of a run that is replaced as a whole."""
    for folder in (directory, *directory.parents):
        if folder.name in ("checkpoints", _MODEL) and (folder.parent / RECIPE).exists() and (folder.parent / TRAINING).exists():
            raise RunError(
                f"{str(directory)!r} lies in {folder.name!r} of a run, which replaces it whole: give another out"
            )


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


@contextmanager
def only_writer(out: str) -> Iterator[Path]:
    """The absolute directory of a job's results, of which this process is the one writer; what a killed one left is removed.

    RunError if another process writes there (it is named), if it cannot be made, or lies in a run's checkpoints or model.
    """
    directory = absolute_out(out)
    _refuse_inside_a_run(directory)
    with DirectoryLock(directory):
        clear_leftovers(directory, is_result)
        yield directory


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """Rows of a run's metrics.jsonl, as read_rows."""
    return read_rows(directory / TRAINING)
