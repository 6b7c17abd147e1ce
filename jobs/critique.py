"""Self-critique pairs ([CST]): the policy answers (y0), criticises its answer, and rewrites it safely (y1).

    python jobs/critique.py --recipe jobs/recipes/critique.toml --set policy=… --out runs/critique

Fixed numbered shards on the rollout pool, three engine calls each, committed once all turns are over. Run the same command again after
any interruption: what is there stays, what is missing is made. Rows that cannot become pairs are set aside with the reason.
"""

import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import typer
from pydantic import Field

from actors.crew import start_crew
from actors.gauges import show
from actors.placement import ClusterConfig
from actors.rollout import Rollout, RolloutConfig
from ctrlrl.chat import ChatVariables, with_variables
from ctrlrl.config import Section
from ctrlrl.data.atomic import write_json
from ctrlrl.data.critique import CritiqueLayout, Dialogues, Reply, Templates
from ctrlrl.data.generation import Draw, Plan
from ctrlrl.data.rejects import Reject, write_rejects
from ctrlrl.data.sources import Prompt, read_prompts
from ctrlrl.errors import DataError
from ctrlrl.models.fingerprint import model_fingerprint
from ctrlrl.models.loading import check_policy, load_tokenizer
from ctrlrl.models.sampler import Completions, Request, SamplingConfig
from ctrlrl.prompts import render
from ctrlrl.runs import absolute_out, only_writer
from ctrlrl.seeds import derive_seed
from jobs.generate import drawn_from, effort, fitting, report, tokens_of, versions
from jobs.parts.flow import Flow
from jobs.parts.launch import Out, Recipe, Set, SkipBadRows, StopRequest, run_job
from jobs.parts.progress import Pace, Steps


class CritiqueRecipe(Section):
    """What is criticised. prompts: file, directory or hub data set. shard: rows of one engine call and one file, whole prompts."""

    out: str = "runs/critique"
    seed: int = 0
    policy: str
    chat: ChatVariables = {}
    prompts: str
    max_prompts: int | None = Field(None, gt=0)
    skip_bad_rows: bool = False
    samples_per_prompt: int = Field(1, gt=0)
    shard: int = Field(256, gt=0)
    templates: Templates = Templates()
    cluster: ClusterConfig = ClusterConfig()
    rollout: RolloutConfig = RolloutConfig()
    sampling: SamplingConfig = SamplingConfig()


def critique(config: CritiqueRecipe) -> int:
    """Make the pairs that are missing; returns the exit code. DataError, after all is written, if none is usable."""
    layout = CritiqueLayout(absolute_out(config.out))
    check_policy(config.policy)
    read = read_prompts(config.prompts, skip_bad_rows=config.skip_bad_rows, limit=config.max_prompts)
    prompts, _, long = fitting(config, read, config.skip_bad_rows)
    prompts, spoken_for = without_system(prompts, config.skip_bad_rows)
    print(report(read, len(prompts), len(long)), flush=True)
    work = Critiquing(config, layout, prompts)
    with only_writer(config.out), closing(work):
        if layout.begun():
            work.open()  # refused now rather than after the workers' start
        code = work.run([*read.report.rejects, *long, *spoken_for])
        if not code:
            manifest = work.finish()
            print("\n".join(summary_lines(manifest, layout)), flush=True)
            layout.read_pairs()
        return code


def without_system(prompts: list[Prompt], skip: bool) -> tuple[list[Prompt], list[Reject]]:
    """The prompts whose system place is free for [CST]'s two system prompts, and the others; DataError unless `skip`."""
    taken = [p for p in prompts if p.messages[0]["role"] == "system"]
    if not taken:
        return prompts, []
    if not skip or len(taken) == len(prompts):
        raise DataError(
            f"{len(taken)} of {len(prompts)} prompts have a system prompt of their own, the first at {taken[0].source}: configurable "
            "safety tuning needs that place; take them out, or set them aside with --skip-bad-rows"
        )
    return [p for p in prompts if p not in taken], [Reject(p.source, "the prompt has a system prompt of its own", "") for p in taken]


@dataclass(frozen=True)
class Talk:
    """A shard under way: its number, what is drawn, the dialogues, and the tokens and engine seconds spent on them."""

    shard: int
    draws: list[Draw]
    dialogues: Dialogues
    spent: Counter


class Critiquing:
    """The store of a critique, and the work that is still to be done in it."""

    def __init__(self, config: CritiqueRecipe, layout: CritiqueLayout, prompts: list[Prompt]):
        self._config, self._layout, self._prompts = config, layout, prompts
        self._ids = [p.prompt_id for p in prompts]
        self._plan = Plan(len(prompts), config.samples_per_prompt, config.shard, config.seed)
        self._policy = model_fingerprint(config.policy)
        self._tokenizer = with_variables(load_tokenizer(config.policy), config.chat)
        self._fingerprint = {**drawn_from(config, self._policy, prompts), "templates": config.templates.model_dump(mode="json")}
        self._store = layout.critiques()
        self._pace, self._committed = Pace(), time.monotonic()

    def open(self) -> None:
        """Become the only writer; refuses a directory that was made from something else."""
        self._store.open_or_create(self._fingerprint, shards=self._plan.shards_per_unit)
        self._layout.sources.write_prompts(self._prompts)
        if not self._store.finished:
            self._layout.sources.manifest.unlink(missing_ok=True)  # an old summary must not vouch for pairs of shards that are made anew

    def run(self, rejects: list[Reject]) -> int:
        """Start the workers and make what is missing, until all is there or a signal asks to stop; returns the exit code."""
        config, files = self._config, self._layout.sources
        if self._layout.begun() and not self._store.missing():
            return 0
        with start_crew(config.cluster, {}, config.rollout, config.policy) as crew:
            crew.wait_ready()
            self.open()
            write_rejects(files.directory, rejects)
            with StopRequest("the running shards") as stop:
                todo, total = self._store.missing(), self._plan.shards_per_unit
                with Steps("critique", total, total - len(todo)) as self._progress:
                    self._pace.start()
                    self._committed = time.monotonic()
                    flow = Flow()
                    begin = partial(self._begin, flow, crew.rollout)
                    return 0 if flow.run(todo, begin, 2 * config.rollout.workers.max, stop) else stop.exit_code

    def finish(self) -> dict:
        """Write the pairs, what was set aside, and the manifests, that of the whole directory last; returns it."""
        self.open()
        done = self._store.finish({"policy": self._config.policy})
        reasons = self._layout.write_results()
        facts = [shard["facts"] for shard in done["shards"]]
        manifest = {
            "recipe": self._config.model_dump(mode="json"),
            "fingerprint": done["fingerprint"],
            "counts": {
                "prompts": len(self._prompts),
                "rows": done["rows"],
                "pairs": done["rows"] - reasons.total(),
                "tokens": tokens_of(facts),
            },
            "aside": dict(reasons.most_common()),
            **effort(facts),
        }
        write_json(self._layout.sources.manifest, manifest)
        return manifest

    def close(self) -> None:
        """Let other processes write."""
        self._store.close()

    def _begin(self, flow: Flow, rollout: Rollout, shard: int) -> None:
        draws = self._plan.draws(shard, self._ids)
        dialogues = Dialogues(self._config.templates, [self._prompts[d.prompt].messages for d in draws])
        self._ask(flow, rollout, Talk(shard, draws, dialogues, Counter()))

    def _ask(self, flow: Flow, rollout: Rollout, talk: Talk) -> None:
        """Have the next turn of a shard drawn, or commit it after the last one."""
        asked = talk.dialogues.ask()
        if asked is None:
            self._commit(flow, talk)
            return
        turn, conversations = asked
        room = self._config.rollout.engine.max_model_tokens - self._config.sampling.max_new_tokens
        requests = {}
        for row, messages in conversations.items():
            ids = tuple(render(self._tokenizer, messages))
            if len(ids) <= room:
                requests[row] = Request(ids, derive_seed(talk.draws[row].seed, f"critique.{turn}"))
            else:
                talk.dialogues.set_aside(row, f"no room for the {turn}")
        if requests:
            drawn = rollout.generate_apart(list(requests.values()), self._config.sampling)
            flow.after(drawn, partial(self._heard, flow, rollout, talk, list(requests)))
        else:
            talk.dialogues.hear({})
            self._ask(flow, rollout, talk)

    def _heard(self, flow: Flow, rollout: Rollout, talk: Talk, rows: list[int], completions: Completions) -> None:
        texts = self._tokenizer.batch_decode(completions.response_ids, skip_special_tokens=True)
        talk.dialogues.hear({r: Reply(t.strip(), bool(f)) for r, t, f in zip(rows, texts, completions.finished, strict=True)})
        talk.spent["tokens"] += sum(map(len, completions.response_ids))
        talk.spent["engine_s"] += completions.seconds
        self._ask(flow, rollout, talk)

    def _commit(self, flow: Flow, talk: Talk) -> None:
        now, tokens = time.monotonic(), talk.spent["tokens"]
        facts = {
            "tokens": tokens,
            "engine_s": float(talk.spent["engine_s"]),
            "wall_s": now - self._committed,  # since the run's last commit, so that the sum over shards is the time of all runs
            "versions": versions(),
        }
        self._committed = now
        self._store.commit(talk.shard, talk.dialogues.table(talk.draws, self._ids, self._policy), facts)
        figures = self._pace.figures(len(talk.draws), tokens)
        show({f"critique/{name}": rate for name, rate in self._pace.rates().items()})
        self._progress.advance(figures)


def summary_lines(manifest: dict, layout: CritiqueLayout) -> list[str]:
    """What the directory holds now."""
    counts, aside = manifest["counts"], manifest["aside"]
    lines = [
        f"{layout.directory}: {counts['pairs']:,} pairs from {counts['rows']:,} answers to {counts['prompts']:,} prompts",
        f"  {counts['tokens']:,} tokens in {manifest['wall_s']:,.0f} s ({manifest['tokens_per_s']:,.0f} tokens/s)",
    ]
    if aside:
        lines.append(f"  set aside: {', '.join(f'{reason} {count:,}' for reason, count in aside.items())}")
    return lines


def main(recipe: Recipe = "", overrides: Set = None, out: Out = "", skip_bad_rows: SkipBadRows = False) -> None:
    """Have the policy criticise and rewrite its own answers."""
    raise typer.Exit(run_job(CritiqueRecipe, critique, recipe, overrides, out, {"skip_bad_rows": skip_bad_rows}))


if __name__ == "__main__":
    typer.run(main)
