"""Imported by a serving engine's own process before it loads the model, and by no other: vLLM is told the name."""

import ctypes
import signal
import sys

import torch

_PR_SET_PDEATHSIG = 1

if hasattr(torch._C, "_cpu") and hasattr(torch._C._cpu, "_init_amx"):
    torch._C._cpu._init_amx()  # else small bf16 matrices die with SIGILL on CPUs with AMX
if sys.platform == "linux":
    # A server that is killed outright tells nobody: the kernel ends the engine, which would hold its memory for good.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class InWorker:
    """What vLLM wants the name to be: a class that it makes a base of its worker."""
