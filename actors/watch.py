"""Where a worker runs, when it last gave a sign of life, and, when it is late, what its process is doing."""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.memory import shortage_on_machine

_log = logging.getLogger("ctrlrl")
_LOOK_S = 20.0  # for a process on the worker's node to start and look
_DUMP_S = 5.0
_STACK_LINES = 40
_PR_SET_PTRACER = 0x59616D61  # of Linux' prctl; -1: any process
_STATES = {
    "R": "running",
    "S": "waiting",
    "D": "waiting for a device",
    "T": "stopped (SIGSTOP)",
    "t": "held by a debugger",
    "Z": "dead",
    "I": "idle",
}


@dataclass(frozen=True)
class Whereabouts:
    """The process of a worker."""

    node_id: str
    address: str
    pid: int


def locate(actor: ActorHandle) -> ray.ObjectRef:
    """A reference to the actor's Whereabouts; it is done as soon as the actor has a place and a process."""
    return actor.__ray_call__.remote(_whereabouts)


def _whereabouts(_actor) -> Whereabouts:
    _may_be_looked_at()
    return Whereabouts(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), os.getpid())


def _may_be_looked_at() -> None:
    """Let processes of the same user read this one's stack, where Linux lets only its parents: containers run without SYS_PTRACE."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)


class Lifeline:
    """What is known of one worker; `name` is how messages call it."""

    def __init__(self, name: str):
        self.name, self.where = name, None
        self._seen, self._did = time.time(), "asked for"

    def alive(self, did: str) -> None:
        """It answered: it `did` something."""
        self._seen, self._did = time.time(), did

    def __str__(self) -> str:
        return f"{self.name} on node {self.where.address} (pid {self.where.pid})" if self.where else f"{self.name} (not placed yet)"

    def report(self) -> str:
        """Name, node, last sign of life, state of its process and its stack; takes seconds."""
        clock = time.strftime("%H:%M:%S", time.localtime(self._seen))
        text = f"{self}: last sign of life at {clock}, {time.time() - self._seen:.0f} s ago ({self._did})"
        return f"{text}; {_look(self.where)}" if self.where else text

    def shortage(self, sure: bool) -> str:
        """Whether its machine is short of memory, which worker takes how much, and what to lower; empty if not, takes seconds."""
        return _ask(self.where, _shortage, self.name, sure) if self.where else ""


def reports(lives: Sequence[Lifeline]) -> str:
    """The reports of all, each on a new line, made at the same time."""
    with ThreadPoolExecutor(len(lives)) as together:
        return "".join(f"\n{report}" for report in together.map(Lifeline.report, lives))


def _look(where: Whereabouts) -> str:
    """What a process that is started on the worker's node finds out about it."""
    return _ask(where, _examine, where.pid) or "its node could not be asked"


def _ask(where: Whereabouts, question, *arguments) -> str:
    """The answer of a process on the worker's node; empty if there is none: whoever asks has a failure to tell, which must not be lost."""
    try:
        place = NodeAffinitySchedulingStrategy(where.node_id, soft=False)
        return ray.get(question.options(scheduling_strategy=place).remote(*arguments), timeout=_LOOK_S)
    except Exception as error:  # noqa: BLE001 (see above)
        _log.debug("%s could not be asked: %s", where, error)
        return ""


@ray.remote(num_cpus=0, max_retries=0)
def _shortage(worker: str, sure: bool) -> str:
    return shortage_on_machine(worker, sure)


@ray.remote(num_cpus=0, max_retries=0)
def _examine(pid: int) -> str:
    return examine(pid)


def examine(pid: int) -> str:
    """State and Python stack of a process of this machine; py-spy reads the stack from outside, so a stopped process shows it too."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "its process is gone"
    spy = shutil.which("py-spy", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if spy is None:
        return f"its process is {_STATES.get(state, state)}; no stack, because py-spy is not installed there"
    try:
        dump = subprocess.run([spy, "dump", "--nonblocking", "--pid", str(pid)], capture_output=True, text=True, timeout=_DUMP_S)
        text = dump.stdout if dump.returncode == 0 else f"no stack: {dump.stderr.strip()} (py-spy needs ptrace; see cluster/README.md)"
    except subprocess.TimeoutExpired:
        text = f"no stack within {_DUMP_S:g} s"
    return f"its process is {_STATES.get(state, state)}\n" + "\n".join(text.splitlines()[:_STACK_LINES])
