"""The cluster and the places on it: connecting, and one gang reservation for all workers of a job with a deadline and a clear message."""

import functools
import math
import os
import time
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import ray
from pydantic import Field, PrivateAttr
from ray._raylet import GcsClient
from ray.exceptions import RaySystemError, RpcError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.nursery import IMPORTS, executable
from ctrlrl.config import Section
from ctrlrl.data.disk import storage_error
from ctrlrl.errors import PlacementError

_DRAIN_QUESTION_S = 2.0
# Workers mostly wait for each other: threads of one that spin while they wait take the processor from another
# (spinning OpenMP threads on a busy machine cut the decoding of vLLM from 24 to 1 tokens/s).
_PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
# What rollout and scoring workers import both, which takes half of their start; and without GPUs, the environment of an eager engine.
MODELS = ("ctrlrl.models.loading",)
UNCOMPILED = {"TORCHDYNAMO_DISABLE": "1"}
_NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # Ray leaves all GPUs of a node in sight of workers that asked for none
_BUILT_IN = {"CPU", "GPU", "memory", "object_store_memory"}


class ClusterConfig(Section):
    """address: of a running Ray cluster ("auto" finds one on this machine); empty starts a local one, unless RAY_ADDRESS is set."""

    address: str = ""
    placement_deadline_s: float = Field(300, gt=0)
    call_deadline_s: float = Field(1800, gt=0, description="longest wait for one call of a worker")
    start_deadline_s: float = Field(600, gt=0, description="longest wait for a worker to load its model")
    replacements: int = Field(8, ge=0, description="losses of one pool, or restarts of a job's groups, in an hour before the job gives up")
    _first_line: str = PrivateAttr("")

    def beginning_with(self, line: str) -> Self:
        """The same, but `line` is printed when the job comes to its cluster: what it was given is in order then."""
        copy = self.model_copy()  # a default is one object for all
        copy._first_line = line
        return copy

    def begin(self) -> None:
        """Print that line, once."""
        if self._first_line:
            print(self._first_line, flush=True)
        self._first_line = ""


class Resources(Section):
    """What one worker asks for. threads: of its math libraries; 0 means as many as whole CPUs, "cores" as many as the machine has on which
    the job is begun, or as OMP_NUM_THREADS says there: for kinds of workers that take turns. custom: resources by which a cluster tells
    kinds of nodes apart, such as { rollout = 1 }."""

    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)
    threads: Annotated[int, Field(ge=0)] | Literal["cores"] = 0
    custom: dict[str, float] = {}

    @property
    def bundle(self) -> dict[str, float]:
        """The Ray resource demand."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {}), **self.custom}

    def environment(self, extra: dict[str, str], imports: tuple[str, ...] = (), common: tuple[str, ...] = ()) -> dict:
        """Ray options that start a worker with these resources and these environment variables. imports: the modules that it will need,
        which it may have from another process (nursery.py); common: those before them that other kinds of workers need, too."""
        threads = _cores() if self.threads == "cores" else self.threads or max(1, int(self.cpus))
        env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **_PASSIVE, **extra}
        if not self.gpus:  # neither CUDA nor threads that a library begins when it is imported survive a fork; only NumPy's would
            env |= {"OPENBLAS_NUM_THREADS": "1", **_NO_GPU}
            env[IMPORTS] = ";".join(",".join(part) for part in (common, imports) if part)
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "resources": self.custom, "runtime_env": {"env_vars": env}}


def _cores() -> int:
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(said) if said.isdigit() and int(said) else os.cpu_count() or 1


# recipe key -> one bundle for each of its workers
Demands = dict[str, list[dict[str, float]]]


@dataclass(frozen=True)
class Placement:
    """Reserved places by name: the first of them and how many; `at` gives the scheduling strategy of one worker."""

    group: PlacementGroup | None
    offsets: dict[str, int]
    counts: dict[str, int]

    def at(self, name: str, index: int) -> PlacementGroupSchedulingStrategy | str:
        """The place of worker `index` of `name`; for one beyond the reserved number, any that the cluster has or can add."""
        if index >= self.counts.get(name, 0):
            return "DEFAULT"
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.offsets[name] + index)

    def release(self) -> None:
        """Give the places back."""
        if self.group:
            remove_placement_group(self.group)


def connect(config: ClusterConfig, demands: Demands) -> None:
    """Join the cluster at the address (argument, else RAY_ADDRESS), or start a local one that has room for `demands`, spare ones too.

    A local cluster oversubscribes CPUs, because most workers wait for each other; GPUs are never oversubscribed.
    """
    config.begin()
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
    asked = Counter()
    for bundle in (bundle for bundles in demands.values() for bundle in bundles):
        asked.update(bundle)
    try:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, math.ceil(asked["CPU"])),
            resources={name: amount for name, amount in asked.items() if name not in _BUILT_IN},
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            namespace="ctrlrl",
            runtime_env={"py_executable": executable()},
        )
    except Exception as error:  # Ray's own deadlines are plain Exceptions
        if storage_error(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PlacementError(
            f"Ray cannot be started on this machine: {reason} It has {os.cpu_count()} cores and a load of {os.getloadavg()[0]:.0f}: "
            "end other work, or set cluster.address to a running cluster, and run the same command again"
        ) from error


def gpus_of(config: ClusterConfig) -> float:
    """GPUs of the cluster that a job would run on: the one at the address, or of this machine."""
    if ray.is_initialized() or config.address or os.environ.get("RAY_ADDRESS"):
        connect(config, {})
        return ray.cluster_resources().get("GPU", 0)
    import torch  # here, because a command that starts nothing need not wait for it

    return torch.cuda.device_count()


def reserve(demands: Demands, config: ClusterConfig) -> Placement:
    """Reserve all places at once, packed on few nodes. Raises PlacementError at the deadline, or at once when no node can be added."""
    bundles = [bundle for name in demands for bundle in demands[name]]
    offsets, total = {}, 0
    for name, wanted in demands.items():
        offsets[name] = total
        total += len(wanted)
    counts = {name: len(wanted) for name, wanted in demands.items()}
    if not bundles:
        return Placement(None, offsets, counts)
    check_room(demands, config)
    group = placement_group(bundles, strategy="PACK")
    end = time.monotonic() + config.placement_deadline_s
    while not group.wait(min(2.0, max(0.1, end - time.monotonic()))):
        check_alive()
        if time.monotonic() >= end:
            remove_placement_group(group)
            raise PlacementError(f"{_explain(demands)} (waited {config.placement_deadline_s:g} s)")
    return Placement(group, offsets, counts)


def check_room(demands: Demands, config: ClusterConfig) -> None:
    """PlacementError if a cluster that we started, which never grows, has no room for these places even when nobody else is there."""
    bundles = [bundle for name in demands for bundle in demands[name]]
    if not config.address and "RAY_ADDRESS" not in os.environ and not _fits(bundles):
        raise PlacementError(_explain(demands))


def check_alive() -> None:
    """PlacementError if the cluster has lost its last node, so that nothing it is asked for will ever come."""
    try:
        nodes = ray.nodes()
    except RaySystemError:  # not connected: then there is nothing to know, and calls will say so
        return
    if nodes and not any(node["Alive"] for node in nodes):
        raise PlacementError(
            "the cluster is gone: its last node has died, as happens when a machine runs out of memory (lower the workers, ranks or sizes "
            "of the largest of them). The same command (of a training: with --resume) starts another cluster and goes on from what is there"
        )


class PlaceWatch:
    """How long a pool's workers have waited for a place while somebody waits for them; PlacementError when that was too long."""

    def __init__(self, name: str, config: ClusterConfig, now: float):
        self._name, self._since = name, now
        self._limit_s = config.placement_deadline_s + config.start_deadline_s  # a place, and a process with its imports

    def look(self, now: float, waited_for: bool, all_of_them: bool, placed: list[bool]) -> None:
        """placed: of each worker whether it has a place; one of them is enough, in starting `all_of_them` are needed."""
        if not waited_for or (all(placed) if all_of_them else any(placed)):
            self._since = now
            return
        check_alive()
        if now - self._since > self._limit_s:
            raise PlacementError(f"no place for a {self._name} worker within {self._limit_s:g} s: {shortage()}")


def draining_nodes() -> set[str]:
    """Ids of the nodes that are about to be taken away (a spot notice, or the autoscaler): Ray places nothing new on them."""
    client = _control_service(ray.get_runtime_context().gcs_address)
    try:
        return set(client.get_draining_nodes(timeout=_DRAIN_QUESTION_S))
    except (RaySystemError, RpcError):  # the control service is busy or being restarted: ask again later
        return set()


@functools.cache
def _control_service(address: str) -> GcsClient:
    return GcsClient(address=address)


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
    asked = {key: sum(b.get(key, 0) for bundles in demands.values() for b in bundles) for key in ("CPU", "GPU")}
    each = ", ".join(f"{name}: {len(bundles)} x {bundles[0]}" for name, bundles in demands.items() if bundles)
    told = f"the workers need {asked['CPU']:g} CPU and {asked['GPU']:g} GPU ({each}); {shortage()}"
    if asked["GPU"] and not ray.cluster_resources().get("GPU"):
        return f"{told}. There is no GPU at all: jobs/recipes/laptop.toml, from which a job without --recipe starts, asks for none"
    return told


def shortage() -> str:
    """What the cluster has, and what to do if that is not enough."""
    total, free = ray.cluster_resources(), ray.available_resources()
    names = ("CPU", "GPU", *sorted(k for k in total if k.isidentifier() and k not in _BUILT_IN))
    have = ", ".join(f"{free.get(key, 0):g} of {total.get(key, 0):g} {key} free" for key in names)
    return (
        f"the cluster has {have} on {sum(n['Alive'] for n in ray.nodes())} nodes: "
        "lower the workers, ranks or resources of the largest of them, or add nodes"
    )
