"""Starting a job from the command line: its options, its exit codes, and stopping it without losing work."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
# Of ctrlrl plan.
RecipeFile = Annotated[str, typer.Argument(help="TOML recipe of ctrlrl ppo; see jobs/recipes/.")]
GpuGib = Annotated[float, typer.Option(help="Memory of a GPU in GiB.", min=1)]
Gpus = Annotated[int, typer.Option(help="GPUs that there are; 0: as many as the recipe asks for.", min=0)]
BesideGib = Annotated[float, typer.Option(help="GiB of a GPU that CUDA itself takes for each worker on it.", min=0)]
Sizes = Annotated[
    list[str] | None,
    typer.Option(help="Size of a model that is not on this machine: 8b, or policy.model=hidden=4096,layers=32,… Repeatable."),
]

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT
_GRACE_S = 3.0  # for an interrupted job to end its workers and close its files
_interrupted = threading.Event()  # once this process is to stop at once


def run_job(
    kind: type,
    job: Callable,
    recipe: str,
    overrides: list[str] | None,
    out: str = "",
    options: Mapping[str, Any] | None = None,
    **arguments,
) -> int:
    """Read the recipe, or settings that fit, and run `job(config, **arguments)`; a user's mistake becomes one message and exit code 2.

    out, options: recipe keys that have options of their own on the command line; an empty one was not given.
    """
    from jobs.parts.settings import settled  # here, because pydantic would double the command line's start

    with mistakes_told():
        given = {key: value for key, value in {"out": out, **(options or {})}.items() if value}
        return job(settled(kind, recipe, overrides or [], given, resume=bool(arguments.get("resume"))), **arguments) or 0


class mistakes_told:  # noqa: N801 (reads as a statement: `with mistakes_told():`)
    """Context of a command: a CtrlrlError, or a disk's refusal, is printed without traceback and ends the process with exit code 2, an
    interrupt with 130.

    After an interrupt that is to stop at once the process ends within seconds, whatever it waits for: its workers end with it, and all
    files are written so that a killed process leaves none half-written.
    """

    def __enter__(self):
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _stop_at_once)
        return self

    def __exit__(self, kind, error, traceback):
        if signal.getsignal(signal.SIGINT) is _stop_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        error = storage_error(error) or error  # of whatever library or worker
        if isinstance(error, CtrlrlError):
            print(f"ctrlrl: {error}", file=sys.stderr, flush=True)
            raise SystemExit(EXIT_MISTAKE) from None
        if isinstance(error, KeyboardInterrupt):
            print("ctrlrl: stopped at once; the same command (of a training: with --resume) goes on from what is there", file=sys.stderr)
            if _interrupted.is_set():
                # Here rather than by sys.exit: while an interpreter takes its modules apart, for seconds, no timer runs that could end it.
                try:
                    sys.stdout.flush()
                    atexit._run_exitfuncs()
                finally:
                    os._exit(EXIT_INTERRUPTED)
            raise SystemExit(EXIT_INTERRUPTED) from None


def _stop_at_once(_number, _frame):
    """Interrupt what the main thread does; should its end, or that of another thread, not come soon, end the process."""
    _interrupted.set()
    end = threading.Timer(_GRACE_S, os._exit, [EXIT_INTERRUPTED])
    end.daemon = True
    end.start()
    raise KeyboardInterrupt


@contextmanager
def background(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for calls that go on beside the job's own. Calls under way are waited for at the end, but not after an interrupt; those
    that have not begun are not begun after an error."""
    executor = ThreadPoolExecutor(threads)
    try:
        yield executor
    except BaseException as error:
        executor.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
        raise
    executor.shutdown()


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag that the job's loop looks at; a second SIGINT interrupts at once, as one does outside
    of this context."""

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

    def _note(self, number, frame):
        if self.signal and number == signal.SIGINT:
            before = self._previous[number]
            (before if callable(before) else signal.default_int_handler)(number, frame)
        self.signal = number
        print(f"\nctrlrl: stopping after {self._until} (Ctrl-C again to stop at once)", file=sys.stderr, flush=True)
