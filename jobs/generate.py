"""Self-generation ([SH] section 2.2): the policy's own answers without a control, scored by the reward models in the same pass.

    python jobs/generate.py --recipe jobs/recipes/generate.toml --set policy=… --scale 8x --out runs/generated

Fixed numbered shards on the rollout pool, each one engine call; while later ones are drawn, the reward models score the earlier ones.
Run the same command again after any interruption: what is there stays, what is missing is made.
"""

import re
from functools import partial
from typing import Annotated

import numpy as np
import typer
from pydantic import Field, field_validator, model_validator

from actors.crew import Crew
from actors.reward import RewardModels
from ctrlrl.attributes import PAPER, AttributesSection, check_named
from ctrlrl.chat import with_variables
from ctrlrl.data.atomic import write_json
from ctrlrl.data.generation import OPTIMISATION, Layout, Plan, judge_mean, prompts_fingerprint, samples_table
from ctrlrl.data.outlook import cut_line, outlook_lines
from ctrlrl.data.rejects import Reject
from ctrlrl.data.sources import Prompt, PromptSet, read_prompts
from ctrlrl.models.fingerprint import model_fingerprint
from ctrlrl.models.loading import check_policy, load_tokenizer
from ctrlrl.models.sampler import Request
from ctrlrl.runs import absolute_out, only_writer
from jobs.parts.flow import Script
from jobs.parts.launch import Out, Recipe, Set, SkipBadRows, run_job
from jobs.parts.reading import DrawnRecipe, fitting, report
from jobs.parts.road import Road, Scores, drawn, drawn_from, effort, spoken, unscored_line

Scale = Annotated[str, typer.Option(help="Units to have in the end, such as 8x: passes over the prompts, each with other seeds.")]


class GenerateRecipe(DrawnRecipe):
    """What is generated. scale: units, each a pass over the prompts with other seeds."""

    out: str = "runs/generated"
    scale: str = "1x"
    samples_per_prompt: int = Field(4, gt=0)
    shard: int = Field(512, gt=0)
    attributes: AttributesSection = PAPER
    reward: RewardModels

    @model_validator(mode="after")
    def _attributes_are_scored(self):
        check_named("reward", self.reward, self.attributes)
        return self

    @field_validator("scale")
    @classmethod
    def _is_a_number_of_units(cls, scale: str) -> str:
        if not re.fullmatch(r"[1-9]\d*x", scale):
            raise ValueError("is not a number of units: write 1x, 8x, …")
        return scale

    @property
    def units(self) -> int:
        """The scale as a number."""
        return int(self.scale[:-1])


def generate(config: GenerateRecipe) -> int:
    """Generate and score what is missing, up to the scale; returns the exit code."""
    layout = Layout(absolute_out(config.out))
    read, prompts, rendered, long = check_inputs(config)
    print(report(read, len(prompts), len(long)), flush=True)
    work = Generation(config, layout, prompts, rendered)
    road = Road(
        "generate",
        {work.samples: work.origin, **work.scores.fingerprints},
        config.units * work.plan.shards_per_unit,
        summary=layout.manifest,
        before=partial(layout.set_attributes, OPTIMISATION, config.attributes),
        after=partial(layout.write_sources, prompts, [*read.report.rejects, *long]),
    )
    with only_writer(config.out), road:
        code = road.travel(partial(work.shard, road), config.cluster, work.scores.workers, config.rollout, config.policy)
        if not code:
            lines = summary_lines(work.finish(), layout)
            print("\n".join([*lines, *outlook_lines(layout.score_stores(OPTIMISATION), config.attributes)]), flush=True)
        return code


def check_inputs(config: GenerateRecipe) -> tuple[PromptSet, list[Prompt], list[np.ndarray], list[Reject]]:
    """The prompts as they were read, those that are answered, their token ids, and the others; an error for what cannot be answered."""
    check_policy(config.policy)
    read = read_prompts(config.prompts, skip_bad_rows=config.skip_bad_rows, limit=config.max_prompts)
    return read, *fitting(config, read, config.skip_bad_rows, [r.model for r in config.reward.values()], config.attributes)


def check_reused_answers(config: GenerateRecipe) -> None:
    """RunError if what lies in the recipe's `out` is of other prompts or models than lie at their paths now."""
    _, prompts, rendered, _ = check_inputs(config)
    work = Generation(config, Layout(absolute_out(config.out)), prompts, rendered)
    for store, origin in {work.samples: work.origin, **work.scores.fingerprints}.items():
        store.check_origin(origin, f"restore it, or remove {config.out!r}, and it is generated anew")


class Generation:
    """What is generated: the stores, and how each of their shards is made."""

    def __init__(self, config: GenerateRecipe, layout: Layout, prompts: list[Prompt], rendered: list[np.ndarray]):
        self._config, self._layout, self._rendered = config, layout, rendered
        self._ids, self._messages = [p.prompt_id for p in prompts], {p.prompt_id: p.messages for p in prompts}
        self._tokenizer, self._policy = with_variables(load_tokenizer(config.policy), config.chat), model_fingerprint(config.policy)
        self.plan = Plan(len(prompts), config.samples_per_prompt, config.shard, config.seed)
        self.origin = drawn_from(config, ("samples_per_prompt", "shard")) | {
            "policy": self._policy, "prompts": prompts_fingerprint(prompts)
        }  # fmt: skip
        rewards = {a: config.reward[a] for a in config.attributes.names}
        self.samples, self.scores = layout.samples(), Scores(layout, OPTIMISATION, rewards, self.origin)

    def shard(self, road: Road, crew: Crew, shard: int) -> Script:
        """The policy answers, and the reward models score its answers; these alone if a killed run left it so."""
        table, tokens = None, 0
        if road.lacks(self.samples, shard):
            draws = self.plan.draws(shard, self._ids)
            requests = [Request(tuple(self._rendered[d.prompt].tolist()), d.seed) for d in draws]
            completions = yield from drawn(crew.rollout, requests, self._config.sampling)
            texts, ids = spoken(self._tokenizer, completions), completions.response_ids
            table = samples_table(draws, self._ids, texts, ids, completions.finished, self._policy)
            facts = road.facts([completions]) | {"truncated": int((~completions.finished).sum())}
            tokens = self.samples.commit(shard, table, facts).facts["tokens"]
        rows = yield from self.scores.of_shard(road, crew, shard, self._messages, table)  # after the commit, whose hash its scores name
        return rows, tokens

    def finish(self) -> dict:
        """Write all manifests, that of the whole directory last, and return it."""
        unscored = self.scores.unscored()
        for store in self.scores.stores.values():
            store.finish({})
        samples = self.samples.finish({"policy": self._config.policy})
        facts = [shard["facts"] for shard in samples["shards"]]
        counts = {"prompts": self.plan.prompts, "samples": samples["rows"], "shards": len(facts), "tokens": sum(f["tokens"] for f in facts)}
        manifest = {
            "recipe": self._config.model_dump(mode="json") | {"scale": f"{len(facts) // self.plan.shards_per_unit}x"},
            "fingerprint": samples["fingerprint"],
            "reward_models": {a: self.scores.fingerprints[store]["reward"] for a, store in self.scores.stores.items()},
            "counts": counts,
            "truncated": sum(f["truncated"] for f in facts),
            "mean_score": {a: judge_mean(store, samples["rows"], len(facts)) for a, store in self.scores.stores.items()},
            **({"unscored": unscored} if unscored else {}),
            **effort(facts),
        }
        write_json(self._layout.manifest, manifest)
        return manifest


def summary_lines(manifest: dict, layout: Layout) -> list[str]:
    """What the directory holds now."""
    counts, scores, scale = manifest["counts"], manifest["mean_score"], manifest["recipe"]["scale"]
    limit = manifest["recipe"]["sampling"]["max_new_tokens"]
    pace = f"{manifest['wall_s']:,.0f} s ({manifest['tokens_per_s']:,.0f} tokens/s)"
    return [
        f"{layout.directory}: {scale}, {counts['samples']:,} samples of {counts['prompts']:,} prompts in {counts['shards']} shards",
        f"  {counts['tokens']:,} tokens in {pace}, {manifest['truncated']:,} answers cut at the limit",
        "  mean score  " + "  ".join(f"{a} {'-' if mean is None else format(mean, '.3f')}" for a, mean in scores.items()),
        *unscored_line(manifest.get("unscored", {})),
        *([cut] if (cut := cut_line(counts["samples"], manifest["truncated"], counts["tokens"], limit)) else []),
    ]


def main(
    recipe: Recipe = "",
    overrides: Set = None,
    out: Out = "",
    scale: Scale = "",
    skip_bad_rows: SkipBadRows = False,
) -> None:
    """Generate and score the policy's own answers."""
    options = {"scale": scale, "skip_bad_rows": skip_bad_rows}
    raise typer.Exit(run_job(GenerateRecipe, generate, recipe, overrides, out, options))


if __name__ == "__main__":
    typer.run(main)
