"""Where the worker processes of a cluster that we started come from: forks of a process that has done their imports already.

A worker's imports (torch, transformers, vLLM or DeepSpeed) take 6 to 12 processor seconds, more than a small model takes to load. Ray is
told to start workers with this file (`executable`). One that names its imports in CTRLRL_IMPORTS is forked from a process that has made
them, of the same job, with the same environment, on the same node: the first who asks starts it, and it ends with the node's raylet. What
kinds of workers have in common they import once: the process to fork from is then a fork itself. Any other worker is started as if this
file were Python itself. For workers without GPUs alone: CUDA does not survive a fork. (Nor would threads; no import here begins any.)

A worker, which is full of Ray's threads, can have further processes forked from where it was forked itself: those of its engine (kin.py).
"""

import fcntl
import hashlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

MOTHER = "CTRLRL_MOTHER"  # set in a forked worker: the place of the process that it was forked from
IMPORTS = "CTRLRL_IMPORTS"  # modules, separated by commas; first those that other kinds of workers import, too, and a semicolon
_OWN = ("RAY_", "_", "SHLVL", "PWD", "OLDPWD")  # variables that may differ between workers with the same imports
_LATE = (IMPORTS, "CTRLRL_", "VLLM_")  # variables that nothing looks at before the semicolon
_LOOK_S = 0.5
_PATIENCE_S = 300.0
_MOST_FDS = 32  # that can be handed to a forked process


def executable() -> str:
    """The shell's words for the command that Ray is to start workers with, in place of Python; that itself where there is no /proc."""
    if not os.path.exists("/proc/self"):
        return sys.executable
    return shlex.join([sys.executable, "-I", "-S", os.path.abspath(__file__)])


def _place(raylet: int, command: list[str], but: tuple[str, ...] = ()) -> str:
    """Where the socket of the process to fork from lies, without its ending: beside Ray's own, and no longer, as paths must be short.
    but: beginnings of variables that may differ, too."""
    sockets = next(os.path.dirname(part.partition("=")[2]) for part in command if part.startswith("--raylet-name="))
    same = sorted((key, value) for key, value in os.environ.items() if not key.startswith((*_OWN, *but)))
    job = os.environ.get("RAY_JOB_ID")  # which Ray keeps from when it is imported
    mark = hashlib.sha256(json.dumps([sys.executable, __file__, raylet, job, same, but and _common()]).encode()).hexdigest()[:8]
    return os.path.join(sockets, mark)


def _common() -> str:
    """The modules before the semicolon."""
    return os.environ[IMPORTS].rpartition(";")[0]


def ask(place: str, wanted: dict, start: Callable[[], None], files: Sequence[int] = ()) -> int:
    """Have the process that listens at `place` fork one in this environment and folder; its process id. start: have one listen there.
    files: descriptors that it is to have."""
    here = {"environment": dict(os.environ), "folder": os.getcwd(), "asker": os.getpid()}
    end, asked = time.monotonic() + _PATIENCE_S, json.dumps(here | wanted).encode()
    with open(f"{place}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        while time.monotonic() < end:
            try:
                with socket.socket(socket.AF_UNIX) as line:
                    line.connect(f"{place}.s")
                    sent = socket.send_fds(line, [asked], files)
                    line.sendall(asked[sent:])
                    line.shutdown(socket.SHUT_WR)
                    if child := line.recv(32):
                        return int(child)
            except (FileNotFoundError, ConnectionError):
                start()
    raise SystemExit(f"no worker was forked within {_PATIENCE_S:g} s")


def _start_mother(place: str, raylet: int, command: list[str]) -> None:
    """Have a process to fork from listen at `place`: itself a fork, of one that has imported what others import, too, or a new one."""
    _tidy(place)
    if not _common():
        _start_new(place, raylet, dict(os.environ))
        return
    first = _place(raylet, command, _LATE)
    plain = {key: value for key, value in os.environ.items() if not key.startswith(_LATE)} | {IMPORTS: _common()}

    def start() -> None:
        _tidy(first)
        _start_new(first, raylet, plain)

    child = ask(first, {"serve": place}, start)
    while not os.path.exists(f"{place}.s"):
        if not os.path.exists(f"/proc/{child}"):
            raise SystemExit(f"the process that imports {os.environ[IMPORTS]} ended")
        time.sleep(0.02)


def _tidy(place: str) -> None:
    """Remove what one that is gone left at `place`."""
    for ending in ("s", "n"):
        if os.path.exists(f"{place}.{ending}"):
            os.unlink(f"{place}.{ending}")


def _start_new(place: str, raylet: int, environment: dict[str, str]) -> None:
    """Start a process to fork from in this environment, and return when it listens."""
    command = [sys.executable, "-P", __file__, "--serve", place, str(raylet)]
    mother = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, env=environment)
    while not os.path.exists(f"{place}.s"):
        if mother.poll() is not None:
            raise SystemExit(f"the process that imports {environment[IMPORTS]} ended with code {mother.returncode}")
        time.sleep(0.02)


def _serve(place: str, raylet: int) -> dict | None:
    """Import, and fork a process for each who asks, while the raylet lives. In such a process: what was asked; else None."""
    import gc
    from contextlib import suppress
    from importlib import import_module

    with socket.socket(socket.AF_UNIX) as door:
        door.bind(f"{place}.n")
        door.listen(64)
        door.settimeout(_LOOK_S)
        os.rename(f"{place}.n", f"{place}.s")  # whoever asks from now on waits for the imports
        for name in ("ray._private.workers.default_worker", *os.environ[IMPORTS].replace(";", ",").split(",")):
            with suppress(Exception):  # the worker meets the same one, and tells it
                import_module(name)
        gc.collect()
        gc.freeze()  # so that pages stay shared with the workers
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no trace is left of workers that have ended
        while os.path.exists(f"/proc/{raylet}"):
            try:
                line, _ = door.accept()
            except TimeoutError:
                continue
            with line:
                line.settimeout(_PATIENCE_S)
                first, files, *_ = socket.recv_fds(line, 1 << 16, _MOST_FDS)
                asked = json.loads(first + line.makefile("rb").read()) | {"files": files, "mother": place}
                # Ray waits a minute for a worker, then asks for another.
                child = os.fork() if os.path.exists(f"/proc/{asked['asker']}") else -1
                if not child:
                    return asked
                for file in files:
                    os.close(file)
                with suppress(OSError):
                    line.sendall(str(child).encode() if child > 0 else b"")
    with suppress(FileNotFoundError):  # of a session whose folder is gone
        os.unlink(f"{place}.s")
    return None


def _become(asked: dict) -> None:
    """Have the environment and folder that were asked for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.environ[MOTHER] = asked["mother"]


def _begin() -> None:
    """What a process needs that has just been forked: Ray ends a worker with its whole process group, and it does not have the same random
    numbers as all its siblings."""
    import random

    import numpy as np

    os.setpgid(0, 0)
    random.seed()
    np.random.seed()


def _be_kin(worker: int, files: list[int]) -> NoReturn:
    """Be a process of a worker's that was begun by kin.py: what multiprocessing's own server of forks does in one of its own."""
    from multiprocessing import forkserver, resource_tracker, spawn

    import ray

    _begin()
    ray._raylet.setproctitle(f"ray::part of {worker}")
    told, resource_tracker._resource_tracker._fd, *forkserver._forkserver._inherited_fds = files
    os._exit(spawn._main(told, os.dup(told)))


def _work(command: list[str]) -> None:
    """Be the worker that was asked for."""
    import runpy

    _begin()
    script, *sys.argv = command[0], *command
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")


def main() -> None:
    """As Ray calls it: `nursery.py SCRIPT ARGUMENTS`; as `_start_mother` does: `nursery.py --serve PLACE RAYLET`."""
    if sys.argv[1] == "--serve":
        asked = _serve(sys.argv[2], int(sys.argv[3]))
        while asked and "serve" in asked:  # a process to fork others from in turn
            os.setsid()
            _become(asked)
            asked = _serve(asked["serve"], int(os.environ["RAY_RAYLET_PID"]))
        if asked:
            _become(asked)
            _work(asked["command"]) if "command" in asked else _be_kin(asked["asker"], asked["files"])
        return
    raylet = os.environ.get("RAY_RAYLET_PID", "")
    if not os.environ.get(IMPORTS) or not raylet:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    command = sys.argv[1:]
    place = _place(int(raylet), command)
    ask(place, {"command": command}, lambda: _start_mother(place, int(raylet), command))


if __name__ == "__main__":
    main()
