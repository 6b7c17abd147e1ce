"""Weights to rollout workers: one message a publish, put into the object store once and read there without a copy."""

import time
from dataclasses import dataclass

from actors.policy import Policy
from actors.rollout import Rollout


@dataclass(frozen=True)
class Published:
    """What one publish cost."""

    version: int
    seconds: float
    bytes: int


def publish(policy: Policy, rollout: Rollout, version: int) -> Published:
    """Give the rollout workers the policy's current weights as `version`; returns when every worker has them."""
    began = time.perf_counter()
    size = rollout.load(policy.weights(rollout.dtype, version), version)
    return Published(version, time.perf_counter() - began, size)
