"""Imported by each process of an engine with several devices before it loads its part of the model, and by no other: vLLM is told its name.

It has a share of the processors, ends when the process ends that has the engine, and tells that one why it could not start.
"""

import logging
import multiprocessing
import os
from multiprocessing.util import Finalize
from pathlib import Path

import torch

from ctrlrl.joint_end import end_with, names_may_be_gone, remove_shared_memory
from ctrlrl.models.ranks import OWNER, RANKS, SAYS, shares
from ctrlrl.models.reload import register_transfer
from ctrlrl.models.sampler import reason_of


class InRank:
    """What vLLM wants the name to be: a class that it makes a base of its worker."""


class _Told(logging.Handler):
    """Writes the error with which a rank ends, as vLLM logs it, to where the engine's owner looks for it; the first one counts."""

    def emit(self, record: logging.LogRecord) -> None:
        says, error = Path(os.environ[SAYS]), record.exc_info and record.exc_info[1]
        if error and not says.read_bytes():
            says.write_text(reason_of(error))


def settle(rank: int, ranks: int) -> None:
    """Keep to a share of the processors: ranks spin while they wait for each other, and so must not be in each other's way."""
    from vllm.platforms import current_platform
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list

    if not current_platform.is_cpu():
        return
    if hasattr(torch._C, "_cpu") and hasattr(torch._C._cpu, "_init_amx"):
        torch._C._cpu._init_amx()  # else small bf16 matrices die with SIGILL on CPUs with AMX
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1")) // ranks))
    cores = [(core.numa_node, core.physical_core, core.id) for core in get_allowed_cpu_list()]
    os.sched_setaffinity(0, shares(cores, ranks)[rank])


os.setpgid(0, 0)  # Ray ends the whole process group of a worker, and would leave the shared memory
end_with([int(os.environ[OWNER])])
names_may_be_gone()
Finalize(None, remove_shared_memory, exitpriority=1)  # when it cannot start: what it has made is nobody's then
logging.getLogger("vllm").addHandler(_Told(logging.ERROR))
settle(int(multiprocessing.current_process().name.rpartition("-")[2]), int(os.environ[RANKS]))
register_transfer()
