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
from ctrlrl.errors import CtrlrlError, DeadlineExceeded, PlacementError, WorkerLost

LOST = (RayActorError, ObjectLostError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)


def gather(refs: Sequence[ray.ObjectRef], deadline_s: float, what: str) -> list:
    """The results of `refs` in order. The first failure is raised at once, translated; DeadlineExceeded names `what`."""
    waiting, end = list(refs), time.monotonic() + deadline_s
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, end - time.monotonic()))
        if not done:
            raise DeadlineExceeded(f"{what}: no answer within {deadline_s:g} s from {len(waiting)} of {len(refs)} workers")
        for ref in done:
            result(ref, what)
    return [ray.get(ref) for ref in refs]


def result(ref: ray.ObjectRef, what: str):
    """The value of a finished ref; raises the translated error."""
    try:
        return ray.get(ref)
    except Exception as error:
        raise translate(error, what) from error


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


def classify(error: Exception) -> Failure:
    """The kind of failure that the table in faults.py speaks about."""
    if isinstance(error, OutOfMemoryError):
        return Failure.OUT_OF_MEMORY
    if isinstance(error, DeadlineExceeded):
        return Failure.TIMED_OUT
    if isinstance(error, NodeDiedError):
        return Failure.NODE_LOST
    if isinstance(error, LOST):
        return Failure.NODE_LOST if "its node" in str(error) else Failure.WORKER_DIED  # Ray: "died because its node has died"
    return Failure.USER_ERROR
