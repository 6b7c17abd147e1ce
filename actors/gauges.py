"""Figures of running jobs for Prometheus: each shows up on Ray's metrics port as ray_ctrlrl_NAME, with _ for every other sign."""

import functools
import re
from collections.abc import Mapping, Sequence

from ray.util.metrics import Gauge


def show(figures: Mapping[str, float]) -> None:
    """Set the gauges of `figures`, such as kl/k1 or pool/rollout/ready (ray_ctrlrl_pool_rollout_ready)."""
    for name, value in figures.items():
        _gauge(name).set(value)


def show_pool(name: str, ready: Sequence[bool], queued: int, replaced: int) -> None:
    """The figures of a pool; ready: of each worker whether it takes items."""
    figures = {"ready": sum(ready), "coming": len(ready) - sum(ready), "queued": queued, "replaced": replaced}
    show({f"pool/{name}/{key}": figure for key, figure in figures.items()})


@functools.cache
def _gauge(name: str) -> Gauge:
    return Gauge("ctrlrl_" + re.sub(r"\W", "_", name), description=name)
