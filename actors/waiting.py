"""Waiting for remote results: every wait has a deadline, says what it waits for, and turns Ray's errors into ours."""

import time
from collections.abc import Sequence

import ray
from ray.exceptions import (
    ActorUnschedulableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)

from actors.faults import Failure
from actors.placement import check_alive
from actors.watch import Lifeline, reports
from ctrlrl.errors import CtrlrlError, DeadlineExceeded, GroupLost, PlacementError, WorkerLost

_LOOK_S = 5.0  # how soon the end of the whole cluster is seen
LOST = (RayActorError, ObjectLostError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)


def gather(refs: Sequence[ray.ObjectRef], deadline_s: float, what: str, lives: Sequence[Lifeline] = ()) -> list:
    """The results of `refs` in order. The first failure is raised at once, translated; DeadlineExceeded names `what` and says of every
    worker that is late (`lives`, in the order of refs) when it last gave a sign of life and what it is doing."""
    waiting, end = list(refs), time.monotonic() + deadline_s
    places = {ref: place for place, ref in enumerate(refs)}
    while waiting:
        left_s = end - time.monotonic()
        done, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, min(left_s, _LOOK_S)))
        if not done and left_s > _LOOK_S:
            check_alive()
        elif not done:
            late = reports([lives[places[ref]] for ref in waiting]) if lives else ""
            raise DeadlineExceeded(f"{what}: no answer within {deadline_s:g} s from {len(waiting)} of {len(refs)} workers{late}")
        for ref in done:
            result(ref, f"{what}: {lives[places[ref]]}" if lives else what)
            if lives:
                lives[places[ref]].alive(what)
    return [ray.get(ref) for ref in refs]


def result(ref: ray.ObjectRef, what: str):
    """The value of a finished ref; raises the translated error."""
    try:
        return ray.get(ref)
    except Exception as error:
        raise translate(error, what) from error


def first_lost(refs: Sequence[ray.ObjectRef], wait_s: float) -> tuple[int, Exception] | None:
    """Which of `refs` failed because its worker is gone, and how; gives those that are not done `wait_s` seconds."""
    done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=wait_s)
    for place, ref in enumerate(refs):
        try:
            if ref in done:
                ray.get(ref)
        except LOST as error:
            return place, error
        except Exception:  # its worker lives
            continue
    return None


def translate(error: Exception, what: str) -> Exception:
    """A ctrlrl error for Ray's; a worker's own typed error is returned as it was raised there."""
    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, CtrlrlError) else error
    if isinstance(error, ActorUnschedulableError):
        return PlacementError(f"{what}: the cluster cannot place this worker: {error}")
    if isinstance(error, LOST):
        reason = str(error).strip().splitlines()
        return WorkerLost(f"{what}: {classify(error).value} ({type(error).__name__}: {reason[0] if reason else 'no reason given'})")
    if isinstance(error, RuntimeEnvSetupError):
        return PlacementError(f"{what}: the worker's environment could not be set up: {error}")
    return error


def explained(error: Exception, reason: str) -> Exception:
    """The same WorkerLost with a further reason, if there is one."""
    if not reason or not isinstance(error, WorkerLost):
        return error
    further = type(error)(f"{error}; {reason}")
    further.__cause__ = error.__cause__
    return further


def input_lost(error: BaseException) -> bool:
    """Whether a call failed because what it was given is gone, while its worker lives."""
    return isinstance(error, ObjectLostError) or (isinstance(error, RayTaskError) and isinstance(error.cause, (*LOST, GroupLost)))


def classify(error: Exception) -> Failure:
    """The kind of failure that the table in faults.py speaks about; of one of ours, that of its cause."""
    while isinstance(error, WorkerLost) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OutOfMemoryError):
        return Failure.OUT_OF_MEMORY
    if isinstance(error, DeadlineExceeded):
        return Failure.TIMED_OUT
    if isinstance(error, NodeDiedError | ObjectLostError):
        return Failure.NODE_LOST
    if isinstance(error, LOST):
        return Failure.NODE_LOST if "its node" in str(error) else Failure.WORKER_DIED  # Ray: "died because its node has died"
    if isinstance(error, WorkerLost):
        return Failure.WORKER_DIED
    return Failure.USER_ERROR
