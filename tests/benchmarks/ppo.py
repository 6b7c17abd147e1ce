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
CLUSTER = ClusterConfig()


@ray.remote
class Bare:
    """The engines without ctrlrl: what a script of twenty lines would do."""

    def start_vllm(self, model):
        from vllm import LLM

        self.llm = LLM(
            model=model, skip_tokenizer_init=True, dtype=ENGINE.dtype, max_model_len=ENGINE.max_model_tokens, enforce_eager=True,
            kv_cache_memory_bytes=int(ENGINE.kv_cache_gib * 2**30), max_num_seqs=ENGINE.max_concurrent, block_size=32,
            enable_chunked_prefill=False,  # vLLM's seeded sampling on CPU cannot split a prefill
        )  # fmt: skip

    def generate(self, requests, ends):
        from vllm import SamplingParams

        params = [
            SamplingParams(temperature=1.0, max_tokens=48, seed=r.seed, logprobs=0, detokenize=False, stop_token_ids=ends) for r in requests
        ]
        began = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": list(r.prompt_ids)} for r in requests], params, use_tqdm=False)
        return sum(len(o.outputs[0].token_ids) for o in outputs) / (time.perf_counter() - began)

    def start_loop(self, model):
        from ctrlrl.models.forward import PolicyModule

        self.module = PolicyModule(load_policy(model, "float32"), 1.0)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def train(self, batch, steps):
        from ctrlrl.models.forward import lay_out, micro_batch

        began = time.perf_counter()
        for rows in steps:
            part = batch.select(rows)
            inputs = lay_out(part, "padded", torch.device("cpu"))
            outputs = TokenOutputs(*self.module(inputs))
            loss, _ = policy_loss(outputs, micro_batch(part, inputs, int(part.scored_lengths.sum()), len(part)), clip=0.2)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
        return time.perf_counter() - began


def rollout_ratio(model: str, requests: list[Request], repetitions: int) -> dict[str, float]:
    """Tokens/s of the rollout actor and of bare vLLM on the same prompts."""
    config = RolloutConfig(chunk=256, engine=ENGINE)
    place = reserve({"rollout": [config.resources.bundle]}, CLUSTER)
    rollout = Rollout(config, model, place, CLUSTER)
    bare = Bare.options(**Resources().environment(environment(ENGINE))).remote()
    ray.get(bare.start_vllm.remote(model))
    rollout.wait_ready()
    ends = [load_tokenizer(model).eos_token_id]
    ours, theirs = [], []
    for repetition in range(repetitions + 1):
        fresh = [Request(r.prompt_ids, r.seed + repetition * 10_000) for r in requests]
        theirs.append(ray.get(bare.generate.remote(fresh, ends)))
        began = time.perf_counter()
        tokens = sum(len(r) for _, completions in rollout.generate(fresh, SAMPLING) for r in completions.response_ids)
        ours.append(tokens / (time.perf_counter() - began))
    ray.kill(bare)
    rollout.close()
    place.release()
    mine, bare_rate = (statistics.median(rates[1:]) for rates in (ours, theirs))  # the first call warms up
    return {"rollout actor tokens/s": mine, "bare vLLM tokens/s": bare_rate, "ratio (goal >= 0.9)": mine / bare_rate}


def training_ratio(model: str, requests: list[Request], repetitions: int) -> dict[str, float]:
    """Seconds of the same optimiser steps through the policy's actor and in a plain loop."""
    rng = np.random.default_rng(0)
    tokens = [np.concatenate([r.prompt_ids, rng.integers(3, 300, size=rng.integers(8, 33))]) for r in requests[:256]]
    prompts = np.array([len(r.prompt_ids) for r in requests[:256]])
    columns = {
        n: [rng.normal(size=len(t) - p).astype(np.float32) for t, p in zip(tokens, prompts, strict=True)]
        for n in ("old_logprobs", "advantages")
    }
    batch, steps = TokenBatch(tokens, prompts, columns, {}), [np.arange(i * 64, i * 64 + 64) for i in range(4)]
    config = PolicyConfig(
        model=model, train=TrainerConfig(learning_rate=1e-4, dtype="float32", zero_stage=0, layout="padded", micro_batch_tokens=16384)
    )
    place = reserve({"policy": [config.resources.bundle]}, CLUSTER)
    policy = Policy(config, place, CLUSTER, temperature=1.0, seed=0)
    bare = Bare.options(**Resources().environment(CPU_ENVIRONMENT)).remote()
    ray.get(bare.start_loop.remote(model))
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
    count = sum(map(len, tokens))
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
        ("training", training_ratio(model, requests, given.repetitions)),
        *([("step", step_share(given.run))] if given.run else []),
    ):
        print(f"{title:10}" + "   ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
