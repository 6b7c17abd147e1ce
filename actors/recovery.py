"""A group that lost a rank begins anew: fresh ranks for all groups of the job, which then goes on from its last checkpoint."""

import logging
import time
from collections.abc import Sequence
from typing import Protocol

from actors.faults import Decision, Limits, Losses, decide
from actors.placement import ClusterConfig
from actors.waiting import classify
from ctrlrl.errors import GroupLost

_log = logging.getLogger("ctrlrl")


class Restartable(Protocol):
    """Handle of a group."""

    def restart(self) -> None: ...  # noqa: D102
    def wait_ready(self) -> None: ...  # noqa: D102


def ready(groups: Sequence[Restartable], cluster: ClusterConfig) -> None:
    """Return when all ranks of `groups` are ready; if a group is lost in starting all begin anew, as often as a step may."""
    try:
        for group in groups:
            group.wait_ready()
    except GroupLost as error:
        Restarts(cluster).after(error, 0, groups)


class Restarts:
    """The restarts of one job, and their end: too often at the same step, or too many in an hour. recoveries: seconds each took."""

    def __init__(self, cluster: ClusterConfig):
        self.recoveries: list[float] = []
        self._limits, self._losses = Limits(replacements=cluster.replacements), Losses()
        self._step, self._at_step = -1, 0

    def after(self, error: GroupLost, step: int, groups: Sequence[Restartable]) -> None:
        """Fresh ranks for `groups`, with the model directory's weights, when all are ready; raises `error` when it is time to give up.

        step: the one that was under way.
        """
        began = time.monotonic()
        if step != self._step:  # steps were done since the last time
            self._losses.progress()
            self._step, self._at_step = step, 0
        while True:
            self._at_step += 1
            if decide("group", classify(error), self._at_step, self._losses.lately(began), self._limits) is Decision.RAISE:
                raise error
            self._losses.note(time.monotonic())
            _log.warning("%s; all ranks begin anew from the last checkpoint", error)
            time.sleep(max(0.0, self._losses.pause_until - time.monotonic()))
            try:
                for group in groups:
                    group.restart()
                for group in groups:
                    group.wait_ready()
                self.recoveries.append(time.monotonic() - began)
                return
            except GroupLost as again:
                error = again
