"""Progress of long work: a bar on a terminal, lines in a log; and where the time goes."""

import sys
import threading
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LINE_EVERY_S = 2.0  # in a log, but for the first and the last line
_WITHIN_EVERY_S = 15.0  # in a log, of what happens within a step


class Steps:
    """Shows `done` of `total` steps with a line of figures; on a terminal it redraws one bar, in a log it prints lines."""

    def __init__(self, title: str, total: int, done: int = 0):
        self._title, self._total, self._first, self._done = title, total, done, done
        self._began, self._told, self._figures = time.monotonic(), 0.0, ""
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

    @property
    def done(self) -> int:
        """Steps done."""
        return self._done

    def begin_at(self, done: int) -> None:
        """Go on, or begin anew, from this many steps."""
        self._first = self._done = done
        self._began = time.monotonic()

    def advance(self, figures: str) -> None:
        """One step is done."""
        self._done, self._figures = self._done + 1, figures
        if self._bar:
            self._bar.update(self._task, completed=self._done, figures=figures)
            return
        now = time.monotonic()
        if now - self._told < _LINE_EVERY_S and self._done < self._total:
            return
        self._told, spent = now, now - self._began
        left = spent / (self._done - self._first) * (self._total - self._done)
        print(f"{self._title} {self._done}/{self._total}  {figures}  {spent:.0f} s, {left:.0f} s left", flush=True)

    def within(self, text: str) -> None:
        """Something has happened within the running step; a log gets a line when it has had none for long. From any thread."""
        if self._bar:
            self._bar.update(self._task, figures=f"{self._figures}  [{text}]".strip())
        elif time.monotonic() - self._told >= _WITHIN_EVERY_S:
            self._told = time.monotonic()
            print(f"{self._title} {self._done}/{self._total}  step {self._done + 1}: {text}", flush=True)


class Answers:
    """What has come of the answers of one step, told within its progress: drawn and scored of how many, tokens/s, seconds left until the
    last one is scored. whose: which batch they are, where it is not that of the running step. From any thread."""

    def __init__(self, progress: Steps, total: int, whose: str = ""):
        self._progress, self._total, self._whose, self._began = progress, total, whose, time.monotonic()
        self._drawn = self._scored = self._tokens = 0
        self._lock = threading.Lock()
        progress.within(self.told())

    def drawn(self, count: int, tokens: int) -> None:
        """So many more are drawn, with so many tokens."""
        with self._lock:
            self._drawn, self._tokens = self._drawn + count, self._tokens + tokens
            self._progress.within(self.told())

    def scored(self, count: int) -> None:
        """So many more are scored."""
        with self._lock:
            self._scored += count
            self._progress.within(self.told())

    def told(self) -> str:
        """Where the step is."""
        spent, done = max(time.monotonic() - self._began, 1e-9), self._drawn + self._scored
        text = f"{self._whose}{self._drawn} of {self._total} answers drawn, {self._scored} scored"
        if not done:
            return text
        return f"{text}  {self._tokens / spent:,.0f} tokens/s  {spent / done * (2 * self._total - done):.0f} s left"


class Clock:
    """Seconds of the phases of one step, one after the other."""

    def __init__(self):
        self._seconds, self._phase, self._since, self._began = {}, "prepare", time.perf_counter(), time.perf_counter()

    def start(self, phase: str) -> None:
        """End the current phase and begin the next."""
        self.stop()
        self._phase = phase

    def stop(self) -> None:
        """End the current phase."""
        now = time.perf_counter()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._since = now

    def metrics(self, tokens: int) -> dict[str, float]:
        """Seconds by phase, of the whole step, and tokens/s of those phases that handle each response token."""
        seconds = self.seconds()
        total = seconds["seconds/step"]
        rates = {f"tokens_per_s/{phase}": tokens / self._seconds[phase] for phase in ("generate", "train") if phase in self._seconds}
        return {**seconds, **rates, "tokens_per_s/step": tokens / total}

    def seconds(self) -> dict[str, float]:
        """Seconds by phase and of the whole step."""
        phases = {f"seconds/{phase}": s for phase, s in self._seconds.items()}
        return {**phases, "seconds/step": time.perf_counter() - self._began}
