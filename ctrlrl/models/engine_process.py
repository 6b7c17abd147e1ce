"""Imported by the process of a serving engine, before it loads the model, and by no other: vLLM is told the name.

Killed outright, a server tells nobody, and the engine would hold its memory for good: it watches the server, and ends with it.
"""

import contextlib
import os
import select
import signal
import threading

import torch

SERVER = "CTRLRL_SERVER_PID"  # in the environment of the engine's processes

if hasattr(torch._C, "_cpu") and hasattr(torch._C._cpu, "_init_amx"):
    torch._C._cpu._init_amx()  # else small bf16 matrices die with SIGILL on CPUs with AMX


class InWorker:
    """What vLLM wants the name to be: a class that it makes a base of its worker."""


def watch(server: int) -> None:
    """Wait for a process to end, then end this one."""
    with contextlib.suppress(ProcessLookupError):  # it had ended before this one looked
        select.select([os.pidfd_open(server)], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


def threads() -> int:
    """Of the engine's math on a CPU: as many as OMP_NUM_THREADS says, else one core is left to the HTTP."""
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(said) if said.isdigit() and int(said) else max(1, cores - 1)


if SERVER in os.environ:
    if hasattr(os, "pidfd_open"):
        threading.Thread(target=watch, args=(int(os.environ[SERVER]),), daemon=True).start()
    if not torch.cuda.is_available():
        torch.set_num_threads(threads())
