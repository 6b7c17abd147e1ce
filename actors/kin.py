"""Processes of a worker's own: forked from where the worker was (nursery.py), instead of started anew with all its imports; and one end
for all of them.

For whoever begins processes by multiprocessing, such as vLLM's engine with several devices. Ray's threads in the worker do not survive a
fork, hence not from the worker itself.
"""

import io
import logging
import multiprocessing.util
import os
from collections.abc import Sequence
from multiprocessing import popen_forkserver, process, reduction, resource_tracker, spawn
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext, set_spawning_popen

from actors.nursery import MOTHER, ask
from ctrlrl import joint_end

_UNKNOWN = 255  # exit code: a process's own parent alone is told, and that is not this one
_log = logging.getLogger("ctrlrl")


def context() -> BaseContext | None:
    """What begins such processes, in a worker that was forked; None in one that was not, as with a GPU."""
    return _Context() if MOTHER in os.environ and hasattr(os, "pidfd_open") else None


class _Popen(popen_forkserver.Popen):
    method = "mother"

    def _launch(self, process_obj) -> None:
        about, told = spawn.get_preparation_data(process_obj._name), io.BytesIO()
        set_spawning_popen(self)  # so that what is handed over adds its descriptors to self._fds
        try:
            reduction.dump({key: value for key, value in about.items() if not key.startswith("init_main_")}, told)
            reduction.dump(process_obj, told)
        finally:
            set_spawning_popen(None)
        end, begin = os.pipe()
        self.pid = ask(os.environ[MOTHER], {}, _gone, [end, resource_tracker.getfd(), *self._fds])
        os.close(end)
        self.sentinel = os.pidfd_open(self.pid)
        # The pipe stays open: the other end tells the process that this one has ended.
        self.finalizer = multiprocessing.util.Finalize(self, multiprocessing.util.close_fds, (os.dup(begin), self.sentinel))
        with open(begin, "wb") as pipe:
            pipe.write(told.getbuffer())

    def poll(self, flag=os.WNOHANG) -> int | None:
        if self.returncode is None and wait([self.sentinel], 0 if flag == os.WNOHANG else None):
            self.returncode = _UNKNOWN
        return self.returncode


class _Process(process.BaseProcess):
    _start_method = "spawn"  # of processes that it begins itself

    @staticmethod
    def _Popen(process_obj):
        return _Popen(process_obj)


class _Context(BaseContext):
    _name = _Popen.method
    Process = _Process


def _gone() -> None:
    raise SystemExit(f"the process that {os.getpid()} was forked from has ended")


def end_with(pids: Sequence[int]) -> None:
    """Have this process end as soon as one of its own (`pids`) does: the loss of a worker is dealt with."""
    known = ", ".join(map(str, pids))
    joint_end.end_with(pids, lambda pid: _log.error("process %d of this worker's own (%s) has ended: the worker ends, too", pid, known))
