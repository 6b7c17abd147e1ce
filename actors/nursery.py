"""Where the worker processes of a cluster that we started come from: forks of a process that has done their imports already.

A worker's imports (torch, transformers, vLLM or DeepSpeed) take 6 to 12 processor seconds, more than a small model takes to load. Ray is
told to start workers with this file (`executable`). One that names its imports in CTRLRL_IMPORTS is forked from a process that has made
them, with the same environment, on the same node: the first who asks starts it, and it ends with the node's raylet. Any other worker is
started as if this file were Python itself. For workers without GPUs alone: CUDA does not survive a fork.
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

IMPORTS = "CTRLRL_IMPORTS"  # modules, separated by commas
_OWN = ("RAY_", "_", "SHLVL", "PWD", "OLDPWD")  # variables that may differ between workers with the same imports
_LOOK_S = 0.5
_PATIENCE_S = 300.0


def executable() -> str:
    """The shell's words for the command that Ray is to start workers with, in place of Python; that itself where there is no /proc."""
    if not os.path.exists("/proc/self"):
        return sys.executable
    return shlex.join([sys.executable, "-I", "-S", os.path.abspath(__file__)])


def _place(raylet: int, command: list[str]) -> str:
    """Where the socket of the process to fork from lies, without its ending: beside Ray's own, and no longer, as paths must be short."""
    sockets = next(os.path.dirname(part.partition("=")[2]) for part in command if part.startswith("--raylet-name="))
    same = sorted((key, value) for key, value in os.environ.items() if not key.startswith(_OWN))
    mark = hashlib.sha256(json.dumps([sys.executable, __file__, raylet, same]).encode()).hexdigest()[:8]
    return os.path.join(sockets, mark)


def _ask(raylet: int, command: list[str]) -> None:
    """Have a worker forked that runs `command` in this environment and folder."""
    place, end = _place(raylet, command), time.monotonic() + _PATIENCE_S
    asked = json.dumps({"command": command, "environment": dict(os.environ), "folder": os.getcwd(), "asker": os.getpid()}).encode()
    with open(f"{place}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        while time.monotonic() < end:
            try:
                with socket.socket(socket.AF_UNIX) as line:
                    line.connect(f"{place}.s")
                    line.sendall(asked)
                    line.shutdown(socket.SHUT_WR)
                    if line.recv(32):
                        return
            except (FileNotFoundError, ConnectionError):
                _start_mother(place, raylet)
    raise SystemExit(f"no worker was forked within {_PATIENCE_S:g} s")


def _start_mother(place: str, raylet: int) -> None:
    """Start the process to fork from, and return when it listens."""
    for ending in ("s", "n"):
        if os.path.exists(f"{place}.{ending}"):
            os.unlink(f"{place}.{ending}")  # of one that is gone
    command = [sys.executable, "-P", __file__, "--serve", place, str(raylet)]
    mother = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    while not os.path.exists(f"{place}.s"):
        if mother.poll() is not None:
            raise SystemExit(f"the process that imports {os.environ[IMPORTS]} ended with code {mother.returncode}")
        time.sleep(0.02)


def _serve(place: str, raylet: int) -> dict | None:
    """Import, and fork a worker for each who asks, while the raylet lives. In a worker: what was asked; else None."""
    import gc
    from contextlib import suppress
    from importlib import import_module

    with socket.socket(socket.AF_UNIX) as door:
        door.bind(f"{place}.n")
        door.listen(64)
        door.settimeout(_LOOK_S)
        os.rename(f"{place}.n", f"{place}.s")  # whoever asks from now on waits for the imports
        for name in ("ray._private.workers.default_worker", *os.environ[IMPORTS].split(",")):
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
                asked = json.loads(line.makefile().read())
                if not os.path.exists(f"/proc/{asked['asker']}"):
                    continue  # Ray waits a minute for a worker, then asks for another
                if child := os.fork():
                    with suppress(OSError):
                        line.sendall(str(child).encode())
                else:
                    return asked
    with suppress(FileNotFoundError):  # of a session whose folder is gone
        os.unlink(f"{place}.s")
    return None


def _become_worker(asked: dict) -> None:
    """Be the worker that was asked for."""
    import random
    import runpy

    import numpy as np

    os.setpgid(0, 0)  # Ray ends a worker with its whole process group
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    random.seed()
    np.random.seed()  # not the same numbers as all its siblings
    script, *sys.argv = asked["command"][0], *asked["command"]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")


def main() -> None:
    """As Ray calls it: `nursery.py SCRIPT ARGUMENTS`; as `_start_mother` does: `nursery.py --serve PLACE RAYLET`."""
    if sys.argv[1] == "--serve":
        if asked := _serve(sys.argv[2], int(sys.argv[3])):
            _become_worker(asked)
        return
    raylet = os.environ.get("RAY_RAYLET_PID", "")
    if not os.environ.get(IMPORTS) or not raylet:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    _ask(int(raylet), sys.argv[1:])


if __name__ == "__main__":
    main()
