"""PPO one step off: batch t is drawn while update t - 1 trains, so that neither rollouts nor trainers wait for the other.

    python jobs/ppo_overlap.py --recipe jobs/recipes/ppo.toml --set policy.model=… --set lag=1 --out runs/ppo

Batch t is drawn with the weights that t - lag updates made (at least 0); with lag 0 this is jobs/ppo.py, to the bit. Every query is
trained on exactly once, in the order of jobs/ppo.py: nothing that is late is discarded, publishes wait for it instead. That the samples are
of an earlier policy is corrected by truncated importance weights (METHOD: [AReaL] arXiv 2505.24298).
"""

import json
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Literal

import numpy as np
import typer
from pydantic import Field, model_validator

from actors.gauges import show
from ctrlrl.data.sources import Prompt
from ctrlrl.errors import RunError, VersionMismatch
from ctrlrl.evaluation.files import RECIPE
from ctrlrl.models.sampler import Request
from ctrlrl.models.state import damaged
from ctrlrl.ppo.ahead import Drawn, read_ahead, write_ahead
from ctrlrl.ppo.experience import draw_queries
from ctrlrl.ppo.reward import AdaptiveKL
from ctrlrl.ppo.types import Samples
from ctrlrl.runs import Run, absolute_out
from jobs.parts.cast import Cast, PPORecipe, restore, write_checkpoint
from jobs.parts.interim import Interim
from jobs.parts.launch import Out, Recipe, Resume, Set, SkipBadRows, StopRequest, background, run_job
from jobs.parts.progress import Answers, Clock, Steps
from jobs.ppo import collect, gather, headline, judge_chunk, learn, recall_chunk
from jobs.ppo import train as train_by

_AHEAD = "ahead.parquet"  # of a checkpoint: the batches that were on their way


class OverlapRecipe(PPORecipe):
    """PPO's, and how far drawing runs ahead. correction: cap C of the importance weights, used where lag > 0."""

    lag: Literal[0, 1, 2] = 1
    correction: float = Field(2.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _draws_while_it_trains(self):
        if self.placement == "shared":
            raise ValueError('placement = "shared" has rollouts and trainers take turns, and here both work at once: use ctrlrl ppo')
        return self

    @model_validator(mode="after")
    def _old_is_the_policy_that_trains(self):
        if self.lag and self.algorithm.old_logprobs == "engine":
            raise ValueError(
                'algorithm.old_logprobs = "engine" is what an earlier policy said where lag is above 0, and leaves nothing to correct: set '
                'algorithm.old_logprobs = "trainer", or lag = 0'
            )
        return self


@dataclass(frozen=True)
class Batch:
    """A batch that has been drawn, what the frozen models are asked about each of its chunks, and the seconds that drawing took."""

    drawn: Drawn
    judged: tuple[dict[str, Future], ...]
    seconds: float

    def chunks(self, cast: Cast, beside: ThreadPoolExecutor, old: str) -> list[tuple[np.ndarray, Samples, dict[str, Future]]]:
        """The chunks with all that is asked about them, the trained models as they are now. old: as of recall_chunk."""
        return [
            (rows, samples, asked | recall_chunk(cast, samples, beside, old))
            for (rows, samples), asked in zip(self.drawn.chunks, self.judged, strict=True)
        ]


def train(config: OverlapRecipe, resume: bool = False) -> int:
    """As jobs.ppo.train, with the steps of this job; RunError for a run that jobs/ppo.py began."""
    recipe = absolute_out(config.out) / RECIPE
    if resume and recipe.exists() and "lag" not in json.loads(recipe.read_text()):
        raise RunError(f"{config.out!r} was begun by ctrlrl ppo, without a lag: resume it with that, or give another out")
    return train_by(config, resume, overlapped_steps)


def overlapped_steps(
    config: OverlapRecipe, cast: Cast, run: Run, prompts: Sequence[Prompt], tokenizer, interim: Interim, progress: Steps, stop: StopRequest
) -> None:
    """The steps that the last checkpoint leaves to do, `lag` batches ahead; GroupLost if one of the trained models loses a rank."""
    done, kl = restore(config, cast, run)
    progress.begin_at(done)
    waiting = Event()  # the trainers are
    waiting.set()
    with background(32) as beside:
        draw = partial(draw_batch, config, cast, prompts, tokenizer, beside, progress, waiting)
        ahead = deque(resumed(config, cast, run, prompts, tokenizer, beside))
        for step in range(done + len(ahead), min(done + config.lag, config.steps)):
            ahead.append(draw(step, done))
        for step in range(done, config.steps):
            coming = step + config.lag
            pending = beside.submit(draw, coming, step) if coming < config.steps else None
            stats, kl = overlapped_step(config, cast, step, kl, ahead, pending, beside, progress, waiting)
            stats |= interim.metrics(step + 1, cast.rollout, cast.rewards)
            run.log(step, stats)
            show(stats)
            idle = f"  idle: rollouts {stats['idle/rollout']:.0%}, trainers {stats['idle/trainer']:.0%}"
            progress.advance(headline(stats) + idle)
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps or stop:
                run.checkpoint(step + 1, partial(write_with_ahead, cast, kl, [batch.drawn for batch in ahead]))
            if stop:
                return


def overlapped_step(
    config: OverlapRecipe,
    cast: Cast,
    step: int,
    kl: AdaptiveKL,
    ahead: deque[Batch],
    pending: Future | None,
    beside: ThreadPoolExecutor,
    progress: Steps,
    waiting: Event,
) -> tuple[dict[str, float], AdaptiveKL]:
    """Train on the first batch of `ahead` while `pending` is drawn, then publish; returns the metrics and the next KL controller.

    waiting: set while the trainers have nothing to do.
    """
    clock, drawing = Clock(), pending is not None

    def arrived() -> None:
        nonlocal pending
        waiting.set()
        if pending:
            clock.start("wait")
            ahead.append(pending.result())
            pending = None

    if not ahead:
        arrived()
    waiting.clear()
    batch = ahead.popleft()
    if step - batch.drawn.updates > config.lag:
        raise VersionMismatch(f"a batch drawn after {batch.drawn.updates} updates came to step {step}, where lag = {config.lag} is allowed")
    clock.start("score")
    scored = gather(batch.chunks(cast, beside, config.algorithm.old_logprobs))
    correction = config.correction if config.lag else 0.0
    progress.within(f"training on {len(scored.samples.queries)} answers")
    stats, kl = learn(config, cast, scored, step, kl, beside, clock, before_publish=arrived, correction=correction)
    drawn = ahead[-1] if drawing and ahead else batch if drawing else None  # in this step
    return stats | {
        "policy/lag": step - batch.drawn.updates,
        "idle/rollout": max(0.0, 1 - (drawn.seconds if drawn else 0.0) / stats["seconds/step"]),
        "idle/trainer": stats.get("seconds/wait", 0.0) / stats["seconds/step"],
    }, kl


def draw_batch(
    config: OverlapRecipe,
    cast: Cast,
    prompts: Sequence[Prompt],
    tokenizer,
    beside: ThreadPoolExecutor,
    progress: Steps,
    waiting: Event,
    step: int,
    updates: int,
) -> Batch:
    """Draw the batch of `step` with the weights that the rollout workers have, of `updates` updates; it is judged as it comes.

    Models on processors would take those of the trainers: they judge once these are `waiting`, or the rollouts have drawn everything.
    """
    began = time.perf_counter()
    queries = draw_queries(prompts, tokenizer, step, config.algorithm, config.seed, config.attributes)
    chunks, judged, answers = [], [], Answers(progress, len(queries), f"batch {step + 1}: ")

    def judge(rows: np.ndarray, samples: Samples) -> None:
        judged.append(judge_chunk(cast, samples, tokenizer, beside))
        judged[-1]["scores_BA"].add_done_callback(lambda _: answers.scored(len(rows)))

    apart = any(model.resources.gpus for model in (config.reference, *config.reward.values()))
    for rows, completions in cast.rollout.generate([Request(q.prompt_ids, q.seed) for q in queries], config.sampling):
        chunks.append((rows, collect(queries, rows, completions)))
        answers.drawn(len(rows), sum(map(len, completions.response_ids)))
        if apart or waiting.is_set():
            for chunk in chunks[len(judged) :]:
                judge(*chunk)
    seconds = time.perf_counter() - began
    for chunk in chunks[len(judged) :]:
        judge(*chunk)
    return Batch(Drawn(step, updates, tuple(chunks)), tuple(judged), seconds)


def resumed(
    config: OverlapRecipe, cast: Cast, run: Run, prompts: Sequence[Prompt], tokenizer, beside: ThreadPoolExecutor
) -> list[Batch]:
    """The batches that were on their way at the last checkpoint, if there is one."""
    last = run.latest()
    if last is None:
        return []
    queries = {
        step: draw_queries(prompts, tokenizer, step, config.algorithm, config.seed, config.attributes)
        for step in range(last[0], last[0] + config.lag)
    }
    try:
        batches = read_ahead(last[1] / _AHEAD, queries)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise damaged(last[1] / _AHEAD, error) from None
    return [Batch(b, tuple(judge_chunk(cast, samples, tokenizer, beside) for _, samples in b.chunks), 0.0) for b in batches]


def write_with_ahead(cast: Cast, kl: AdaptiveKL, ahead: list[Drawn], folder: Path) -> None:
    """As write_checkpoint, with the batches that are on their way."""
    write_checkpoint(cast, kl, folder)
    write_ahead(folder / _AHEAD, ahead)


def main(
    recipe: Recipe = "",
    overrides: Set = None,
    out: Out = "",
    resume: Resume = False,
    skip_bad_rows: SkipBadRows = False,
) -> None:
    """Train a controllable policy with PPO, drawing each batch while the one before it trains."""
    raise typer.Exit(run_job(OverlapRecipe, train, recipe, overrides, out, {"skip_bad_rows": skip_bad_rows}, resume=resume))


if __name__ == "__main__":
    typer.run(main)
