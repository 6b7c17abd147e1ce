"""The workers of jobs that answer and judge without training: a rollout pool and any number of reward models, started together."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from actors.ending import end_all
from actors.placement import ClusterConfig, Demands, Placement, connect, reserve
from actors.reward import Reward, RewardConfig
from actors.rollout import Rollout, RolloutConfig


@dataclass(frozen=True)
class Crew:
    """The handles; as a context it ends all workers and gives their places back. rollout: None in jobs that only judge."""

    rollout: Rollout | None
    rewards: dict[str, Reward]
    placement: Placement

    def wait_ready(self) -> None:
        """Return when every worker has loaded its model."""
        for handle in self._handles():
            handle.wait_ready()

    @contextmanager
    def answered_by(self, cluster: ClusterConfig, rollout: RolloutConfig, policy: str) -> "Iterator[Crew]":
        """The same reward workers beside a rollout pool of `policy`, which ends with the context: one set of judges for many models."""
        place = reserve(demands_of({}, rollout), cluster)
        with replace(self, rollout=Rollout(rollout, policy, place, cluster), rewards={}, placement=place) as answering:
            answering.wait_ready()
            yield replace(self, rollout=answering.rollout)

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_) -> None:
        end_all(*(handle.close for handle in self._handles()), self.placement.release)

    def _handles(self) -> list:
        return [*self.rewards.values(), *([self.rollout] if self.rollout else [])]


def demands_of(rewards: dict[str, RewardConfig], rollout: RolloutConfig | None = None) -> Demands:
    """The places that are reserved for a crew."""
    demands: Demands = {"rollout": rollout.bundles} if rollout else {}
    return demands | {name: [reward.resources.bundle] * reward.workers for name, reward in rewards.items()}


def start_crew(
    cluster: ClusterConfig,
    rewards: dict[str, RewardConfig],
    rollout: RolloutConfig | None = None,
    policy: str = "",
    folder: Path | None = None,
) -> Crew:
    """Reserve all places at once and start every worker; `rewards` by the name that messages show. Calls may be made at once.

    folder: of the run, in which slow scorers' answers are remembered.
    """
    demands = demands_of(rewards, rollout)
    connect(cluster, {**demands, "spare": rollout.spare if rollout else []})
    place = reserve(demands, cluster)
    answering = Rollout(rollout, policy, place, cluster) if rollout else None
    return Crew(answering, {name: Reward(name, reward, place, cluster, folder) for name, reward in rewards.items()}, place)
