"""Progress of long work: a bar on a terminal, lines in a log."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Steps:
    """Shows `done` of `total` steps with a line of figures; on a terminal it redraws one bar, in a log it prints a line each time."""

    def __init__(self, title: str, total: int, done: int = 0):
        self._title, self._total, self._first, self._done = title, total, done, done
        self._began = time.monotonic()
        self._bar = None
        if sys.stdout.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            self._bar = Progress(*columns, console=Console(), refresh_per_second=4)
            self._task = self._bar.add_task(title, total=total, completed=done, figures="")

    def __enter__(self):
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_):
        if self._bar:
            self._bar.stop()

    def advance(self, figures: str) -> None:
        """One step is done."""
        self._done += 1
        if self._bar:
            self._bar.update(self._task, completed=self._done, figures=figures)
            return
        spent = time.monotonic() - self._began
        left = spent / (self._done - self._first) * (self._total - self._done)
        print(f"{self._title} {self._done}/{self._total}  {figures}  {spent:.0f} s, {left:.0f} s left", flush=True)
