"""PPO with the min control reward ([SH] section 2.4, eq. 4) on one Ray cluster.

    python jobs/ppo.py --recipe jobs/recipes/ppo.toml --set policy.model=… --out runs/ppo

Each step: draw prompts x and controls ζ, roll out, score as chunks finish, reward, advantages, update policy and value model, publish
the new weights to the rollout workers.
"""

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import typer

from actors.gauges import show
from actors.group import CHANGEABLE
from actors.recovery import Restarts
from actors.reward import patience_of
from actors.sync import publish
from actors.value import Value, ValueHead
from ctrlrl.data.batches import Loss
from ctrlrl.data.rejects import write_rejects
from ctrlrl.data.sources import Prompt
from ctrlrl.errors import GroupLost
from ctrlrl.models.origins import Origins, known_by_content, record_origins, rows_fingerprint, same_origins
from ctrlrl.models.sampler import Completions, Request
from ctrlrl.ppo.experience import draw_queries, make_experience, minibatch_rows
from ctrlrl.ppo.loss import policy_loss, policy_value_loss, value_loss
from ctrlrl.ppo.reward import AdaptiveKL
from ctrlrl.ppo.types import Query, Samples, Scored, concatenate
from ctrlrl.runs import Run, absolute_out
from jobs.parts.cast import Cast, PPORecipe, check_asked, check_inputs, judges_of, restore, start_cast, write_checkpoint
from jobs.parts.interim import Interim
from jobs.parts.launch import Out, Recipe, Resume, Set, SkipBadRows, StopRequest, background, run_job
from jobs.parts.progress import Answers, Clock, Steps

# May change at resume: they have no part in the steps that are done. (A schedule that is to outlive a change of steps names total_steps.)
FREE = (
    *("steps", "cluster", "checkpoint_every", "keep_checkpoints", "rollout.workers", "sync", "placement", "evaluation", "skip_bad_rows"),
    *(f"{group}.{key}" for group in ("policy", "value") for key in CHANGEABLE),
)


def train(config: PPORecipe, resume: bool = False, steps: Callable[..., None] | None = None) -> int:
    """Run PPO to the end, or until a signal asks to stop; returns the exit code. A lost group goes back to the last checkpoint.

    steps: what does the steps, in place of steps_from_checkpoint.
    """
    steps = steps or steps_from_checkpoint
    prompts, tokenizer, rejects = check_inputs(config)
    interim = Interim(
        config.evaluation,
        config.policy.model,
        config.rollout,
        config.seed,
        skip_bad_rows=config.skip_bad_rows,
        chat=config.chat,
        judges=judges_of(config),
        attributes=config.attributes,
    )
    free = (*FREE, *patience_of(config.reward), *known_by_content(config.out, "prompts", *config.models))
    with Run.open(config.out, config, resume=resume, keep=config.keep_checkpoints, free=free) as run:
        origins = origins_of(config, run.directory, prompts)
        cast = start_cast(config)
        try:
            run.begin()
            record_origins(run.directory, origins)
            write_rejects(run.directory, [*rejects, *interim.rejects])
            restarts = Restarts(config.cluster)
            with StopRequest() as stop, Steps("ppo", config.steps) as progress:
                while True:
                    try:
                        steps(config, cast, run, prompts, tokenizer, interim, progress, stop)
                        if not stop:
                            run.whole_directory("model", partial(cast.policy.export_controllable, tokenizer, attributes=config.attributes))
                        return stop.exit_code
                    except GroupLost as error:
                        restarts.after(error, progress.done, cast.groups)
        finally:
            cast.close()


def origins_of(config: PPORecipe, directory: Path, prompts: list[Prompt], **remedy: str) -> Origins:
    """What a run in `directory` began with; RunError as of same_origins."""
    data = rows_fingerprint([prompt.prompt_id, prompt.messages] for prompt in prompts)
    return same_origins(directory, config.models, {"prompts": data}, **remedy)


def check_reused_ppo(config: PPORecipe) -> None:
    """RunError if the model that lies in the recipe's `out` was made from other prompts or models than lie at their paths now."""
    prompts, _, _ = check_asked(config)
    origins_of(config, absolute_out(config.out), prompts, remedy=f"remove {config.out!r}, and the model is trained anew")


def steps_from_checkpoint(
    config: PPORecipe, cast: Cast, run: Run, prompts: list[Prompt], tokenizer, interim: Interim, progress: Steps, stop: StopRequest
) -> None:
    """The steps that the last checkpoint leaves to do; GroupLost if one of the trained models loses a rank."""
    done, kl = restore(config, cast, run)
    progress.begin_at(done)
    with background(32) as beside:
        for step in range(done, config.steps):
            stats, kl = ppo_step(config, cast, prompts, tokenizer, step, kl, beside, progress)
            stats |= interim.metrics(step + 1, cast.rollout, cast.rewards)
            run.log(step, stats)
            show(stats)
            progress.advance(headline(stats))
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps or stop:
                run.checkpoint(step + 1, partial(write_checkpoint, cast, kl))
            if stop:
                return


def ppo_step(
    config: PPORecipe,
    cast: Cast,
    prompts: Sequence[Prompt],
    tokenizer,
    step: int,
    kl: AdaptiveKL,
    beside: ThreadPoolExecutor,
    progress: Steps,
) -> tuple[dict[str, float], AdaptiveKL]:
    """One step of the algorithm; returns its metrics and the next KL controller."""
    clock = Clock()
    queries = draw_queries(prompts, tokenizer, step, config.algorithm, config.seed, config.attributes)
    requests = [Request(q.prompt_ids, q.seed) for q in queries]

    clock.start("generate")
    chunks, answers = [], Answers(progress, len(queries))
    for rows, completions in cast.rollout.generate(requests, config.sampling):
        samples = collect(queries, rows, completions)
        answers.drawn(len(rows), sum(map(len, completions.response_ids)))
        asked = score_chunk(cast, samples, tokenizer, beside, config.algorithm.old_logprobs)
        asked["scores_BA"].add_done_callback(lambda _, rows=rows: answers.scored(len(rows)))
        chunks.append((rows, samples, asked))
    clock.start("score")  # what is left of it: chunks are scored while later ones are drawn
    scored = gather(chunks)
    progress.within(f"training on {len(queries)} answers")
    return learn(config, cast, scored, step, kl, beside, clock)


def gather(chunks: Sequence[tuple[np.ndarray, Samples, dict[str, Future]]]) -> Scored:
    """A step's chunks as one, when all that is asked about them is answered."""
    return concatenate([(rows, Scored(samples, **{name: f.result() for name, f in asked.items()})) for rows, samples, asked in chunks])


def learn(
    config: PPORecipe,
    cast: Cast,
    scored: Scored,
    step: int,
    kl: AdaptiveKL,
    beside: ThreadPoolExecutor,
    clock: Clock,
    before_publish: Callable[[], object] = lambda: None,
    correction: float = 0.0,
) -> tuple[dict[str, float], AdaptiveKL]:
    """The second half of a step: reward, advantages, updates, publish; returns its metrics and the next KL controller.

    before_publish: called when the updates are done. correction: as of make_experience.
    """
    clock.start("experience")
    experience = make_experience(scored, config.algorithm, kl.beta, correction, config.attributes)
    steps = minibatch_rows(len(scored.samples.queries), step, config.algorithm, config.seed)

    clock.start("train")
    of_value = partial(value_loss, clip=config.algorithm.value_clip, factor=config.algorithm.value_factor)
    of_policy = objective(config, kl)
    if isinstance(cast.value, ValueHead):
        of_policy = partial(policy_value_loss, policy=of_policy, value=of_value)
    updates = [beside.submit(cast.policy.train, experience.batch, of_policy, steps)]
    if isinstance(cast.value, Value):
        updates.append(beside.submit(cast.value.train, experience.batch, of_value, steps))
    trained = [update.result() for update in updates]

    before_publish()
    clock.start("sync")
    published = publish(cast.policy, cast.rollout, step + 1)
    clock.stop()

    tokens = int(experience.batch.scored_lengths.sum())
    stats = {
        **experience.stats,
        **update_stats(trained),
        **clock.metrics(tokens),
        "sync/bytes": published.bytes,
        "sync/shift": published.shift,
        "policy/version": published.version,
        "samples/digest": digest(scored.samples.queries),
    }
    return stats, kl.updated(experience.stats["kl/k1"], config.algorithm.kl)


def objective(config: PPORecipe, kl: AdaptiveKL) -> Loss:
    """The policy's loss as the recipe has it."""
    algorithm = config.algorithm
    return partial(
        policy_loss,
        clip=algorithm.clip_range,
        ratio=algorithm.ratio,
        mean=algorithm.mean,
        length=config.sampling.max_new_tokens,
        beta=kl.beta if algorithm.kl.place == "loss" else 0.0,
    )


def collect(queries: list[Query], rows: np.ndarray, completions: Completions) -> Samples:
    """The queries of one chunk with their responses."""
    return Samples(
        tuple(queries[i] for i in rows),
        tuple(completions.response_ids),
        tuple(completions.logprobs),
        completions.finished,
        completions.version,
    )


def score_chunk(cast: Cast, samples: Samples, tokenizer, beside: ThreadPoolExecutor, old: str) -> dict[str, Future]:
    """Start all scoring of a chunk: the fields of Scored but `samples`, as futures. old: as of recall_chunk."""
    return judge_chunk(cast, samples, tokenizer, beside) | recall_chunk(cast, samples, beside, old)


def judge_chunk(cast: Cast, samples: Samples, tokenizer, beside: ThreadPoolExecutor) -> dict[str, Future]:
    """What the frozen models say of a chunk."""
    texts = tokenizer.batch_decode(samples.response_ids, skip_special_tokens=True)
    conversations = [(q.messages, text.strip()) for q, text in zip(samples.queries, texts, strict=True)]
    return {
        "scores_BA": beside.submit(lambda: np.stack([r.score(conversations) for r in cast.rewards.values()], 1)),
        "ref_logprobs": beside.submit(cast.reference.logprobs, samples.token_batch()),
    }


def recall_chunk(cast: Cast, samples: Samples, beside: ThreadPoolExecutor, old: str) -> dict[str, Future]:
    """What the trained models say of a chunk, with the weights that they have, or `old`: "engine", what the sampler said."""
    batch, zeros = samples.token_batch(), tuple(np.zeros(len(r), np.float32) for r in samples.response_ids)
    if isinstance(cast.value, ValueHead):
        both = beside.submit(cast.value.with_logprobs, batch)
        logprobs, values = (beside.submit(lambda i=i: both.result()[i]) for i in (0, 1))
        return {"old_logprobs": _known(samples.sampler_logprobs) if old == "engine" else logprobs, "values": values}
    return {
        "old_logprobs": _known(samples.sampler_logprobs) if old == "engine" else beside.submit(cast.policy.logprobs, batch),
        "values": beside.submit(cast.value.values, batch) if cast.value else _known(zeros),
    }


def _known(answer: object) -> Future:
    future = Future()
    future.set_result(answer)
    return future


def update_stats(trained: list[list[dict[str, float]]]) -> dict[str, float]:
    """Mean (for `_max`: maximum) over the optimiser steps of this PPO step, and the first step's ratio, which must be 1."""
    stats = {}
    for part, steps in zip(("policy", "value"), trained, strict=False):
        for name in steps[0]:
            values = [s[name] for s in steps]
            owner = "value" if name.startswith("value_") else part  # those of a head of the policy as well
            stats[f"{owner}/{name}"] = max(values) if name.endswith("_max") else float(np.mean(values))
    stats["policy/first_ratio"] = trained[0][0]["ratio_mean"]
    return stats


def digest(queries: Sequence[Query]) -> int:
    """A number that tells which samples a step was trained on: the same for the same ones in any order, and for no others."""
    return zlib.crc32(np.sort(np.array([query.seed for query in queries], np.uint64)).tobytes())


def headline(stats: dict[str, float]) -> str:
    """The figures of a step that its progress line shows."""
    names = [key.removeprefix("score/") for key in stats if key.startswith("score/")]
    kind = "agreement" if f"agreement/{names[0]}" in stats else "score"  # without a control there is nothing to agree with
    figures = "  ".join(f"{a} {stats[f'{kind}/{a}']:.3f}" for a in names)
    return f"reward {stats['reward/mean']:.3f}  {figures}  kl {stats['kl/k1']:.2f}  {stats['seconds/step']:.1f} s"


def main(
    recipe: Recipe = "",
    overrides: Set = None,
    out: Out = "",
    resume: Resume = False,
    skip_bad_rows: SkipBadRows = False,
) -> None:
    """Train a controllable policy with PPO and the min control reward."""
    raise typer.Exit(run_job(PPORecipe, train, recipe, overrides, out, {"skip_bad_rows": skip_bad_rows}, resume=resume))


if __name__ == "__main__":
    typer.run(main)
