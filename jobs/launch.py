"""Starting a job from the command line: its options, its exit codes, and stopping it without losing work."""

import signal
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from ctrlrl.data.disk import storage_error
from ctrlrl.errors import CtrlrlError

Recipe = Annotated[str, typer.Option(help="TOML recipe; see jobs/recipes/.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override one recipe key, such as policy.train.learning_rate=1e-5. Repeatable.")
]
Out = Annotated[str, typer.Option(help="Run directory (the recipe's `out`).")]
Data = Annotated[str, typer.Argument(help="Directory of ctrlrl generate.")]
SkipBadRows = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Set bad rows and overlong prompts aside in rejects.jsonl (the recipe's `skip_bad_rows`).")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in the run directory.")]

EXIT_MISTAKE = 2


def run_job(
    kind: type,
    job: Callable,
    recipe: str,
    overrides: list[str] | None,
    out: str = "",
    options: Mapping[str, Any] | None = None,
    **arguments,
) -> int:
    """Read the recipe and run `job(config, **arguments)`; a user's mistake becomes one message and exit code 2.

    out, options: recipe keys that have options of their own on the command line; an empty one was not given.
    """
    from ctrlrl.config import load  # here, because pydantic would double the command line's start

    with mistakes_told():
        given = {key: value for key, value in {"out": out, **(options or {})}.items() if value}
        return job(load(kind, recipe or None, overrides or [], options=given), **arguments) or 0


class mistakes_told:  # noqa: N801 (reads as a statement: `with mistakes_told():`)
    """Context in which a CtrlrlError, or a disk's refusal, is printed without traceback and ends the process with exit code 2."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        error = storage_error(error) or error  # of whatever library or worker
        if isinstance(error, CtrlrlError):
            print(f"ctrlrl: {error}", file=sys.stderr, flush=True)
            raise SystemExit(EXIT_MISTAKE) from None


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag that the job's loop looks at; a second SIGINT interrupts at once."""

    def __init__(self, until: str = "this step"):
        self.signal, self._until = 0, until
        self._previous = {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self):
        return self.signal != 0

    @property
    def exit_code(self) -> int:
        """The shell's code for a process that a signal ended, 0 if none came."""
        return 128 + self.signal if self.signal else 0

    def _note(self, number, _frame):
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        print(f"\nctrlrl: stopping after {self._until} (Ctrl-C again to stop at once)", file=sys.stderr, flush=True)
