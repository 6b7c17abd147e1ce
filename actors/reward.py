"""Scorers: a pool of frozen classifiers, functions or services for one attribute, such as safety."""

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import ray
from pydantic import Field
from ray.actor import ActorHandle

from actors.placement import MODELS, UNCOMPILED, ClusterConfig, Placement, Resources
from actors.pool import Pool
from actors.scaling import fixed
from actors.turns import Turn, at_once, have_rest
from ctrlrl.data.remembered import REMEMBERED, Remembered
from ctrlrl.models.rest import Rest
from ctrlrl.models.sampler import IMPORTS, environment
from ctrlrl.models.scorer import ScorerConfig, make_scorer
from ctrlrl.models.service import PATIENCE
from ctrlrl.models.unscored import Unscored
from ctrlrl.prompts import Messages


class RewardConfig(ScorerConfig):
    """A reward model and how many workers serve it."""

    workers: int = Field(1, gt=0)
    resources: Resources = Resources()


# A section of recipes: the reward model of each attribute, by its name.
RewardModels = dict[str, RewardConfig]


def patience_of(rewards: RewardModels) -> tuple[str, ...]:
    """The recipe's keys of how patiently services are asked, which a run that goes on may change."""
    kinds = [(a, kind) for a, reward in rewards.items() for kind in ("http", "judge") if getattr(reward, kind)]
    return tuple(f"reward.{a}.{kind}.{key}" for a, kind in kinds for key in PATIENCE)


@ray.remote(max_restarts=0)
class RewardWorker:
    """Shell around one scorer."""

    def build(self, config, secret):
        self.scorer, self.aside = make_scorer(config, secret), Rest()

    def score(self, conversations):
        self.aside.end()
        return self.scorer.score(conversations)

    def raw(self, conversations):
        self.aside.end()
        return self.scorer.raw(conversations)

    def rest(self):
        return self.aside.begin()

    def reasoned(self, conversations):
        return self.scorer.reasoned(conversations)


class Reward:
    """Typed handle of one attribute's scorer. folder: of the run, in which a slow scorer's answers are remembered. turn: in which `score`
    calls its workers."""

    def __init__(
        self,
        name: str,
        config: RewardConfig,
        placement: Placement,
        cluster: ClusterConfig,
        folder: Path | None = None,
        turn: Turn = at_once,
    ):
        self.turn, self._patience_s = turn, cluster.call_deadline_s
        self._workers, secret = config.workers, config.secret()  # of the job's environment, which workers elsewhere do not have
        settings, imports = {} if config.resources.gpus else UNCOMPILED, ("ctrlrl.models.scorer",)
        if config.engine:  # of a judge
            settings, imports = environment(config.engine), (*imports, *IMPORTS)
        options = config.resources.environment(settings, imports, MODELS)
        self.calibration, self._memory = config.load_calibration(), None  # from raw outputs to scores
        if config.service:
            file = folder and folder / REMEMBERED / f"{config.content_sha256()}.txt"
            self._memory = Remembered(self._ask_service, config.service.portion, file)
            self._unscored = Unscored(f"{name}: {config.model}", config.service.unscored)

        def create(index: int) -> ActorHandle:
            return RewardWorker.options(scheduling_strategy=placement.at(name, index), **options).remote()

        self.pool = Pool(name, create, lambda worker: worker.build.remote(config, secret), fixed(config.workers), cluster)
        self.wait_ready, self.pids, self.close = self.pool.wait_ready, self.pool.pids, self.pool.close

    def score(self, conversations: Sequence[tuple[Messages, str]]) -> np.ndarray:
        """Scores in [0, 1], fp32 [B], of (prompt messages, response text) pairs; NaN for an answer that a service or a judge set aside."""
        if self._memory:
            return self.calibration(self._memory.raw(conversations).result()).astype(np.float32)
        size = max(1, -(-len(conversations) // self._workers))
        parts = [list(conversations[i : i + size]) for i in range(0, len(conversations), size)]
        with self.turn():
            futures = [self.pool.submit(lambda worker, part=part: worker.score.remote(part), named(part)) for part in parts]
            return np.concatenate([future.result() for future in futures]) if futures else np.zeros(0, np.float32)

    def rest(self) -> int:
        """Have the workers set aside on their hosts what they have on their devices, until they are asked; bytes that moved."""
        return have_rest(self.pool.name, self.pool.at_work(), self._patience_s)

    def raw(self, conversations: Sequence[tuple[Messages, str]]) -> Future:
        """Raw outputs, fp32 [B], before calibration, of one call to one worker: the same conversations always give the same outputs.

        Of a service or a judge they come from several calls, and what was said before is not asked for again; NaN is an answer without a
        score, DataError that there are too many of them.
        """
        return self._memory.raw(conversations) if self._memory else self._ask(list(conversations))

    def _ask(self, part: list[tuple[Messages, str]]) -> Future:
        return self.pool.submit(lambda worker: worker.raw.remote(part), named(part))

    def _ask_service(self, part: list[tuple[Messages, str]]) -> Future:
        """A future of raw outputs as _ask gives, whose NaN are counted."""
        counted = Future()

        def count(answering: Future) -> None:
            try:
                raw, reasons = answering.result()
                if told := self._unscored.count(part, raw, reasons):
                    print(told, flush=True)
                counted.set_result(raw)
            except BaseException as error:  # whatever it is, those who wait are told
                counted.set_exception(error)

        self.pool.submit(lambda worker: worker.reasoned.remote(part), named(part)).add_done_callback(count)
        return counted


def named(part: list[tuple[Messages, str]]) -> str:
    """What messages call the scoring of `part`."""
    return f"scoring {len(part)} answers, the first of them {part[0][1][:60]!r}" if part else "scoring no answers"
