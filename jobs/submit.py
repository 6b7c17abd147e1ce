"""Run a job on a Ray cluster from here: upload the working tree, follow the log, return the job's own exit code.

    ctrlrl submit --address http://127.0.0.1:8265 ppo --recipe my.toml --out /shared/runs/mine

The job goes on when this process ends. What it uploads is the code and the recipes: no data, runs, caches or secrets (ctrlrl/upload.py).
"""

import asyncio
import difflib
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ctrlrl.errors import PlacementError, RecipeError
from ctrlrl.upload import Tree, pack, scan

_STOP_PATIENCE_S = 600  # between SIGTERM and SIGKILL when the job is stopped: time to end the step and write a checkpoint
_END_S = 120


def submit(
    job: str, arguments: Sequence[str], known: Sequence[str], address: str = "", detach: bool = False, dry_run: bool = False
) -> int:
    """Submit `ctrlrl JOB arguments`; returns the job's exit code, or 0 at once with `detach`. dry_run: only say what would go."""
    if job not in known:
        near = difflib.get_close_matches(job, known, n=1)
        raise RecipeError(f"no job {job!r}: {f'did you mean {near[0]!r}?' if near else 'jobs are ' + ', '.join(known)}")
    tree = scan(Path.cwd())
    tree.check_arguments(arguments)
    if dry_run:
        return show(tree)
    client, address = connect(address)
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "tree.zip"
        size = pack(tree, archive)
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_PATIENCE_S), "PYTHONUNBUFFERED": "1"}
        entry = shlex.join(["python", "-m", "ctrlrl.cli", job, *arguments])
        try:
            number = client.submit_job(entrypoint=entry, runtime_env={"working_dir": str(archive), "env_vars": environment})
        except RuntimeError as error:
            raise PlacementError(f"the cluster at {address} did not take the job: {error}") from error
    print(f"{number}: {entry}  ({len(tree.files)} files, {size / 2**20:.1f} MiB, to {address})", flush=True)
    for name, reason in tree.surprises().items():
        print(f"left out: {name} ({reason})")
    how = f"follow it with: ray job logs --address {address} --follow {number}; end it with: ray job stop --address {address} {number}"
    if detach:
        print(how)
        return 0
    try:
        return follow(client, number)
    except KeyboardInterrupt:
        return interrupted(client, number, how)


def show(tree: Tree) -> int:
    """Print what would be uploaded, and what would not, with the reason; returns 0, or raises RunError as an upload would."""
    for name, path in tree.files:
        print(f"{path.stat().st_size:>12,}  {name}")
    for name, reason in sorted(tree.left_out.items()):
        print(f"{'left out':>12}  {name}  ({reason})")
    with tempfile.TemporaryDirectory() as folder:
        size = pack(tree, Path(folder) / "tree.zip")
    print(f"{len(tree.files)} files, {tree.bytes:,} bytes, {size / 2**20:.1f} MiB packed; data/, runs/ and caches never go")
    return 0


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
