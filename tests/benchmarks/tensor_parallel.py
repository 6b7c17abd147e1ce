"""What it costs on CPUs to split a rollout engine into two processes: tokens/s of one engine with two threads and of one with two parts.

    .venv/bin/python tests/benchmarks/tensor_parallel.py --model runs/demo/world/policy

Both have the same processors, and draw the same answers in turn. On GPUs an engine is split because a model does not fit one; on CPUs there
is no such reason, and what is measured is the code that is the same in both.
"""

import argparse
import statistics

import numpy as np

from actors.crew import start_crew
from actors.placement import ClusterConfig, Resources
from actors.rollout import RolloutConfig
from ctrlrl.models.loading import load_config
from ctrlrl.models.sampler import EngineConfig, Request, SamplingConfig

THREADS = 2


def rate(crew, requests: list[Request], sampling: SamplingConfig) -> tuple[float, list[np.ndarray]]:
    """Tokens/s of the engine on one call, and the answers."""
    drawn = crew.rollout.generate_apart(requests, sampling).result()
    return sum(map(len, drawn.response_ids)) / drawn.seconds, drawn.response_ids


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    for name, default in (("requests", 64), ("tokens", 96), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    words = load_config(given.model).vocab_size
    prompts = np.random.default_rng(0).integers(3, words, size=(given.requests, 24)).tolist()
    requests = [Request(tuple(prompt), seed) for seed, prompt in enumerate(prompts)]
    sampling, cluster = SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=given.tokens), ClusterConfig()
    found, answers = {1: [], 2: []}, {}
    for parts in (1, 2, 1, 2):  # one at a time: two would be in each other's way
        engine = EngineConfig(dtype="float32", max_model_tokens=24 + given.tokens, kv_cache_gib=0.25, tensor_parallel=parts)
        config = RolloutConfig(engine=engine, resources=Resources(cpus=THREADS, threads=THREADS))
        with start_crew(cluster, {}, config, given.model) as crew:
            crew.wait_ready()
            rate(crew, requests, sampling)  # memory is touched for the first time
            for _ in range(given.rounds):
                speed, answers[parts] = rate(crew, requests, sampling)
                found[parts].append(speed)
    equal = sum(np.array_equal(a, b) for a, b in zip(answers[1], answers[2], strict=True))
    one, two = (statistics.median(found[parts]) for parts in (1, 2))
    print(f"one process, {THREADS} threads: {one:,.0f} tokens/s ({min(found[1]):,.0f} to {max(found[1]):,.0f})")
    print(f"two parts, a thread each: {two:,.0f} tokens/s ({min(found[2]):,.0f} to {max(found[2]):,.0f}) = {two / one:.2f}")
    print(f"{equal} of {len(requests)} answers are equal")


if __name__ == "__main__":
    main()
