"""An engine with several devices: it has a process for each, which hold a part of the model each and compute together.

This is the side of the process that has the engine; engine_rank.py is what each of the others does first.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing.context import BaseContext
from pathlib import Path

from ctrlrl.errors import CtrlrlError, ModelError, VersionMismatch, WorkerLost
from ctrlrl.joint_end import forget_names, names_may_be_gone, remove_shared_memory, shared_memory
from ctrlrl.models.handover import Part
from ctrlrl.models.reload import keep_freed_memory
from ctrlrl.models.shared_message import Shelf, shared
from ctrlrl.models.weights import WeightMessage

OWNER, RANKS, SAYS = "CTRLRL_ENGINE_OWNER", "CTRLRL_ENGINE_RANKS", "CTRLRL_ENGINE_SAYS"  # variables of a rank's environment
_LONGEST = 300  # characters of a reason
_COMPLAINT_S = 5.0
# What vLLM says where one of the processes has ended; before that, while it waits for all to be ready, it raises an Exception of no kind.
_ENDED = ("cancelled", "Executor failed.")


class Ranks:
    """The processes of an engine's. begin: what begins them; None: as vLLM does, with all their imports.

    As a context: while they are begun. ModelError with a rank's own words if it cannot be one, WorkerLost if it ended without any.
    """

    def __init__(self, model: str, count: int, begin: BaseContext | None):
        self._model, self._count, self._begin = model, count, begin
        self._says = os.memfd_create("ctrlrl-engine") if count > 1 else -1
        self._pids: list[int] = []

    @property
    def settings(self) -> dict:
        """Arguments of vLLM's engine."""
        several = dict(distributed_executor_backend="mp", worker_extension_cls="ctrlrl.models.engine_rank.InRank")
        return dict(tensor_parallel_size=self._count, **several) if self._count > 1 else {}

    def __enter__(self) -> None:
        if self._count == 1:
            return
        names_may_be_gone()
        says = f"/proc/{os.getpid()}/fd/{self._says}"
        # They keep to processors of their own (engine_rank.py), not to those that vLLM would choose: one NUMA node for each.
        os.environ.update({OWNER: str(os.getpid()), RANKS: str(self._count), SAYS: says, "VLLM_CPU_OMP_THREADS_BIND": "nobind"})
        if self._begin:
            from vllm.v1.executor import multiproc_executor

            multiproc_executor.get_mp_context = lambda: self._begin

    def __exit__(self, kind, error, _) -> None:
        if error is None or self._count == 1:
            return
        remove_shared_memory()  # what was made for processes that will not be
        told = os.pread(self._says, _LONGEST, 0).decode(errors="ignore")
        if told:
            raise ModelError(f"the rollout engine cannot start with {self._model!r} on {self._count} devices: {told}") from None
        if kind is Exception or str(error.__cause__) in _ENDED:
            raise WorkerLost(f"one of the engine's {self._count} processes ended while it loaded its part of {self._model!r}") from error

    def load(self, llm, message: WeightMessage) -> None:
        """Have the engine replace its weights, on every rank; VersionMismatch if one cannot."""
        with self.at_work(), shared(message) if self._count > 1 else nullcontext(message) as there:
            told = [reason for reason in llm.collective_rpc(take, args=(there,)) if reason]
        if told:
            raise VersionMismatch(told[0])

    def load_part(self, llm, part: Part) -> bool:
        """Have an engine of one process load a part of new weights: see `take_part`. VersionMismatch if it cannot."""
        with self.at_work():
            told = llm.collective_rpc(take_part, args=(part,))[0]
        if isinstance(told, str):
            raise VersionMismatch(told)
        return told

    def ids(self, llm) -> list[int]:
        """Their process ids; none where the engine is in this process."""
        known = llm.collective_rpc(own_id_and_memory) if self._count > 1 else []
        self._pids = [pid for pid, _ in known]
        forget_names({Path(file) for _, files in known for file in files})  # vLLM would leave some of them when one process is killed
        return self._pids

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Around what the engine does: WorkerLost if that fails because one of the processes is gone, of which others may complain before
        the end of this one, which follows from it."""
        try:
            yield
        except RuntimeError as error:
            if self._pids and not isinstance(error, CtrlrlError) and _one_ends(self._pids):
                raise WorkerLost(f"one of the engine's {self._count} processes has ended: {str(error)[:_LONGEST]}") from None
            raise


def _one_ends(pids: list[int]) -> bool:
    """Whether one of these processes has ended, or does within a few seconds."""
    end = time.monotonic() + _COMPLAINT_S
    while all(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not all(os.path.exists(f"/proc/{pid}") for pid in pids)


def own_id_and_memory(_rank) -> tuple[int, list[str]]:
    """On a rank: its process id, and the files of its shared memory."""
    return os.getpid(), sorted(map(str, shared_memory()))


def take_part(rank, part: Part) -> bool | str:
    """On the only rank: load a part of new weights; whether all of them are in use now, or why that cannot be. After the last part, not to
    be in use means that all have to come once more."""
    transfer = rank.weight_transfer_engine
    if part.first and not transfer.open:
        keep_freed_memory()
        rank.start_weight_update()
    try:
        rank.update_weights({"message": [part]})
    except VersionMismatch as error:
        return str(error)
    if part.last and transfer.whole:
        rank.finish_weight_update()
    return part.last and transfer.whole


def take(rank, there: Shelf | WeightMessage) -> str:
    """On a rank: replace its part of the weights; empty, or why it cannot. The engine is of no use then."""
    message = there.message() if isinstance(there, Shelf) else there
    keep_freed_memory()
    rank.start_weight_update()
    try:
        rank.update_weights({"message": [message]})
    except VersionMismatch as error:
        return str(error)
    rank.finish_weight_update()
    return ""


def shares(cores: list[tuple[int, int, int]], ranks: int) -> list[set[int]]:
    """Of cores (NUMA node, physical core, number) those of each rank: neighbours together; all to everyone where they are too few."""
    if len(cores) < ranks:
        return [{core[-1] for core in cores}] * ranks
    ends = [len(cores) * rank // ranks for rank in range(ranks + 1)]
    ordered = [core[-1] for core in sorted(cores)]
    return [set(ordered[begin:end]) for begin, end in zip(ends, ends[1:], strict=False)]
