"""Where the seconds of a publish go, and how many GB/s it moves.

    .venv/bin/python tests/benchmarks/publish.py [--sync gloo|ipc] [--layers 11] [--workers 1] [--ranks 1] [--stage 0]

Builds a random Llama of SmolLM2-135M's width (49,152 tokens; 11 layers are 269 MB in float32) in a temporary folder. Prints the median
seconds of a publish, the processor seconds that trainer and rollout workers spend on one, those of each part by itself, and the seconds
of a memory copy of the same bytes. Every process has one thread.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ray
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actors.placement import ClusterConfig, connect, reserve
from actors.policy import Policy, PolicyConfig
from actors.rollout import Rollout, RolloutConfig
from actors.sync import publish
from ctrlrl.models.probe import probe_of
from ctrlrl.models.sampler import EngineConfig
from ctrlrl.models.trainer import Trainer, TrainerConfig

CLUSTER = ClusterConfig()
ROOT = Path(__file__).parents[2]
VOCABULARY = 49_152
Seconds = tuple[float, float]  # by the clock, and of the process's processor time


def make_tokenizer(folder: str) -> None:
    """A tokenizer trained on this repository's documents."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>", "<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train([str(path) for path in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md"))], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="<end>")
    fast.chat_template = "{% for m in messages %}<s>{{ m.content }}<end>{% endfor %}"
    fast.save_pretrained(folder)


def make_model(folder: str, layers: int) -> None:
    """A random model with a tied head, and its tokenizer."""
    make_tokenizer(folder)
    shape = dict(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(**shape, tie_word_embeddings=True, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)


def timed(call: Callable[[], object]) -> Seconds:
    """What `call` takes in this process."""
    clock, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - clock, time.process_time() - processor


def gathering(trainer: Trainer, dtype: str) -> Seconds:
    """On a rank: what making the message takes."""
    return timed(lambda: trainer.weights(dtype, 1))


def reading(worker, message) -> tuple[Seconds, Seconds]:
    """In a rollout worker: what taking the message takes, and answering the probe."""
    sampler = worker.sampler
    load = timed(lambda: sampler.load_weights(message))
    return load, timed(lambda: sampler.logprobs(worker.probe))


def processor_s(pids: list[int]) -> float:
    """Processor seconds that these processes have spent, children apart."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")


def copying(size: int, repetitions: int) -> float:
    """Median seconds of a memory copy of `size` bytes."""
    source = np.random.default_rng(0).integers(0, 255, size=size, dtype=np.uint8)
    target = np.empty_like(source)
    return statistics.median(timed(lambda: np.copyto(target, source))[0] for _ in range(repetitions + 1))


def parts_of(policy: Policy, rollout: Rollout, model: str, repetitions: int) -> dict[str, list[Seconds]]:
    """Each part by itself, `repetitions` times."""
    probe, found = probe_of(model, exact=True), {}
    for version in range(rollout.version + 1, rollout.version + 1 + repetitions):
        began = time.perf_counter()
        message = policy.weights(rollout.dtype, version)
        ray.wait([message], fetch_local=False)
        whole = time.perf_counter() - began
        gather = policy._group.call(gathering, rollout.dtype)[0]

        def ask(worker, message=message):
            worker.__ray_call__.remote(lambda actor: setattr(actor, "probe", probe))
            return worker.__ray_call__.remote(reading, message)

        load, answer = rollout.pool.submit(ask).result()
        found.setdefault("trainer: gather, cast", []).append(gather)
        found.setdefault("trainer: gather, cast, put into the store", []).append((whole, float("nan")))
        found.setdefault("trainer: probe", []).append((timed(lambda: policy.probe(probe))[0], float("nan")))
        found.setdefault("worker: reload", []).append(load)
        found.setdefault("worker: probe", []).append(answer)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("layers", 11), ("workers", 1), ("ranks", 1), ("stage", 0), ("parts", 1), ("repetitions", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sync", default="store", choices=("store", "gloo", "ipc"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, given.layers)
        engine = EngineConfig(dtype="float32", max_model_tokens=256, kv_cache_gib=0.1, tensor_parallel=given.parts)
        config = RolloutConfig(workers=given.workers, engine=engine)
        train = PolicyConfig(model=folder, ranks=given.ranks, train=TrainerConfig(dtype="float32", zero_stage=given.stage))
        demands = {"rollout": config.bundles, "policy": train.bundles}
        connect(CLUSTER, demands)
        place = reserve(demands, CLUSTER)
        rollout, policy = Rollout(config, folder, place, CLUSTER, sync=given.sync), Policy(train, place, CLUSTER, temperature=1.0, seed=0)
        rollout.wait_ready()
        policy.wait_ready()
        for version in (1, 2):  # memory is touched for the first time
            size = publish(policy, rollout, version).bytes
        pids = policy.pids() + rollout.pids()
        before, taken = processor_s(pids), []
        for _ in range(given.repetitions):
            taken.append(publish(policy, rollout, rollout.version + 1).seconds)
        spent = (processor_s(pids) - before) / given.repetitions
        parts = parts_of(policy, rollout, folder, given.repetitions) if given.workers == 1 and given.sync == "store" else {}
        policy.close()
        rollout.close()
        place.release()
    seconds, copy = statistics.median(taken), copying(size, given.repetitions)
    rate = size / 1e9 / seconds
    print(f"{size / 1e6:.0f} MB: {seconds:.3f} s by the clock = {rate:.2f} GB/s, {spent:.3f} processor s; copy {copy:.3f} s")
    for name, rows in parts.items():
        clock, processor = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"  {name:44} {clock:.3f} s by the clock, {processor:.3f} processor s")


if __name__ == "__main__":
    main()
