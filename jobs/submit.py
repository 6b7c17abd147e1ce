"""Run a job on a Ray cluster from here: upload the working tree, follow the log, return the job's own exit code.

    ctrlrl submit --address http://127.0.0.1:8265 ppo --recipe my.toml --out /shared/runs/mine

The job goes on when this process ends. What it uploads is the code and the recipes: no data, runs, caches, .git or .venv.
"""

import asyncio
import difflib
import os
import shlex
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ctrlrl.errors import PlacementError, RecipeError, RunError

UPLOAD_LIMIT = 100 * 2**20  # bytes of the zipped working directory, of Ray's job server
# Left out wherever they are, and left out at the top alone (ctrlrl/data is code).
_NEVER = {".git", ".venv", "venv", "node_modules", "__pycache__", ".cache", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis"}
_NOT_AT_TOP = {"runs", "data", "build", "dist", "wandb", "checkpoints"}
_STOP_PATIENCE_S = 600  # between SIGTERM and SIGKILL when the job is stopped: time to end the step and write a checkpoint
_END_S = 120


def submit(job: str, arguments: Sequence[str], known: Sequence[str], address: str = "", detach: bool = False) -> int:
    """Submit `ctrlrl JOB arguments`; returns the job's exit code, or 0 at once with `detach`."""
    if job not in known:
        near = difflib.get_close_matches(job, known, n=1)
        raise RecipeError(f"no job {job!r}: {f'did you mean {near[0]!r}?' if near else 'jobs are ' + ', '.join(known)}")
    client, address = connect(address)
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "tree.zip"
        files, size = pack(Path.cwd(), archive)
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_PATIENCE_S), "PYTHONUNBUFFERED": "1"}
        entry = shlex.join(["python", "-m", "ctrlrl.cli", job, *arguments])
        try:
            number = client.submit_job(entrypoint=entry, runtime_env={"working_dir": str(archive), "env_vars": environment})
        except RuntimeError as error:
            raise PlacementError(f"the cluster at {address} did not take the job: {error}") from error
    print(f"{number}: {entry}  ({files} files, {size / 2**20:.1f} MiB, to {address})", flush=True)
    how = f"follow it with: ray job logs --address {address} --follow {number}; end it with: ray job stop --address {address} {number}"
    if detach:
        print(how)
        return 0
    try:
        return follow(client, number)
    except KeyboardInterrupt:
        return interrupted(client, number, how)


def connect(address: str):
    """A client of the job server and its address; PlacementError if there is none or it does not let us in."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    if address:
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # else RAY_ADDRESS would win over what was given
    try:
        client = JobSubmissionClient(address or None)
        client.get_version()
        return client, client.get_address()
    except AuthenticationError as error:
        raise PlacementError(f"the cluster asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH ({error})") from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = address or os.environ.get("RAY_ADDRESS") or "http://127.0.0.1:8265"
        raise PlacementError(
            f"no job server at {where!r}: {str(error).splitlines()[0]} Give --address of a head's dashboard, "
            "through a tunnel if it is remote (see cluster/README.md)"
        ) from error


def pack(tree: Path, archive: Path) -> tuple[int, int]:
    """Zip the working tree; returns (files, bytes). RunError if Ray would not take it. The same tree gives the same bytes."""
    files = sorted(path for path in _wanted(tree) if path.is_file())
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in files:
            info = zipfile.ZipInfo(str(path.relative_to(tree)))
            info.external_attr = (path.stat().st_mode & 0xFFFF) << 16
            packed.writestr(info, path.read_bytes(), zipfile.ZIP_DEFLATED)
            if archive.stat().st_size > UPLOAD_LIMIT:
                raise RunError(_too_large(tree, files))
    size = archive.stat().st_size
    if size > UPLOAD_LIMIT:
        raise RunError(_too_large(tree, files))
    if not files:
        raise RunError(f"{str(tree)!r} has nothing to upload: run this in the directory of your recipe")
    return len(files), size


def _wanted(folder: Path, top: bool = True):
    for path in folder.iterdir():
        if path.name in _NEVER or path.name.endswith(".egg-info") or (top and path.name in _NOT_AT_TOP):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _wanted(path, top=False)
        else:
            yield path


def _too_large(tree: Path, files: list[Path]) -> str:
    largest = sorted(files, key=lambda path: -path.stat().st_size)[:3]
    named = ", ".join(f"{path.relative_to(tree)} ({path.stat().st_size / 2**20:.0f} MiB)" for path in largest)
    return (
        f"{str(tree)!r} packs to more than the {UPLOAD_LIMIT // 2**20} MiB that Ray takes; the largest files are {named}: "
        "move them to a path that the nodes see, or to data/ or runs/, which are not uploaded"
    )


def follow(client, number: str) -> int:
    """Print the job's log to its end; returns its exit code."""
    shown = 0
    while True:
        shown = asyncio.run(_print_log(client, number, shown))
        end = time.monotonic() + _END_S
        while time.monotonic() < end:
            info = client.get_job_info(number)
            if info.status.is_terminal():
                failed = info.status.value != "SUCCEEDED"
                if failed and info.message and info.driver_exit_code is None:
                    print(f"ctrlrl: {info.message.splitlines()[0]}", file=sys.stderr)
                return info.driver_exit_code if info.driver_exit_code is not None else int(failed)
            time.sleep(0.5)


async def _print_log(client, number: str, shown: int) -> int:
    """Print what follows the first `shown` characters; returns how many there are when the log, or the connection, ends."""
    seen = 0
    try:
        async for text in client.tail_job_logs(number):
            print(text[max(0, shown - seen) :], end="", flush=True)
            seen += len(text)
    except RuntimeError as error:  # the connection, not the job
        print(f"ctrlrl: the log was cut off ({error}); trying again", file=sys.stderr)
    return max(shown, seen)


def interrupted(client, number: str, how: str) -> int:
    """Ctrl-C: leave the job running, or stop it and wait for its end."""
    print(f"\nctrlrl: {number} is still running.", flush=True)
    answer = input("Leave it running? [Y/n] ").strip().lower() if sys.stdin.isatty() else "y"
    if answer.startswith("n"):
        client.stop_job(number)
        return follow(client, number)
    print(how)
    return 130
