"""Rows per second and memory of distillation over synthetic shards: python tests/benchmarks/distill.py --rows 20000000

Writes samples with answers of about 100 characters and scores of both attributes into --folder (once), then distils them in a process
of its own for each method and prints rows/s and the growth of its peak memory over the one before the first row was read.
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[2]))

from ctrlrl.data.distill import METHODS, ScoredSamples, distill
from ctrlrl.data.schemas import PROMPTS, SAMPLES, SCORES, conform
from ctrlrl.data.shards import ShardStore

K = 4  # samples a prompt and unit
UNITS = 8


def build(folder: Path, rows: int, shard_rows: int) -> ScoredSamples:
    """Shards in the order of generation: unit by unit, within it prompt by prompt, K samples each."""
    samples, *scores = (ShardStore(folder / name) for name in ("samples", "helpful", "harmless"))
    source = ScoredSamples(samples, *scores, folder / "prompts.parquet")
    prompts = -(-rows // (K * UNITS))
    ids = np.array([f"{key:016x}" for key in np.random.default_rng(0).integers(1 << 63, size=prompts).tolist()])
    folder.mkdir(parents=True, exist_ok=True)
    if not source.prompts.exists():
        texts = [f"Question number {i}: " + "what would you say about this? " * 3 for i in range(prompts)]
        messages = pa.array([[{"role": "user", "content": text}] for text in texts], PROMPTS.field("messages").type)
        pq.write_table(pa.table([pa.array(ids), messages, pa.array(["benchmark"] * prompts)], schema=PROMPTS), source.prompts)
    words = np.array(["Well, ", "I think ", "you should ", "never ", "always ", "ask ", "a friend ", "for help. "], object)
    shards = -(-rows // shard_rows)
    for store in (source.samples, source.scores[0], source.scores[1]):
        store.open_or_create({"benchmark": rows, "shard_rows": shard_rows}, shards=shards)
    for shard in source.scores[1].missing():
        rng = np.random.default_rng([1, shard])
        number = np.arange(shard * shard_rows, min((shard + 1) * shard_rows, rows))
        n, place = len(number), number // K
        key = {"prompt_id": pa.array(ids[place % prompts]), "unit": place // prompts, "index": number % K}
        pool = ["".join(words[pick]) + str(i) for i, pick in enumerate(rng.integers(len(words), size=(2000, 12)))]
        answers = pa.array(pool).take(pa.array(rng.integers(len(pool), size=n)))
        more = {"seed": number, "response": answers, "finish_reason": ["stop"] * n, "token_count": np.full(n, 25), "policy": ["p"] * n}
        source.samples.commit(shard, conform(pa.table(key | more), SAMPLES, "samples"), {})
        latent = rng.normal(size=(n, 2)) @ np.array([[2.0, 0.8], [0.0, 2.2]]) + np.array([0.3, 1.0])
        for store, score in ((source.scores[0], latent[:, 0]), (source.scores[1], latent[:, 1])):
            store.commit(shard, conform(pa.table(key | {"score": 1 / (1 + np.exp(-score))}), SCORES, "scores"), {})
    for store in (source.samples, source.scores[0], source.scores[1]):
        store.finish({})
        store.close()
    return source


def peak_memory() -> int:
    """Peak resident bytes of this process so far (getrusage would count the parent's, from before exec)."""
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))


def measure(folder: Path, method: str, memory: int) -> None:
    """Distil once and print the figures as JSON."""
    samples, *scores = (ShardStore(folder / name) for name in ("samples", "helpful", "harmless"))
    source = ScoredSamples(samples, *scores, folder / "prompts.parquet")
    before, began, cpu = peak_memory(), time.perf_counter(), time.process_time()
    report = distill(source, folder / method, method=method, seed=1, memory=memory)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    figures = {"method": method, "rows": report["rows"], "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)}
    figures |= {"rows_per_second": round(report["rows"]["before"] / seconds), "extra_MB": round((peak_memory() - before) / 2**20)}
    figures |= {"prompts_kept": report["prompts"]["share"], **report["entanglement"]}
    print(json.dumps(figures), flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rows", type=int, default=1_000_000)
    options.add_argument("--shard-rows", type=int, default=100_000)
    options.add_argument("--memory", type=int, default=1 << 29, help="the memory setting of distill, in bytes")
    options.add_argument("--folder", type=Path, default=Path("tests/benchmarks/results/distill"))
    options.add_argument("--methods", nargs="+", choices=METHODS, default=["moec", "oversampling", "vanilla"])
    options.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    folder = chosen.folder / f"{chosen.rows}-{chosen.shard_rows}"
    if chosen.measure:
        measure(folder, chosen.measure, chosen.memory)
        return
    build(folder, chosen.rows, chosen.shard_rows)
    for method in chosen.methods:
        own = ["--measure", method, "--rows", str(chosen.rows), "--shard-rows", str(chosen.shard_rows), "--memory", str(chosen.memory)]
        subprocess.run([sys.executable, __file__, *own, "--folder", str(chosen.folder)], check=True)


if __name__ == "__main__":
    main()
