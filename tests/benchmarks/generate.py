"""What self-generation costs end to end (generation, scoring, writing), as ratios within one run.

    .venv/bin/python tests/benchmarks/generate.py --world runs/demo/world [--chat MODEL --prompts FILE]

Prints: samples/s of `ctrlrl generate` / bare vllm.LLM.generate of the same requests, with the demo's models; and, with a chat model
(such as SmolLM2-135M) on prompts and answers of mixed lengths at top_p = 1, tokens/s / batched transformers.generate. Every measured
engine has one thread, and the same one in turn; the reward models run beside it, as they do in the job.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import ray

from actors.placement import ClusterConfig, Resources, connect
from ctrlrl.config import load
from ctrlrl.control import ATTRIBUTES
from ctrlrl.data.generation import Layout, Plan
from ctrlrl.data.sources import read_prompts
from ctrlrl.models.loading import end_token_ids
from ctrlrl.models.sampler import environment
from jobs.generate import GenerateRecipe, fitting, generate


@ray.remote
class Bare:
    """The engines without ctrlrl: what a script of twenty lines would do."""

    def start_vllm(self, model, engine):
        import torch

        torch._C._cpu._init_amx()
        from vllm import LLM

        self.llm = LLM(
            model=model, skip_tokenizer_init=True, dtype=engine.dtype, max_model_len=engine.max_model_tokens, enforce_eager=True,
            kv_cache_memory_bytes=int(engine.kv_cache_gib * 2**30), max_num_seqs=engine.max_concurrent, block_size=32,
            enable_chunked_prefill=False,  # vLLM's seeded sampling on CPU cannot split a prefill
        )  # fmt: skip

    def vllm(self, requests, sampling, ends):
        from vllm import SamplingParams

        params = [
            SamplingParams(temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_new_tokens, seed=seed,
                           detokenize=False, stop_token_ids=ends) for _, seed in requests
        ]  # fmt: skip
        self.llm.reset_prefix_cache()
        began = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids, _ in requests], params, use_tqdm=False)
        return sum(len(o.outputs[0].token_ids) for o in outputs), time.perf_counter() - began

    def start_transformers(self, model, engine):
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, engine.dtype)).eval()

    def transformers(self, requests, sampling, ends, batch=64):
        import torch

        began, tokens = time.perf_counter(), 0
        ordered = sorted((ids for ids, _ in requests), key=len)  # prompts of like length together: the least padding
        torch.manual_seed(0)
        for first in range(0, len(ordered), batch):
            part = ordered[first : first + batch]
            width = max(map(len, part))
            ids = torch.tensor([[ends[0]] * (width - len(p)) + p for p in part])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
            with torch.no_grad():
                out = self.model.generate(
                    ids, attention_mask=mask, do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0,
                    max_new_tokens=sampling.max_new_tokens, eos_token_id=ends, pad_token_id=ends[0],
                )[:, width:]  # fmt: skip
            ended = torch.isin(out, torch.tensor(ends))
            tokens += int(torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1]).sum())
        return tokens, time.perf_counter() - began


def bare(kind: str, config: GenerateRecipe) -> tuple[int, float]:
    """Tokens and seconds of the engine alone on all requests of `config`, after a warm-up."""
    prompts, rendered, _ = fitting(config, read_prompts(config.prompts, limit=config.max_prompts), skip=True)
    plan, ids = Plan(len(prompts), config.samples_per_prompt, config.shard, config.seed), [p.prompt_id for p in prompts]
    draws = [d for shard in range(config.units * plan.shards_per_unit) for d in plan.draws(shard, ids)]
    requests, ends = [(rendered[d.prompt].tolist(), d.seed) for d in draws], end_token_ids(config.policy)
    engine = Bare.options(**Resources().environment(environment(config.rollout.engine))).remote()
    ray.get(getattr(engine, f"start_{kind}").remote(config.policy, config.rollout.engine))
    ray.get(getattr(engine, kind).remote(requests[:8], config.sampling.model_copy(update={"max_new_tokens": 8}), ends))
    measured = ray.get(getattr(engine, kind).remote(requests, config.sampling, ends))
    ray.kill(engine)
    return measured


def ours(config: GenerateRecipe, folder: Path) -> tuple[int, float]:
    """Tokens and seconds of the job, from the moment its workers are ready to the last commit of samples."""
    config = config.model_copy(update={"out": str(folder), "skip_bad_rows": True})
    if generate(config):
        raise SystemExit("stopped")
    manifest = json.loads(Layout(folder).manifest.read_text())
    print(f"  the engine was busy {manifest['engine_s'] / manifest['wall_s']:.0%} of the time", flush=True)
    return manifest["counts"]["tokens"], manifest["wall_s"]


def compare(title: str, kind: str, config: GenerateRecipe, repetitions: int, goal: float) -> None:
    """Run both in turn and print the medians."""
    rates: dict[str, list[float]] = {"ctrlrl": [], kind: []}
    with tempfile.TemporaryDirectory() as folder:
        for repetition in range(repetitions):
            for name, call in ((kind, lambda: bare(kind, config)), ("ctrlrl", lambda r=repetition: ours(config, Path(folder) / str(r)))):
                tokens, seconds = call()
                rates[name].append(tokens / seconds)
                print(f"  {title}: {name} {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s", flush=True)
    mine, theirs = (statistics.median(rates[name]) for name in ("ctrlrl", kind))
    ratio = f"ratio {mine / theirs:.2f} (goal >= {goal})"
    print(f"{title}: ctrlrl generate {mine:,.0f} tokens/s, {kind} {theirs:,.0f} tokens/s, {ratio}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, required=True, help="folder of a built demo world")
    parser.add_argument("--chat", help="a chat model to compare with transformers.generate")
    parser.add_argument("--prompts", help="prompts of mixed lengths for it")
    parser.add_argument("--max-prompts", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--parts", default="demo,chat")
    given = parser.parse_args()
    connect(ClusterConfig(), {"all": [{"CPU": 6}]})
    rewards = [f'reward.{a}.model="{given.world / "reward" / a}"' for a in ATTRIBUTES]
    rewards += [f"reward.{a}.batch_tokens=2048" for a in ATTRIBUTES]  # small batches of tiny models stay in the CPU's cache
    if "demo" in given.parts:
        demo = [f"policy={given.world / 'policy'}", f"prompts={given.world / 'train.jsonl'}", "scale=2x", "shard=1024",
                "sampling.max_new_tokens=48", "rollout.engine.dtype=float32", "rollout.engine.max_model_tokens=256",
                "rollout.engine.kv_cache_gib=0.5"]  # fmt: skip
        compare("demo", "vllm", load(GenerateRecipe, None, [*rewards, *demo]), given.repetitions, 0.8)
    if given.chat and "chat" in given.parts:
        chat = [f"policy={given.chat}", f"prompts={given.prompts}", f"max_prompts={given.max_prompts}", "samples_per_prompt=1",
                "shard=256", "sampling.max_new_tokens=128", "sampling.top_p=1", "sampling.temperature=1",
                "rollout.engine.max_model_tokens=512", "rollout.engine.kv_cache_gib=0.5"]  # fmt: skip
        compare("chat", "transformers", load(GenerateRecipe, None, [*rewards, *chat]), given.repetitions, 1.5)


if __name__ == "__main__":
    main()
