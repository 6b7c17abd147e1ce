"""What ctrlrl costs on a GPU against the bare engines, and how much of the device it uses; it names the device.

    .venv-cuda/bin/python tests/benchmarks/cuda.py [--size 1b] [--parts rollout,training,publish,step] [--sync store]

Builds a random Llama in a temporary folder and prints, each as the median of repetitions taken in turn: tokens/s of the rollout actor / of
bare vllm.LLM.generate; of a trainer / of a plain PyTorch loop on the same padded batches; of the trainer in its own layout, with its share
of what the device reaches in one large matrix product, and (--peak-tflops, of the data sheet) of that: the MFU; GB/s of a publish; and, of
a PPO run of eight steps with all workers on one device, the share of a step that is neither generating, scoring nor training. In
bfloat16. On a machine without a GPU it measures the processors, in float32 (--size tiny tries its own code).
"""

# ruff: noqa: E402

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Not this folder, and before all else: on the path, a file called cuda.py hides NVIDIA's package of that name.
sys.path = [str(ROOT), *(place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent)]

import numpy as np
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from actors.placement import Resources, connect, reserve
from actors.policy import Policy, PolicyConfig
from actors.rollout import Rollout, RolloutConfig
from actors.sync import publish as publish_weights
from ctrlrl.config import load
from ctrlrl.models.loading import load_config, load_tokenizer
from ctrlrl.models.sampler import EngineConfig, Request, SamplingConfig
from ctrlrl.models.sizes import described
from ctrlrl.models.trainer import TrainerConfig
from ctrlrl.runs import read_metrics
from jobs.ppo import PPORecipe, train
from tests.benchmarks import ppo, publish

ON_GPU = torch.cuda.is_available()
DTYPE = "bfloat16" if ON_GPU else "float32"
SIZES = {"tiny": "hidden=64,layers=2,heads=2,kv_heads=1,vocabulary=49152,intermediate=96,tied=true"}
SAMPLING = SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=256 if ON_GPU else 16)
ENGINE = EngineConfig(dtype=DTYPE, max_model_tokens=1024, kv_cache_gib=4 if ON_GPU else 0.25, eager=not ON_GPU)
HALF, WHOLE = (Resources(cpus=1, gpus=share if ON_GPU else 0) for share in (0.5, 1))
STEPS = 8


def device_name() -> str:
    """Of the device that is measured."""
    if ON_GPU:
        return f"{torch.cuda.get_device_name(0)} ({torch.cuda.device_count()} here), CUDA {torch.version.cuda}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return f"{next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')), 'a processor')}, no GPU"


def make_model(folder: Path, size: str) -> str:
    """A random policy and, beside it, a random reward model; both with a tokenizer trained on this repository's documents."""
    config = described(SIZES.get(size, size))
    for name, kind, labels in (("policy", LlamaForCausalLM, 2), ("reward", LlamaForSequenceClassification, 1)):
        publish.make_tokenizer(str(folder / name))
        torch.manual_seed(0)
        config.num_labels, config.pad_token_id, config.bos_token_id, config.eos_token_id = labels, 0, 1, 2
        kind(config).to(torch.bfloat16).save_pretrained(folder / name)
    return str(folder / "policy")


def flops(model: str, batch, rows: np.ndarray) -> float:
    """Of forward and backward on rows of a batch: six a weight and token (of the head for scored tokens alone), and causal attention."""
    config, part = load_config(model), batch.select(rows)
    with torch.device("meta"):
        whole = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    head = config.vocab_size * config.hidden_size
    body = whole - head * (1 if config.tie_word_embeddings else 2)
    lengths = np.array([len(tokens) for tokens in part.tokens], dtype=np.float64)
    attention = config.num_hidden_layers * config.hidden_size * (lengths**2).sum()
    return 6 * (body * lengths.sum() + head * part.scored_lengths.sum() + attention)


def product_rate(size: int) -> float:
    """Most operations a second that a product of two square matrices reaches here, in the dtype of training."""
    a, b = (torch.randn(size, size, device="cuda" if ON_GPU else "cpu").to(getattr(torch, DTYPE)) for _ in range(2))

    def once() -> float:
        began = time.perf_counter()
        a @ b
        if ON_GPU:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return 2 * size**3 / min(once() for _ in range(8))


def training(model: str, requests: list[Request], given) -> dict[str, float]:
    """The trainer against a plain loop, and in the layout that it chooses."""
    batch, steps = ppo.answered(requests[:256], SAMPLING.max_new_tokens), np.split(np.arange(256), 4)
    settings = dict(learning_rate=1e-5, dtype=DTYPE, zero_stage=1 if ON_GPU else 0, micro_batch_tokens=16384, gradient_checkpointing=False)
    ratio = ppo.training_ratio(model, batch, steps, given.repetitions, TrainerConfig(layout="padded", **settings), HALF)
    config = PolicyConfig(model=model, resources=WHOLE, train=TrainerConfig(layout="auto", **settings))
    place = reserve({"policy": config.bundles}, ppo.CLUSTER)
    policy, seconds = Policy(config, place, ppo.CLUSTER, temperature=1.0, seed=0), []
    policy.wait_ready()
    for _ in range(given.repetitions + 1):
        began = time.perf_counter()
        policy.train(batch, ppo.partial(ppo.policy_loss, clip=0.2), steps)
        seconds.append(time.perf_counter() - began)
    policy.close()
    place.release()
    rate = flops(model, batch, np.arange(256)) / statistics.median(seconds[1:])
    reached = product_rate(8192 if ON_GPU else 512)
    figures = {"own layout tokens/s": sum(map(len, batch.tokens)) / statistics.median(seconds[1:]), "TFLOP/s": rate / 1e12}
    figures["share of a large product's"] = rate / reached
    return ratio | figures | ({"MFU": rate / 1e12 / given.peak_tflops} if given.peak_tflops else {})


def publishing(model: str, given) -> dict[str, float]:
    """Publishes by one way, to a worker on the same device, or on another where that is what the way needs."""
    resources = WHOLE if given.sync == "nccl" else HALF
    rollouts = RolloutConfig(engine=ENGINE, resources=resources)
    trained = PolicyConfig(model=model, resources=resources, train=TrainerConfig(dtype=DTYPE, zero_stage=1 if ON_GPU else 0))
    place = reserve({"rollout": rollouts.bundles, "policy": trained.bundles}, ppo.CLUSTER)
    rollout = Rollout(rollouts, model, place, ppo.CLUSTER, sync=given.sync)
    policy = Policy(trained, place, ppo.CLUSTER, temperature=1.0, seed=0)
    rollout.wait_ready()
    policy.wait_ready()
    done = [publish_weights(policy, rollout, version) for version in range(1, given.repetitions + 3)][2:]  # the first ones set up
    policy.close()
    rollout.close()
    place.release()
    seconds = statistics.median(one.seconds for one in done)
    return {"MB": done[0].bytes / 1e6, "seconds": seconds, "GB/s": done[0].bytes / 1e9 / seconds}


def stepping(model: str, folder: Path) -> dict[str, float]:
    """A PPO run by the job itself, all of its workers on one device (on the processors: with a core each)."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Explain in {n} words how to bake bread."}) + "\n" for n in range(2, 130)))
    share, reward = 0.125 if ON_GPU else 0, str(folder / "reward")
    settings = {
        "out": str(folder / "run"), "prompts": str(prompts), "steps": STEPS, "checkpoint_every": 100, "value": "head",
        "policy.model": model, "policy.resources.gpus": 4 * share, "rollout.resources.gpus": share, "reference.resources.gpus": share,
        "policy.train.dtype": DTYPE, "policy.train.learning_rate": 1e-6, "policy.train.zero_stage": 1 if ON_GPU else 0,
        "policy.train.micro_batch_tokens": 16384, "reference.dtype": DTYPE, "algorithm.truncated": "score",
        "rollout.engine": ENGINE.model_dump(), "sampling.max_new_tokens": SAMPLING.max_new_tokens,
        "algorithm.queries_per_step": 256 if ON_GPU else 32, "algorithm.minibatches": 4,
    }  # fmt: skip
    for attribute in ("helpful", "harmless"):
        settings |= {f"reward.{attribute}.model": reward, f"reward.{attribute}.dtype": DTYPE, f"reward.{attribute}.resources.gpus": share}
    nested = {}
    for key, value in settings.items():
        *sections, leaf = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    if train(load(PPORecipe, None, [], nested)):
        raise SystemExit("stopped")
    tokens = statistics.median(row["tokens_per_s/step"] for row in read_metrics(folder / "run")[1:])
    return ppo.step_share(folder / "run") | {"tokens/s of a step": tokens}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="135m", help="tiny, 135m, 1b, 3b, 8b, or hidden=…,layers=… as of ctrlrl plan --sizes")
    parser.add_argument("--parts", default="rollout,training,publish,step")
    parser.add_argument("--sync", default="store", help="the way of the publishes")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of the device in bfloat16 without sparsity, by its data sheet")
    given = parser.parse_args()
    print(f"device     {device_name()}; {given.size} parameters in {DTYPE}", flush=True)
    connect(ppo.CLUSTER, {"all": [{"CPU": 8}]})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder, given.size)
        tokenizer = load_tokenizer(model)
        texts = [f"Explain in {n} words how to bake bread, and why it needs {'a' * (n % 40)} salt." for n in range(512 if ON_GPU else 256)]
        requests = [Request(tuple(tokenizer(text)["input_ids"]), seed) for seed, text in enumerate(texts)]
        parts = {
            "rollout": lambda: ppo.rollout_ratio(model, requests, given.repetitions, ENGINE, SAMPLING, HALF),
            "training": lambda: training(model, requests, given),
            "publish": lambda: publishing(model, given),
            "step": lambda: stepping(model, folder),
        }
        for title in given.parts.split(","):
            print(f"{title:10} " + "   ".join(f"{name} {value:.4g}" for name, value in parts[title]().items()), flush=True)


if __name__ == "__main__":
    main()
