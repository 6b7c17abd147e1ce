"""Score the answers of a self-generation directory with other reward models, without generating again.

    python jobs/score.py runs/generated --set name=held_out --set reward.helpful.model=… --set reward.harmless.model=…

Each set of scores has its own stores, so that any number of reward models can judge the same answers.
"""

from functools import partial

import typer
from pydantic import Field, model_validator

from actors.crew import Crew
from actors.placement import ClusterConfig
from actors.reward import RewardConfig
from ctrlrl.attributes import PAPER, AttributesSection, check_named
from ctrlrl.config import Section
from ctrlrl.data.generation import OPTIMISATION, Layout
from ctrlrl.errors import RunError
from ctrlrl.models.conversations import reader_of
from ctrlrl.runs import absolute_out
from jobs.parts.flow import Script
from jobs.parts.launch import Data, Recipe, Set, run_job
from jobs.parts.road import Road, Scores, unscored_line


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


def score(config: ScoreRecipe) -> int:
    """Score every shard that lacks scores; returns the exit code."""
    layout = Layout(absolute_out(config.data)).existing()
    if config.name == OPTIMISATION:
        raise RunError(f"name = {OPTIMISATION!r} is the set that ctrlrl generate makes and completes: give another name")
    layout.check_attributes(config.name, config.attributes)
    manifest, messages = layout.samples().manifest(), layout.messages()
    scores = Scores(layout, config.name, config.given, manifest["fingerprint"])
    for reader in [reader_of(reward.model) for reward in config.given.values()]:
        for prompt, turns in messages.items():
            reader(turns, f"prompt {prompt}")
    shards, bind = len(manifest["shards"]), partial(layout.set_attributes, config.name, config.attributes)
    with Road("score", scores.fingerprints, shards, before=bind) as road:

        def script(crew: Crew, shard: int) -> Script:
            return (yield from scores.of_shard(road, crew, shard, messages)), 0

        if code := road.travel(script, config.cluster, scores.workers):
            print("stopped")
            return code
        unscored = scores.unscored()
        for store in scores.stores.values():
            store.finish({"shards": len(store.committed())})
    print(f"{layout.directory / 'scores' / config.name}: {', '.join(scores.stores)} of {manifest['rows']} answers")
    print("".join(f"{line}\n" for line in unscored_line(unscored)), end="", flush=True)
    return 0


def main(data: Data, recipe: Recipe = "", overrides: Set = None) -> None:
    """Score a self-generation directory with other reward models."""
    raise typer.Exit(run_job(ScoreRecipe, score, recipe, overrides, options={"data": data}))


if __name__ == "__main__":
    typer.run(main)
