"""In-training evaluation: every n steps the policy of the moment answers a small fixed grid, on the code of ctrlrl evaluate.

The grid and its seeds are the same each time, so that two looks differ by the policy alone. PPO has a rollout pool and reward models at
hand (Interim); fine-tuning jobs have not, and start them only if they are asked to look (InterimCrew).
"""

import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from types import MappingProxyType

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from actors.crew import start_crew
from actors.placement import ClusterConfig, Demands
from actors.policy import Policy
from actors.reward import Reward, RewardModels
from actors.rollout import Rollout, RolloutConfig
from actors.sync import publish
from ctrlrl.attributes import HIGH, LOW, PAPER, Attributes, check_named
from ctrlrl.chat import ChatVariables
from ctrlrl.config import Section
from ctrlrl.data.rejects import Reject
from ctrlrl.data.sources import read_prompts
from ctrlrl.errors import RecipeError
from ctrlrl.evaluation.grid import JUDGES, controls_of, make_cells, score_columns
from ctrlrl.evaluation.metrics import METRICS, measure, without_unscored
from ctrlrl.models.sampler import SamplingConfig
from jobs.parts.asking import Asking, worker_name
from jobs.parts.flow import Script, flow

_JUDGE = JUDGES[0]  # the set under whose name the scores of a look go


class InterimConfig(Section):
    """every: steps between two looks, 0 for none. prompts: others than those trained on; the first `count` of them are asked."""

    every: int = Field(0, ge=0)
    prompts: str = ""
    count: int = Field(32, gt=0)
    levels: tuple[float, ...] = Field((LOW, HIGH), min_length=1)
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _has_prompts(self):
        if self.every and not self.prompts:
            raise ValueError("evaluation.every needs evaluation.prompts: give prompts that are not trained on")
        return self


class InterimCrewConfig(InterimConfig):
    """The same for jobs without a rollout pool: the workers that are started for it."""

    judges: RewardModels | None = None
    rollout: RolloutConfig = RolloutConfig()

    @model_validator(mode="after")
    def _has_judges(self):
        if self.every and self.judges is None:
            raise ValueError("evaluation.every needs evaluation.judges: give evaluation.judges.helpful.model and …harmless.model")
        return self

    @property
    def demands(self) -> Demands:
        """The places of the workers; none if no look is asked for. For connect, before a local cluster is sized."""
        if not self.every:
            return {}
        rewards = {f"evaluation.{a}": [reward.resources.bundle] * reward.workers for a, reward in self.judges.items()}
        return {"evaluation.rollout": self.rollout.bundles} | rewards


class Interim:
    """The grid of a run's looks, checked at once. model: whose tokenizer renders it; rollout: whose engine must have room for it
    (`section` of the recipe); judges: the reward models that are to read it. rejects: the rows set aside, if `skip_bad_rows`."""

    def __init__(
        self,
        config: InterimConfig,
        model: str,
        rollout: RolloutConfig,
        seed: int,
        section: str = "rollout",
        skip_bad_rows: bool = False,
        chat: ChatVariables = MappingProxyType({}),
        judges: Iterable[str] = (),
        attributes: Attributes = PAPER,
    ):
        self._config, self._seed, self._attributes = config, seed, attributes
        self.rejects: list[Reject] = []
        if config.every:
            self._asking = Asking(
                model, chat, rollout, config.sampling, seed, judges={_JUDGE: attributes.names}, readers=judges, attributes=attributes,
                skip=skip_bad_rows, section=section,
            )  # fmt: skip
            controls = controls_of(config.levels, attributes)
            read = read_prompts(config.prompts, skip_bad_rows=skip_bad_rows, limit=config.count)
            self._asking.add(read, lambda prompt: make_cells([prompt], controls))
            self.rejects = self._asking.rejects

    def due(self, step: int) -> bool:
        """Whether there is a look after `step` steps."""
        return bool(self._config.every) and step % self._config.every == 0

    def metrics(self, step: int, rollout: Rollout, rewards: Mapping[str, Reward]) -> dict[str, float]:
        """`evaluation/<attribute>/<metric>` of the weights that the rollout pool has, judged by `rewards` (by attribute); {} if not due.
        Prompts that lack a score are left out, and counted as evaluation/unscored if there are any."""
        if not self.due(step):
            return {}
        began, names, tables = time.perf_counter(), self._attributes.names, {}
        judges = {worker_name(_JUDGE, a): rewards[a] for a in names}

        def script(shard: int) -> Script:
            tables[shard], _ = yield from self._asking.shard(rollout, judges, shard)

        flow(range(self._asking.shards), script, self._asking.shards)
        table = pa.concat_tables([tables[shard] for shard in range(self._asking.shards)])
        columns = score_columns(_JUDGE, self._attributes)
        scored, unscored = without_unscored(table, columns)
        found = measure(scored, seed=self._seed, scores=columns, draws=0)
        figures = {f"evaluation/{a}/{name}": found[a][name]["value"] for a in names for name in METRICS}
        return {name: value for name, value in figures.items() if value is not None} | {
            **({"evaluation/unscored": unscored} if unscored else {}),
            "evaluation/tokens": pc.mean(table["tokens"]).as_py(),
            "evaluation/seconds": time.perf_counter() - began,
        }


class InterimCrew:
    """Looks of a job that has no rollout pool: a context that starts one, and the reward models, if `config.every` is above 0."""

    def __init__(
        self,
        config: InterimCrewConfig,
        cluster: ClusterConfig,
        model: str,
        seed: int,
        skip_bad_rows: bool = False,
        chat: ChatVariables = MappingProxyType({}),
        attributes: Attributes = PAPER,
    ):
        self._config, self._cluster, self._model, self._attributes = config, cluster, model, attributes
        judges = list(config.judges.values()) if config.every else []
        try:
            check_named("evaluation.judges", config.judges if config.every else dict.fromkeys(attributes.names), attributes)
        except ValueError as error:
            raise RecipeError(str(error)) from None
        for judge in judges:
            judge.check()
        models = [judge.model for judge in judges]
        self._interim = Interim(config, model, config.rollout, seed, "evaluation.rollout", skip_bad_rows, chat, models, attributes)
        self.rejects = self._interim.rejects
        self._crew, self._open = None, ExitStack()

    def __enter__(self) -> "InterimCrew":
        if self._config.every:
            rewards = {f"evaluation.{a}": reward for a, reward in self._config.judges.items()}
            self._crew = self._open.enter_context(start_crew(self._cluster, rewards, self._config.rollout, self._model))
        return self

    def __exit__(self, *_) -> None:
        self._open.close()

    def metrics(self, step: int, policy: Policy) -> dict[str, float]:
        """As Interim.metrics, of the policy's current weights, which are published to the pool first; {} if not due."""
        if not self._interim.due(step):
            return {}
        self._crew.wait_ready()
        publish(policy, self._crew.rollout, step)
        return self._interim.metrics(step, self._crew.rollout, {a: self._crew.rewards[f"evaluation.{a}"] for a in self._attributes.names})
