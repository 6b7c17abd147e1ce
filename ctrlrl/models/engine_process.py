"""Imported by the process of a serving engine, before it loads the model, and by no other: vLLM is told the name.

Killed outright, a server tells nobody, and the engine would hold its memory for good: it watches the server, and ends with it.
"""

import os

import torch

from ctrlrl.joint_end import end_with

SERVER = "CTRLRL_SERVER_PID"  # in the environment of the engine's processes

if hasattr(torch._C, "_cpu") and hasattr(torch._C._cpu, "_init_amx"):
    torch._C._cpu._init_amx()  # else small bf16 matrices die with SIGILL on CPUs with AMX


class InWorker:
    """What vLLM wants the name to be: a class that it makes a base of its worker."""


def threads() -> int:
    """Of the engine's math on a CPU: as many as OMP_NUM_THREADS says, else one core is left to the HTTP."""
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(said) if said.isdigit() and int(said) else max(1, cores - 1)


if SERVER in os.environ:
    end_with([int(os.environ[SERVER])])
    if not torch.cuda.is_available():
        torch.set_num_threads(threads())
