"""Weights to rollout workers: one message a publish, by the object store or by broadcast, and proven to be in use."""

import time
from dataclasses import dataclass

from actors.policy import Policy
from actors.rollout import Rollout
from ctrlrl.models.probe import TOLERANCE, Expectation, probe_of


@dataclass(frozen=True)
class Published:
    """What one publish cost, and how far it moved the policy: mean difference of logprobs on the probe (0 at a first publish).

    bytes: of the weights that workers took; 0 if none was at work.
    """

    version: int
    seconds: float
    bytes: int
    shift: float


def publish(policy: Policy, rollout: Rollout, version: int) -> Published:
    """Give the rollout workers the current weights; returns when every worker that is at work has them and agrees with the trainer.

    version: of the weights; a greater one is taken if the workers have had it already (the policy was set back to a checkpoint), so that
    samples of other weights can always be told.
    """
    began, version = time.perf_counter(), max(version, rollout.version + 1)
    taking, source = rollout.way.send(policy, rollout.begin(version), rollout.dtype, version)
    before = rollout.expected.published if rollout.expected else None
    coarser = "bfloat16" if "bfloat16" in (rollout.dtype, policy.dtype) else "float32"
    probe = probe_of(policy.model, exact=coarser == "float32")
    expected = Expectation(probe, policy.probe(probe), before, TOLERANCE[coarser])  # while the workers take them
    size = rollout.load(source, version, expected, rollout.way.settled(taking))
    return Published(version, time.perf_counter() - began, size, expected.shift)
