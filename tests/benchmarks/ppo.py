"""What PPO's actors cost against the bare engines, as ratios within one run.

    .venv/bin/python tests/benchmarks/ppo.py --world runs/demo/world [--run runs/demo/ppo]

Prints: rollout tokens/s of the rollout actor / bare vllm.LLM.generate; training tokens/s through actor and DeepSpeed / a plain PyTorch
loop; and, of a finished run, the share of a step that neither generates, scores nor trains. Every measured process has one thread; each
figure is the median of the repetitions, taken in turn.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import ray
import torch

from actors.placement import ClusterConfig, Resources, connect, reserve
from actors.policy import Policy, PolicyConfig
from actors.rollout import Rollout, RolloutConfig
from ctrlrl.control import sample_corners
from ctrlrl.data.batches import TokenBatch, TokenOutputs
from ctrlrl.data.sources import read_prompts
from ctrlrl.models.loading import load_policy, load_tokenizer
from ctrlrl.models.sampler import EngineConfig, Request, SamplingConfig, environment
from ctrlrl.models.trainer import CPU_ENVIRONMENT, TrainerConfig
from ctrlrl.ppo.loss import policy_loss
from ctrlrl.prompts import render
from ctrlrl.runs import read_metrics

SAMPLING = SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=48)
ENGINE = EngineConfig(dtype="float32", max_model_tokens=256, kv_cache_gib=0.25)
TRAIN = TrainerConfig(learning_rate=1e-4, dtype="float32", zero_stage=0, layout="padded", micro_batch_tokens=16384)
CLUSTER = ClusterConfig()


@ray.remote
class Bare:
    """The engines without ctrlrl: what a script of twenty lines would do."""

    def start_vllm(self, model, engine):
        from vllm import LLM

        self.llm = LLM(
            model=model, skip_tokenizer_init=True, dtype=engine.dtype, max_model_len=engine.max_model_tokens, enforce_eager=engine.eager,
            kv_cache_memory_bytes=int(engine.kv_cache_gib * 2**30), max_num_seqs=engine.max_concurrent, block_size=32,
            gpu_memory_utilization=0.01,  # the cache's size is given: as in the rollout actor
            enable_chunked_prefill=torch.cuda.is_available(),  # vLLM's seeded sampling on CPU cannot split a prefill
        )  # fmt: skip

    def generate(self, requests, ends, sampling):
        from vllm import SamplingParams

        given = dict(temperature=1.0, max_tokens=sampling.max_new_tokens, logprobs=0, detokenize=False, stop_token_ids=ends)
        params = [SamplingParams(seed=r.seed, **given) for r in requests]
        began = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": list(r.prompt_ids)} for r in requests], params, use_tqdm=False)
        return sum(len(o.outputs[0].token_ids) for o in outputs) / (time.perf_counter() - began)

    def start_loop(self, model, dtype):
        from ctrlrl.models.forward import PolicyModule

        self.device, self.dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, dtype)
        self.module = PolicyModule(load_policy(model, "float32"), 1.0).to(self.device)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def train(self, batch, steps):
        from ctrlrl.models.forward import lay_out, micro_batch

        began = time.perf_counter()
        for rows in steps:
            part = batch.select(rows)
            inputs = lay_out(part, "padded", self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                outputs = TokenOutputs(*self.module(inputs))
            loss, _ = policy_loss(outputs, micro_batch(part, inputs, int(part.scored_lengths.sum()), len(part)), clip=0.2)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def rollout_ratio(
    model: str,
    requests: list[Request],
    repetitions: int,
    engine: EngineConfig = ENGINE,
    sampling: SamplingConfig = SAMPLING,
    resources: Resources = Resources(),  # noqa: B008 (frozen, as the others)
) -> dict[str, float]:
    """Tokens/s of the rollout actor and of bare vLLM on the same prompts. resources: of each of the two."""
    config = RolloutConfig(chunk=256, engine=engine, resources=resources)
    place = reserve({"rollout": [config.resources.bundle]}, CLUSTER)
    rollout = Rollout(config, model, place, CLUSTER)
    bare = Bare.options(**resources.environment(environment(engine))).remote()
    ray.get(bare.start_vllm.remote(model, engine))
    rollout.wait_ready()
    ends = [load_tokenizer(model).eos_token_id]
    ours, theirs = [], []
    for repetition in range(repetitions + 1):
        fresh = [Request(r.prompt_ids, r.seed + repetition * 10_000) for r in requests]
        theirs.append(ray.get(bare.generate.remote(fresh, ends, sampling)))
        began = time.perf_counter()
        tokens = sum(len(r) for _, completions in rollout.generate(fresh, sampling) for r in completions.response_ids)
        ours.append(tokens / (time.perf_counter() - began))
    ray.kill(bare)
    rollout.close()
    place.release()
    mine, bare_rate = (statistics.median(rates[1:]) for rates in (ours, theirs))  # the first call warms up
    return {"rollout actor tokens/s": mine, "bare vLLM tokens/s": bare_rate, "ratio (goal >= 0.9)": mine / bare_rate}


def answered(requests: list[Request], longest: int) -> TokenBatch:
    """Each prompt with an answer of random tokens, of a quarter of `longest` up to all of it, and what the policy's loss reads."""
    rng = np.random.default_rng(0)
    tokens = [np.concatenate([r.prompt_ids, rng.integers(3, 300, size=rng.integers(longest // 4, longest + 1))]) for r in requests]
    prompts = np.array([len(r.prompt_ids) for r in requests])
    columns = {
        n: [rng.normal(size=len(t) - p).astype(np.float32) for t, p in zip(tokens, prompts, strict=True)]
        for n in ("old_logprobs", "advantages")
    }
    return TokenBatch(tokens, prompts, columns, {})


def training_ratio(
    model: str,
    batch: TokenBatch,
    steps: list[np.ndarray],
    repetitions: int,
    train: TrainerConfig = TRAIN,
    resources: Resources = Resources(),  # noqa: B008 (frozen)
) -> dict[str, float]:
    """Tokens/s of the same optimiser steps through the policy's actor and in a plain loop, whose batches are padded. resources: of each."""
    config = PolicyConfig(model=model, resources=resources, train=train)
    place = reserve({"policy": [config.resources.bundle]}, CLUSTER)
    policy = Policy(config, place, CLUSTER, temperature=1.0, seed=0)
    bare = Bare.options(**resources.environment({} if resources.gpus else CPU_ENVIRONMENT)).remote()
    ray.get(bare.start_loop.remote(model, train.dtype))
    policy.wait_ready()
    ours, theirs = [], []
    for _ in range(repetitions + 1):
        theirs.append(ray.get(bare.train.remote(batch, steps)))
        began = time.perf_counter()
        policy.train(batch, partial(policy_loss, clip=0.2), steps)
        ours.append(time.perf_counter() - began)
    ray.kill(bare)
    policy.close()
    place.release()
    count = sum(len(batch.tokens[row]) for rows in steps for row in rows)
    mine, plain = statistics.median(ours[1:]), statistics.median(theirs[1:])
    return {"actor + DeepSpeed tokens/s": count / mine, "plain loop tokens/s": count / plain, "ratio (goal >= 0.85)": plain / mine}


def step_share(run: Path) -> dict[str, float]:
    """Share of the steps' seconds that neither generate, score nor train, the first step left out (engines warm up)."""
    rows = read_metrics(run)[1:]
    useful = sum(row[f"seconds/{phase}"] for row in rows for phase in ("generate", "score", "train"))
    total = sum(row["seconds/step"] for row in rows)
    return {"steps": len(rows), "seconds a step": total / len(rows), "share neither (goal <= 0.15)": 1 - useful / total}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, required=True, help="folder of a built demo world")
    parser.add_argument("--run", type=Path, help="a finished PPO run")
    parser.add_argument("--repetitions", type=int, default=5)
    given = parser.parse_args()
    connect(CLUSTER, {"all": [{"CPU": 8}]})
    model = str(given.world / "policy")
    tokenizer, prompts = load_tokenizer(model), list(read_prompts(given.world / "train.jsonl"))
    controls = sample_corners(512, 0)
    requests = [Request(tuple(render(tokenizer, prompts[i % len(prompts)].messages, c.spell())), i) for i, c in enumerate(controls)]
    for title, figures in (
        ("rollout", rollout_ratio(model, requests, given.repetitions)),
        ("training", training_ratio(model, answered(requests[:256], 32), np.split(np.arange(256), 4), given.repetitions)),
        *([("step", step_share(given.run))] if given.run else []),
    ):
        print(f"{title:10}" + "   ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
