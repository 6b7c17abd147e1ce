"""What the parts of a PPO step take in the job, where all kinds of workers live on the same cores, and each by itself.

    .venv/bin/python tests/benchmarks/turns.py --recipe jobs/recipes/demo_ppo.toml --set policy.model=runs/demo/world/policy \
        --set prompts=runs/demo/world/train.jsonl --set reward.helpful.model=runs/demo/world/reward/helpful --set … [--steps 6]

Takes every setting of `ctrlrl ppo`. A part by itself is the same call on the same inputs while the processes of all other workers are
stopped (SIGSTOP): generate, then each of the models that judge what was drawn, then the updates, then the publish. Prints the medians of
the steps, the first left out, and their ratios; judging overlaps with generating in the job, so that these two are one part. Models that
work at the same time in the job, a value model beside the policy, stand with the sum of their times.
"""

import argparse
import os
import signal
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import contextmanager
from functools import partial

from actors.sync import publish
from actors.value import Value
from ctrlrl.data.batches import TokenBatch
from ctrlrl.models.sampler import Request
from ctrlrl.ppo.experience import draw_queries, make_experience, minibatch_rows
from ctrlrl.ppo.loss import value_loss
from ctrlrl.ppo.reward import AdaptiveKL
from jobs.parts.cast import Cast, PPORecipe
from jobs.parts.launch import background
from jobs.parts.settings import settled
from jobs.ppo import collect, gather, objective, ppo_step, score_chunk, train


@contextmanager
def alone(cast: Cast, kept: Collection[str]):
    """The workers of these kinds, all others stopped."""
    kinds = {**cast.pools, "policy": cast.policy, **({"value": cast.value} if isinstance(cast.value, Value) else {})}
    stopped = [pid for name, handle in kinds.items() if name not in kept for pid in handle.pids()]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


def seconds(call: Callable[[], object]) -> tuple[object, float]:
    """What a call returns, and how long it took."""
    began = time.perf_counter()
    return call(), time.perf_counter() - began


def step_by_itself(config: PPORecipe, cast: Cast, prompts, tokenizer, step: int, beside) -> dict[str, float]:
    """Seconds of each part of one step, none beside another."""
    found, algorithm = {}, config.algorithm
    queries = draw_queries(prompts, tokenizer, step, algorithm, config.seed, config.attributes)
    requests = [Request(q.prompt_ids, q.seed) for q in queries]
    with alone(cast, ["rollout"]):
        drawn, found["generate"] = seconds(lambda: list(cast.rollout.generate(requests, config.sampling)))
    chunks = [(rows, collect(queries, rows, completions)) for rows, completions in drawn]
    texts = [tokenizer.batch_decode(samples.response_ids, skip_special_tokens=True) for _, samples in chunks]
    told = [
        [(q.messages, text.strip()) for q, text in zip(samples.queries, said, strict=True)]
        for (_, samples), said in zip(chunks, texts, strict=True)
    ]
    batches: list[TokenBatch] = [samples.token_batch() for _, samples in chunks]
    for attribute, reward in cast.rewards.items():
        with alone(cast, [f"reward.{attribute}"]):
            found[f"judge {attribute}"] = seconds(lambda model=reward: [model.score(part) for part in told])[1]
    with alone(cast, ["reference", "policy"]):
        found["reference"] = seconds(lambda: [cast.reference.logprobs(batch) for batch in batches])[1]
    if algorithm.old_logprobs == "trainer":
        with alone(cast, ["policy"]):
            found["old logprobs"] = seconds(lambda: [cast.policy.logprobs(batch) for batch in batches])[1]
    if isinstance(cast.value, Value):
        with alone(cast, ["value"]):
            found["values"] = seconds(lambda: [cast.value.values(batch) for batch in batches])[1]
    scored = gather([(rows, samples, score_chunk(cast, samples, tokenizer, beside, algorithm.old_logprobs)) for rows, samples in chunks])
    kl = AdaptiveKL(algorithm.kl.beta)
    batch = make_experience(scored, algorithm, kl.beta, 0.0, config.attributes).batch
    steps = minibatch_rows(len(queries), step, algorithm, config.seed)
    with alone(cast, ["policy"]):
        found["train"] = seconds(lambda: cast.policy.train(batch, objective(config, kl), steps))[1]
    if isinstance(cast.value, Value):
        of_value = partial(value_loss, clip=algorithm.value_clip, factor=algorithm.value_factor)
        with alone(cast, ["value"]):
            found["train value"] = seconds(lambda: cast.value.train(batch, of_value, steps))[1]
    with alone(cast, ["policy", "rollout"]):
        found["sync"] = seconds(lambda: publish(cast.policy, cast.rollout, step + 1))[1]
    return found


def measured(config: PPORecipe, cast: Cast, run, prompts, tokenizer, interim, progress, stop) -> None:
    """In the place of the job's steps: as the job does it and by itself, in turn."""
    job, apart, kl = defaultdict(list), defaultdict(list), AdaptiveKL(config.algorithm.kl.beta)
    with background(32) as beside:
        for step in range(config.steps):
            if step % 2:
                for part, spent in step_by_itself(config, cast, prompts, tokenizer, step, beside).items():
                    apart[part].append(spent)
                continue
            stats, kl = ppo_step(config, cast, prompts, tokenizer, step, kl, beside, progress)
            for part in ("generate", "score", "experience", "train", "sync", "step"):
                job[part].append(stats[f"seconds/{part}"])
    report(*({part: statistics.median(found[1:]) for part, found in kind.items()} for kind in (job, apart)))


def report(job: dict[str, float], apart: dict[str, float]) -> None:
    """The parts in the job beside their times alone."""
    print("alone:", ", ".join(f"{part} {spent:.2f}" for part, spent in apart.items()), "s", flush=True)
    trained = {part: spent for part, spent in apart.items() if part in ("train", "train value", "sync")}
    scored = sum(spent for part, spent in apart.items() if part not in trained)
    rows = {
        "generate and score": (job["generate"] + job["score"], scored),
        "train": (job["train"], sum(spent for part, spent in trained.items() if part != "sync")),
        "sync": (job["sync"], apart["sync"]),
        "step": (job["step"], sum(apart.values())),
    }
    for part, (together, single) in rows.items():
        print(f"{part:20} in the job {together:.2f} s, alone {single:.2f} s: {together / single:.2f}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="", help="as of ctrlrl ppo")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", type=int, default=8, help="every other one by itself")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*given.set, f"steps={given.steps}", "checkpoint_every=1000000"]
        config = settled(PPORecipe, given.recipe, overrides, {"out": f"{folder}/run"}, resume=False)
        train(config, steps=measured)


if __name__ == "__main__":
    main()
