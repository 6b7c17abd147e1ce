"""What `ctrlrl plan` says of a trainer's memory against what a trainer's process takes: the highest resident size (VmHWM) of two updates,
less what the process had after those of a model of next to nothing. Random weights, one rank on the CPU, no Ray.

    .venv/bin/python tests/benchmarks/plan.py                # all cases, each in a process of its own
    .venv/bin/python tests/benchmarks/plan.py --only 'lora'

Twice: with an allocator that gives what is freed back to the system, so that the size is that of what is in use; and with that of a
trainer's process (CPU_ENVIRONMENT), which keeps freed pages and so has gaps.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

MODELS = {
    "35M": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 1536,
            "vocab_size": 16384},
    "134M": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 2304,
             "vocab_size": 32000},
}  # fmt: skip
SMALLEST = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 128}
SETTINGS = {
    "zero 0": {"zero_stage": 0, "dtype": "float32"},
    "lora": {"zero_stage": 0, "dtype": "float32", "lora": {"rank": 16}},
    "zero 0, checkpointing": {"zero_stage": 0, "dtype": "float32", "gradient_checkpointing": True},
    "zero 2": {"zero_stage": 2, "dtype": "float32"},
    "zero 3": {"zero_stage": 3, "dtype": "float32"},
    "zero 0, bfloat16": {"zero_stage": 0, "dtype": "bfloat16"},
    "zero 2, bfloat16": {"zero_stage": 2, "dtype": "bfloat16"},
}
TOKENS, LENGTH, ROWS = 1024, 128, 16


def resident(key: str) -> int:
    """Bytes of a line of this process's status: VmRSS now, VmHWM the most since it was cleared."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measure(shape: dict, settings: dict) -> dict:
    """Planned and measured bytes of one case, in this process."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import ctrlrl.models.trainer as trainer
    from ctrlrl.data.batches import TokenBatch
    from ctrlrl.models.footprint import peak, trained
    from ctrlrl.objectives.likelihood import likelihood

    train = trainer.TrainerConfig(micro_batch_tokens=TOKENS, **settings)

    def made(shape: dict) -> trainer.Trainer:
        with tempfile.TemporaryDirectory() as folder:
            LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
            return trainer.Trainer("policy", folder, train)

    def updated(made: trainer.Trainer, vocabulary: int) -> None:
        rows = list(np.random.default_rng(0).integers(0, vocabulary, (ROWS, LENGTH)))
        made.train(TokenBatch(rows, np.ones(ROWS, np.int64), {}, {}), likelihood, [np.arange(ROWS)] * 2)

    trainer.join_world(0, 1, "127.0.0.1", int(os.environ["PORT"]), 60)
    updated(made(SMALLEST), SMALLEST["vocab_size"])  # what libraries load at their first use is not the model's
    gc.collect()
    planned, before = trained(LlamaConfig(**shape), "policy", train, 1), resident("VmRSS")
    large = made(shape)
    Path("/proc/self/clear_refs").write_text("5")  # nor is what the files that were read took
    updated(large, shape["vocab_size"])
    return {"planned": peak(planned), "phases": planned, "measured": resident("VmHWM") - before, "threads": torch.get_num_threads()}


def in_a_process(shape: dict, settings: dict, port: int, keeps: bool) -> dict:
    """`measure` in a process with the environment of a trainer; `keeps`: its allocator's settings, too."""
    from ctrlrl.models.trainer import CPU_ENVIRONMENT

    command = [sys.executable, __file__, "--case", json.dumps([shape, settings])]
    chosen = {key: value for key, value in CPU_ENVIRONMENT.items() if keeps or not key.startswith("MALLOC")}
    chosen |= {} if keeps else {"MALLOC_MMAP_THRESHOLD_": "65536"}
    environment = {**os.environ, **chosen, "PORT": str(port)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Print a line for every case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="part of a setting's name")
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(*json.loads(options.case))))
        return
    port = 20000 + os.getpid() % 20000
    for number, (setting, settings) in enumerate(SETTINGS.items()):
        for name, shape in MODELS.items():
            if options.only in setting:
                in_use, kept = (in_a_process(shape, settings, port + number, keeps) for keeps in (False, True))
                planned, measured, with_gaps = (size / 2**20 for size in (in_use["planned"], in_use["measured"], kept["measured"]))
                print(f"{name:5} {setting:22} planned {planned:6.0f} MiB, measured {measured:6.0f}: {planned / measured - 1:+.1%}; "
                      f"with freed pages kept {with_gaps:6.0f}", flush=True)


if __name__ == "__main__":
    main()
