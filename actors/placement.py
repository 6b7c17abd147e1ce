"""The cluster and the places on it: connecting, and one gang reservation for all workers of a job with a deadline and a clear message."""

import math
import os
import time
from dataclasses import dataclass

import ray
from pydantic import Field
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ctrlrl.config import Section
from ctrlrl.errors import PlacementError


class ClusterConfig(Section):
    """address: of a running Ray cluster ("auto" finds one on this machine); empty starts a local one, unless RAY_ADDRESS is set."""

    address: str = ""
    placement_deadline_s: float = Field(300, gt=0)
    call_deadline_s: float = Field(1800, gt=0, description="longest wait for one call of a worker")
    start_deadline_s: float = Field(600, gt=0, description="longest wait for a worker to load its model")
    replacements: int = Field(8, ge=0, description="workers of one pool that are replaced before the job gives up")


class Resources(Section):
    """What one worker asks for. threads: of its math libraries; 0 means as many as whole CPUs."""

    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)
    threads: int = Field(0, ge=0)

    @property
    def bundle(self) -> dict[str, float]:
        """The Ray resource demand."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}

    def environment(self, extra: dict[str, str]) -> dict:
        """Ray options that start a worker with these resources and these environment variables."""
        threads = self.threads or max(1, int(self.cpus))
        env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **extra}
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "runtime_env": {"env_vars": env}}


# recipe key -> one bundle for each of its workers
Demands = dict[str, list[dict[str, float]]]


@dataclass(frozen=True)
class Placement:
    """Reserved places; `at` gives the scheduling strategy of one worker."""

    group: PlacementGroup
    offsets: dict[str, int]

    def at(self, name: str, index: int) -> PlacementGroupSchedulingStrategy:
        """The place of worker `index` of `name`."""
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.offsets[name] + index)

    def release(self) -> None:
        """Give the places back."""
        remove_placement_group(self.group)


def connect(config: ClusterConfig, demands: Demands) -> None:
    """Join the cluster at the address (argument, else RAY_ADDRESS), or start a local one that has room for `demands`.

    A local cluster oversubscribes CPUs, because most workers wait for each other; GPUs are never oversubscribed.
    """
    if ray.is_initialized():
        return
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    if address:
        try:
            ray.init(address=address, namespace="ctrlrl", logging_level="WARNING")
        except (ConnectionError, ValueError) as error:
            raise PlacementError(
                f"no Ray cluster at {address!r}: {error}. Start one (ray start --head), or leave the address empty"
            ) from error
        return
    asked = sum(bundle.get("CPU", 0) for bundles in demands.values() for bundle in bundles)
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, math.ceil(asked)),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        namespace="ctrlrl",
    )


def reserve(demands: Demands, config: ClusterConfig) -> Placement:
    """Reserve all places at once, packed on few nodes. Raises PlacementError at the deadline, or at once when no node can be added."""
    bundles = [bundle for name in demands for bundle in demands[name]]
    offsets, total = {}, 0
    for name, wanted in demands.items():
        offsets[name] = total
        total += len(wanted)
    if not config.address and "RAY_ADDRESS" not in os.environ and not _fits(bundles):
        raise PlacementError(_explain(demands))  # a cluster that we started never grows
    group = placement_group(bundles, strategy="PACK")
    end = time.monotonic() + config.placement_deadline_s
    while not group.wait(min(2.0, max(0.1, end - time.monotonic()))):
        if time.monotonic() >= end:
            remove_placement_group(group)
            raise PlacementError(f"{_explain(demands)} (waited {config.placement_deadline_s:g} s)")
    return Placement(group, offsets)


def _fits(bundles: list[dict[str, float]]) -> bool:
    """Whether the bundles, first come first served, fit the total resources of the living nodes."""
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    for bundle in sorted(bundles, key=lambda b: (-b.get("GPU", 0), -b.get("CPU", 0))):
        node = next((n for n in nodes if all(n.get(k, 0) >= v for k, v in bundle.items())), None)
        if node is None:
            return False
        for key, amount in bundle.items():
            node[key] = node.get(key, 0) - amount
    return True


def _explain(demands: Demands) -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    asked = {key: sum(b.get(key, 0) for bundles in demands.values() for b in bundles) for key in ("CPU", "GPU")}
    each = ", ".join(f"{name}: {len(bundles)} x {bundles[0]}" for name, bundles in demands.items() if bundles)
    have = ", ".join(f"{free.get(key, 0):g} of {total.get(key, 0):g} {key} free" for key in ("CPU", "GPU"))
    return (
        f"the workers need {asked['CPU']:g} CPU and {asked['GPU']:g} GPU ({each}); the cluster has {have} on "
        f"{sum(n['Alive'] for n in ray.nodes())} nodes: lower the workers, ranks or resources of the largest of them, or add nodes"
    )
