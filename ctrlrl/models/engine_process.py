"""Imported by the process that holds a serving engine's model, before it loads it, and by no other: vLLM is told the name.

Killed outright, a server tells nobody, and vLLM's processes would hold their memory for good: this one watches the server, and ends
with it, and ends vLLM's process between the two where there is one (on the CPU; a GPU's model is in the server's own child).
"""

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


def watch(server: int, parent: int) -> None:
    """Wait for a process to end, then end this one; and first its parent, if that is not the process waited for."""
    try:
        select.select([os.pidfd_open(server)], [], [])
        if parent != server and os.getppid() == parent:
            os.kill(parent, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it had ended before this one looked, and then the parent may be anybody
    os.kill(os.getpid(), signal.SIGKILL)


if hasattr(os, "pidfd_open") and SERVER in os.environ:
    threading.Thread(target=watch, args=(int(os.environ[SERVER]), os.getppid()), daemon=True).start()
