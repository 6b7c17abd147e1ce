"""`ctrlrl chat`: talk to a model in the terminal and turn its dial.

A model of this machine is served by a `ctrlrl serve` of its own, with a key that only this process knows: the prompts, the engine and the
limits are the server's. --url talks to one that runs already. Without a terminal each line of standard input is a message.
"""

import contextlib
import ctypes
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ctrlrl.errors import DataError, RecipeError, RunError
from jobs.parts.launch import EXIT_INTERRUPTED, Set, mistakes_told

_STOP_S = 15.0  # for a server to end its engine
_PARENT_DEATH_SIGNAL = 1  # Linux: prctl(PR_SET_PDEATHSIG)


def main(
    model: Annotated[str, typer.Argument(help="Model to talk to: a directory such as runs/mine/model, or a hub name.")] = "",
    helpful: Annotated[float | None, typer.Option(help="Level of helpfulness, from 0 to 1.")] = None,
    harmless: Annotated[float | None, typer.Option(help="Level of safety, from 0 to 1.")] = None,
    level: Annotated[list[str] | None, typer.Option(help="Level of any attribute, such as concise=0.2. Repeatable.")] = None,
    system: Annotated[str, typer.Option(help="System prompt of a CST model; `harmless` and `uncensored` are the published ones.")] = "",
    dial: Annotated[str, typer.Option(help="Name of a dial of the server's file, in place of levels.")] = "",
    dials: Annotated[str, typer.Option(help="TOML file of `ctrlrl serve`, for its reward models and engine settings.")] = "",
    overrides: Set = None,
    url: Annotated[str, typer.Option(help="Talk to this running server, such as http://127.0.0.1:8000, in place of a model.")] = "",
    key_file: Annotated[str, typer.Option(help="File that holds the key for --url; else the environment's CTRLRL_KEY.")] = "",
    temperature: Annotated[float | None, typer.Option(help="Of drawing; else the model's own.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of an answer; else as many as there is room for.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of drawing.")] = None,
) -> None:
    with mistakes_told():
        if bool(model) == bool(url):
            raise RecipeError("give a model or --url, one of both: ctrlrl chat runs/mine/model --helpful 1 --harmless 0.2")
        if url and (dials or overrides):
            raise RecipeError("--dials and --set are for a model that is started here: a running server has its own")
        if model and key_file:
            raise RecipeError("--key-file is for --url")
        levels = {name: given for name, given in (("helpful", helpful), ("harmless", harmless)) if given is not None} | _levels(level or [])
        if sum((bool(system), bool(dial), bool(levels))) > 1:
            raise RecipeError("give levels, --system or --dial, one of them")
        drawing = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
        chosen = levels, system, dial
        server = _running(url, key_file) if url else _own_server(model, dials, overrides or [], bool(system))
        with server as client:
            raise SystemExit(_converse(client, chosen, {name: value for name, value in drawing.items() if value is not None}))


def _levels(given: Sequence[str]) -> dict[str, float]:
    """Levels by attribute, from texts such as concise=0.2."""
    found = {}
    for text in given:
        name, _, number = text.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise RecipeError(f"--level {text}: give an attribute and a number, such as concise=0.2") from None
    return found


def _converse(client, chosen, drawing: dict) -> int:
    """Talk until the input ends. Returns the exit code: 1 if a message was not answered, where nobody is there to see it."""
    from ctrlrl.serving.client import NotAnswered
    from jobs.parts.talk import Talk

    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    try:
        told = client.dials()
    except NotAnswered as error:
        raise RunError(f"no chat: {error}") from None
    talk = Talk(client, told, drawing, terminal)
    levels, system, dial = chosen
    if system or dial:
        talk.turn(system=system, name=dial)
    elif levels:
        if (unknown := sorted(set(levels) - set(told["attributes"]))) and told["kind"] != "system":
            raise RecipeError(f"{unknown[0]} is no attribute of this model: it has {', '.join(told['attributes'])}")
        talk.turn([levels.get(name, told["levels"]["high"]) for name in told["attributes"]])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it stops an answer, not the command
    if terminal:
        print(f"{told['model']}: {talk.spelled(talk.setting)} (/help for commands; Ctrl-C stops an answer, twice it ends)", flush=True)
        return _prompt(talk)
    for line in _lines():
        if not talk.take(line):
            break
    return int(talk.failed)


def _prompt(talk) -> int:
    """Read lines with a history of this conversation's, which is kept nowhere."""
    import readline  # noqa: F401 (gives `input` its history)

    interrupted = False
    while True:
        try:
            if not talk.take(input("> ")):
                return 0
            interrupted = False
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            if interrupted:
                return EXIT_INTERRUPTED
            interrupted = True


def _lines() -> Iterator[str]:
    """Messages of standard input, one a line; DataError for one that is no text."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"line {number} of standard input is not UTF-8: {error.reason}") from None


@contextlib.contextmanager
def _running(url: str, key_file: str):
    """A client of a running server."""
    from ctrlrl.serving.client import Client

    key = os.environ.get("CTRLRL_KEY", "")
    if key_file:
        try:
            key = Path(key_file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--key-file {key_file!r} cannot be read: {error}") from None
    yield Client(url, key.strip())


@contextlib.contextmanager
def _own_server(model: str, dials: str, overrides: Sequence[str], system: bool):
    """A client of a server of this process alone, which ends with it. The terminal's signals do not reach it: Ctrl-C ends no engine."""
    from ctrlrl.serving.client import Client
    from ctrlrl.serving.policies import hashed, new_key

    key, name = new_key(), f"chat-{secrets.token_hex(4)}"
    own = [f'keys.{name}="{hashed(key)}"', f'operators.keys=["{name}"]', *(['kind="system"'] if system else [])]
    settings = [word for setting in (*own, *overrides) for word in ("--set", setting)]
    command = [sys.executable, "-m", "ctrlrl.cli", "serve", model, "--port", "0", *(("--dials", dials) if dials else ()), *settings]
    if sys.stderr.isatty():
        print(f"starting {model} …", file=sys.stderr, flush=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    prctl = getattr(ctypes.CDLL(None), "prctl", None)

    def end_with_parent() -> None:
        if prctl:
            prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)

    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True, preexec_fn=end_with_parent
        )
        try:
            yield Client(_address(process, log), key)
        finally:
            _end(process)


def _address(process: subprocess.Popen, log) -> str:
    """Where the server listens, once it does; RunError with its own words if it ends."""
    while True:
        ended = process.poll()
        log.seek(0)
        said = log.read()
        for line in said.splitlines():
            if line.startswith("ctrlrl serve: ") and " on http://" in line:
                return line.partition(" on ")[2].split()[0]
        if ended is not None:
            told = [line.removeprefix("ctrlrl: ") for line in said.splitlines() if line.startswith("ctrlrl: ")]
            raise RunError("\n".join(told) or f"the server ended with {ended}:\n{said}")
        time.sleep(0.1)


def _end(process: subprocess.Popen) -> None:
    """End the server, and whatever it has left: one that is stopped while its engine starts leaves the engine's process."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    typer.run(main)
