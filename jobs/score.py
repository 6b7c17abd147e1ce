"""Score the answers of a self-generation directory with other reward models, without generating again.

    python jobs/score.py runs/generated --set name=held_out --set reward.helpful.model=… --set reward.harmless.model=…

Each set of scores has its own stores, so that any number of reward models can judge the same answers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import typer
from pydantic import Field, model_validator

from actors.crew import start_crew
from actors.placement import ClusterConfig
from actors.reward import Reward, RewardConfig
from ctrlrl.attributes import PAPER, AttributesSection, check_named
from ctrlrl.config import Section
from ctrlrl.data.calibration import Calibration
from ctrlrl.data.generation import OPTIMISATION, Layout, scores_table
from ctrlrl.data.shards import SOURCE, ShardStore
from ctrlrl.errors import RunError
from ctrlrl.models.conversations import reader_of
from ctrlrl.prompts import Messages
from ctrlrl.runs import absolute_out
from jobs.parts.flow import Flow
from jobs.parts.launch import Data, Recipe, Set, StopRequest, run_job
from jobs.parts.progress import Pace, Steps

_READ = ["prompt_id", "unit", "index", "response"]


class ScoreRecipe(Section):
    """Which directory is scored, under which name its scores are kept, and by which reward models: one attribute alone is enough for a
    set that is not distilled."""

    data: str
    name: str = Field("held_out", pattern=r"^\w[\w.-]*$")
    cluster: ClusterConfig = ClusterConfig()
    attributes: AttributesSection = PAPER
    reward: dict[str, RewardConfig | None]

    @model_validator(mode="after")
    def _attributes_are_scored(self):
        check_named("reward", self.given, self.attributes, some=True)
        return self

    @property
    def given(self) -> dict[str, RewardConfig]:
        """The reward models that are there, in the order of the attributes."""
        known = [*self.attributes.names, *(name for name in self.reward if name not in self.attributes.names)]
        return {a: reward for a in known if (reward := self.reward.get(a)) is not None}


@dataclass
class Judge:
    """One reward model and the store of its scores; `reward` is its pool of workers, once they are started."""

    store: ShardStore
    calibration: Calibration
    fingerprint: dict
    reward: Reward | None = None

    @classmethod
    def of(cls, config: RewardConfig, store: ShardStore, samples: dict) -> "Judge":
        """Checks the reward model and takes its fingerprint; `samples`: that of the answers."""
        config.check()
        return cls(store, config.load_calibration(), {"reward": config.fingerprint(), "samples": samples})


class Scoring:
    """Scores of sample shards by several judges: computed by their workers, committed by the thread that runs the flow."""

    def __init__(self, judges: dict[str, Judge], samples: ShardStore, messages: Mapping[str, Messages], done: Callable[[int, int], None]):
        self._judges, self._samples, self._messages, self._done = judges, samples, messages, done
        self._missing = {name: set(judge.store.missing()) for name, judge in judges.items()}

    def lacking(self) -> set[int]:
        """Shards that a judge has not scored as they are now."""
        return set().union(*self._missing.values())

    def begin(self, flow: Flow, shard: int, samples: pa.Table | None = None) -> None:
        """Have the rows of a committed shard (`samples`, if they are at hand) scored by every judge that has not done so."""
        sha256 = self._samples.record(shard).sha256  # before reading: should the shard be made anew meanwhile, its scores are outdated
        samples = self._samples.read(shard, _READ) if samples is None else samples
        prompts, answers = (samples[name].to_pylist() for name in ("prompt_id", "response"))
        conversations = [(self._messages[prompt], answer) for prompt, answer in zip(prompts, answers, strict=True)]
        for name, judge in self._judges.items():
            if shard in self._missing[name]:
                flow.after(judge.reward.raw(conversations), partial(self._commit, shard, samples, sha256, name))

    def _commit(self, shard: int, samples: pa.Table, sha256: str, name: str, raw: np.ndarray) -> None:
        judge = self._judges[name]
        table = scores_table(samples, raw, judge.calibration)
        facts = {"mean": float(np.mean(table["score"])), SOURCE: sha256}
        judge.store.commit(shard, table, facts)
        self._missing[name].discard(shard)
        if shard not in self.lacking():
            self._done(shard, len(samples))

    def finish(self) -> None:
        """Write the manifest of every store."""
        for judge in self._judges.values():
            judge.store.finish({"shards": len(judge.store.committed())})


def score(config: ScoreRecipe) -> int:
    """Score every shard that lacks scores; returns the exit code."""
    layout = Layout(absolute_out(config.data)).existing()
    if config.name == OPTIMISATION:
        raise RunError(f"name = {OPTIMISATION!r} is the set that ctrlrl generate makes and completes: give another name")
    layout.check_attributes(config.name, config.attributes)
    samples = layout.samples()
    manifest = samples.manifest()
    given = config.given
    judges = {a: Judge.of(reward, layout.scores(config.name, a), manifest["fingerprint"]) for a, reward in given.items()}
    messages = layout.messages()
    for reader in [reader_of(reward.model) for reward in given.values()]:
        for prompt, turns in messages.items():
            reader(turns, f"prompt {prompt}")
    try:
        layout.set_attributes(config.name, config.attributes)
        for judge in judges.values():
            judge.store.open_or_create(judge.fingerprint, shards=len(manifest["shards"]))
        code = score_missing(config, judges, samples, messages)
        print(f"{layout.directory / 'scores' / config.name}: {', '.join(judges)} of {manifest['rows']} answers" if not code else "stopped")
        return code
    finally:
        for judge in judges.values():
            judge.store.close()


def score_missing(config: ScoreRecipe, judges: dict[str, Judge], samples: ShardStore, messages: dict[str, Messages]) -> int:
    """Have the shards without scores scored, and write the manifests when none is left."""
    pace = Pace()
    scoring = Scoring(judges, samples, messages, lambda shard, rows: progress.advance(pace.figures(rows)))
    todo, total = sorted(scoring.lacking()), samples.manifest()["shards"]
    progress = Steps("score", len(total), len(total) - len(todo))
    if todo:
        rewards = {f"reward.{a}": reward for a, reward in config.given.items()}
        with start_crew(config.cluster, rewards) as crew, StopRequest("the running shards") as stop:
            for attribute, judge in judges.items():
                judge.reward = crew.rewards[f"reward.{attribute}"]
            crew.wait_ready()
            flow, workers = Flow(), sum(reward.workers for reward in rewards.values())
            with progress:
                pace.start()
                if not flow.run(todo, partial(scoring.begin, flow), 2 * workers + 1, stop):
                    return stop.exit_code
    scoring.finish()
    return 0


def main(data: Data, recipe: Recipe = "", overrides: Set = None) -> None:
    """Score a self-generation directory with other reward models."""
    raise typer.Exit(run_job(ScoreRecipe, score, recipe, overrides, options={"data": data}))


if __name__ == "__main__":
    typer.run(main)
