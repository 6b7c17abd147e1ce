"""Self-critique pairs ([CST]): the policy answers (y0), criticises its answer, and rewrites it safely (y1).

    python jobs/critique.py --recipe jobs/recipes/critique.toml --set policy=… --out runs/critique

Fixed numbered shards on the rollout pool, three engine calls each, committed once all turns are over. Run the same command again after
any interruption: what is there stays, what is missing is made. Rows that cannot become pairs are set aside with the reason.
"""

from functools import partial

import typer
from pydantic import Field

from actors.crew import Crew
from ctrlrl.chat import with_variables
from ctrlrl.data.atomic import write_json
from ctrlrl.data.critique import CritiqueLayout, Dialogues, Reply, Templates
from ctrlrl.data.generation import Plan, prompts_fingerprint
from ctrlrl.data.rejects import Reject
from ctrlrl.data.sources import Prompt, PromptSet, read_prompts
from ctrlrl.errors import DataError
from ctrlrl.models.fingerprint import model_fingerprint
from ctrlrl.models.loading import check_policy, load_tokenizer
from ctrlrl.models.sampler import Request
from ctrlrl.prompts import render
from ctrlrl.runs import absolute_out, only_writer
from ctrlrl.seeds import derive_seed
from jobs.parts.flow import Script
from jobs.parts.launch import Out, Recipe, Set, SkipBadRows, run_job
from jobs.parts.reading import DrawnRecipe, fitting, report
from jobs.parts.road import Road, drawn, drawn_from, effort, spoken


class CritiqueRecipe(DrawnRecipe):
    """What is criticised, and in which words."""

    out: str = "runs/critique"
    samples_per_prompt: int = Field(1, gt=0)
    shard: int = Field(256, gt=0)
    templates: Templates = Templates()


def critique(config: CritiqueRecipe) -> int:
    """Make the pairs that are missing; returns the exit code. DataError, after all is written, if none is usable."""
    layout = CritiqueLayout(absolute_out(config.out))
    read, prompts, long, spoken_for = check_inputs(config)
    print(report(read, len(prompts), len(long)), flush=True)
    work, rejects = Critiquing(config, layout, prompts), [*read.report.rejects, *long, *spoken_for]
    road = Road(
        "critique",
        {work.store: work.origin},
        work.plan.shards_per_unit,
        summary=layout.sources.manifest,
        after=partial(layout.sources.write_sources, prompts, rejects),
    )
    with only_writer(config.out), road:
        code = road.travel(partial(work.shard, road), config.cluster, {}, config.rollout, config.policy)
        if not code:
            print("\n".join(summary_lines(work.finish(), layout)), flush=True)
            layout.read_pairs()
        return code


def check_inputs(config: CritiqueRecipe) -> tuple[PromptSet, list[Prompt], list[Reject], list[Reject]]:
    """The prompts as they were read, those that are answered, the overlong, and those with a system prompt of their own; an error for
    what cannot be answered."""
    check_policy(config.policy)
    read = read_prompts(config.prompts, skip_bad_rows=config.skip_bad_rows, limit=config.max_prompts)
    prompts, _, long = fitting(config, read, config.skip_bad_rows)
    prompts, spoken_for = without_system(prompts, config.skip_bad_rows)
    return read, prompts, long, spoken_for


def check_reused_critiques(config: CritiqueRecipe) -> None:
    """RunError if what lies in the recipe's `out` is of other prompts or another policy than lie at their paths now."""
    work = Critiquing(config, CritiqueLayout(absolute_out(config.out)), check_inputs(config)[1])
    work.store.check_origin(work.origin, f"restore it, or remove {config.out!r}, and it is criticised anew")


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


class Critiquing:
    """What is criticised: the store, and how each of its shards is made."""

    def __init__(self, config: CritiqueRecipe, layout: CritiqueLayout, prompts: list[Prompt]):
        self._config, self._layout, self.store = config, layout, layout.critiques()
        self._prompts, self._ids = prompts, [p.prompt_id for p in prompts]
        self._tokenizer, self._policy = with_variables(load_tokenizer(config.policy), config.chat), model_fingerprint(config.policy)
        self.plan = Plan(len(prompts), config.samples_per_prompt, config.shard, config.seed)
        made = {"policy": self._policy, "prompts": prompts_fingerprint(prompts)}
        self.origin = drawn_from(config, ("samples_per_prompt", "shard", "templates")) | made

    def shard(self, road: Road, crew: Crew, shard: int) -> Script:
        """The policy answers, criticises and rewrites; what has no room for the next turn is set aside."""
        draws, calls = self.plan.draws(shard, self._ids), []
        dialogues = Dialogues(self._config.templates, [self._prompts[d.prompt].messages for d in draws])
        room = self._config.rollout.engine.max_model_tokens - self._config.sampling.max_new_tokens
        while asked := dialogues.ask():
            turn, conversations = asked
            requests, replies = {}, {}
            for row, messages in conversations.items():
                tokens = tuple(render(self._tokenizer, messages))
                if len(tokens) <= room:
                    requests[row] = Request(tokens, derive_seed(draws[row].seed, f"critique.{turn}"))
                else:
                    dialogues.set_aside(row, f"no room for the {turn}")
            if requests:
                calls.append((yield from drawn(crew.rollout, list(requests.values()), self._config.sampling)))
                said = zip(requests, spoken(self._tokenizer, calls[-1]), calls[-1].finished, strict=True)
                replies = {row: Reply(text, bool(finished)) for row, text, finished in said}
            dialogues.hear(replies)
        made = self.store.commit(shard, dialogues.table(draws, self._ids, self._policy), road.facts(calls))
        return made.rows, made.facts["tokens"]

    def finish(self) -> dict:
        """Write the pairs, what was set aside, and the manifests, that of the whole directory last; returns it."""
        done, reasons = self.store.finish({"policy": self._config.policy}), self._layout.write_results()
        facts, rows = [shard["facts"] for shard in done["shards"]], done["rows"]
        tokens = sum(f["tokens"] for f in facts)
        manifest = {
            "recipe": self._config.model_dump(mode="json"),
            "fingerprint": done["fingerprint"],
            "counts": {"prompts": len(self._prompts), "rows": rows, "pairs": rows - reasons.total(), "tokens": tokens},
            "aside": dict(reasons.most_common()),
            **effort(facts),
        }
        write_json(self._layout.sources.manifest, manifest)
        return manifest


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
