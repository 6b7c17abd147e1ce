"""What offline training costs, as ratios within one run: packing, ExMATE, and the memory of chunked logprobs.

    .venv/bin/python tests/benchmarks/training.py [--model DIRECTORY] [--rounds 5]

Prints: training tokens/s packed / padded, on lengths drawn from a log-normal distribution (mean 80, at most 512), padded once in the
order of arrival and once sorted by length as ctrlrl does; seconds of an ExMATE step / a CLM step on the same rows; extra peak memory of
chunked logprobs / of full logits, forward and backward, 8,192 tokens and a vocabulary of 49,152. Without --model a random Llama
of 14 million parameters is trained. One process, one thread; figures are medians of rounds taken in turn.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ctrlrl.data.batches import TokenBatch, plan_micro_batches
from ctrlrl.models.forward import PolicyModule, lay_out, micro_batch
from ctrlrl.models.layout import settle
from ctrlrl.models.loading import load_policy
from ctrlrl.objectives.exmate import exmate, exmate_columns
from ctrlrl.objectives.likelihood import likelihood
from ctrlrl.tensors import token_logprobs

BUDGET = 2048  # tokens of a micro-batch


def random_model():
    torch.manual_seed(0)
    sizes = dict(vocab_size=8192, hidden_size=320, intermediate_size=864, num_hidden_layers=8, num_attention_heads=5)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=5, max_position_embeddings=1024))


def lengths_of(count, seed=0):
    """Log-normal with mean 80 (σ = 1), cut to [8, 512]."""
    drawn = np.random.default_rng(seed).lognormal(np.log(80) - 0.5, 1.0, count)
    return np.clip(drawn, 8, 512).astype(int)


def batch_of(lengths, vocabulary, seed=1):
    rng = np.random.default_rng(seed)
    return TokenBatch([rng.integers(3, vocabulary, size=n) for n in lengths], np.maximum(1, lengths // 3), {}, {})


def train_once(module, optimizer, batch, layout, plan, loss=likelihood):
    """Seconds of one optimiser step over the micro-batches of `plan`."""
    began = time.perf_counter()
    for rows in plan:
        part = batch.select(rows)
        inputs = lay_out(part, layout, torch.device("cpu"))
        value, _ = loss(module.outputs_type(*module(inputs)), micro_batch(part, inputs, int(batch.scored_lengths.sum()), len(batch)))
        value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - began


def arrival_order(lengths):
    """Padded micro-batches of neighbouring rows, as many as keep rows x longest within the budget."""
    plan, current = [], []
    for row, length in enumerate(lengths):
        longest = max([length, *(lengths[i] for i in current)])
        if current and longest * (len(current) + 1) > BUDGET:
            plan.append(np.array(current))
            current = []
        current.append(row)
    return [*plan, np.array(current)]


def packing(make, rounds):
    lengths = lengths_of(128)
    plans = {
        "packed": ("packed", plan_micro_batches(lengths, BUDGET)),
        "padded, sorted": ("padded", plan_micro_batches(lengths, BUDGET, padded=True)),
        "padded, in order of arrival": ("padded", arrival_order(lengths)),
    }
    modules = {layout: make(layout) for layout in ("packed", "padded")}
    optimizers = {layout: torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True) for layout, module in modules.items()}
    batch = batch_of(lengths, modules["packed"].causal.config.vocab_size)
    seconds = {name: [] for name in plans}
    for turn in range(rounds + 1):
        for name, (layout, plan) in plans.items():
            spent = train_once(modules[layout], optimizers[layout], batch, layout, plan)
            seconds[name] += [spent] if turn else []
    rates = {name: lengths.sum() / statistics.median(times) for name, times in seconds.items()}
    print(f"{len(lengths)} sequences, mean {lengths.mean():.0f}, longest {lengths.max()} tokens")
    for name, rate in rates.items():
        print(f"  {name:30} {rate:8,.0f} tokens/s   packed / this {rates['packed'] / rate:.2f}")


def contrast(make, rounds):
    """ExMATE trains two sequences where CLM trains one."""
    module = make("packed")
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
    lengths = lengths_of(64, 2)
    clm = batch_of(lengths, module.causal.config.vocab_size)
    twice = clm.select(np.repeat(np.arange(len(lengths)), 2))
    pairs = TokenBatch(twice.tokens, twice.prompt_lengths, {}, exmate_columns(np.tile([1, 0], len(lengths))))
    seconds = {"clm": [], "exmate": []}
    for turn in range(rounds + 1):
        for name, batch, loss in (("clm", clm, likelihood), ("exmate", pairs, exmate)):
            plan = plan_micro_batches(np.array([len(t) for t in batch.tokens]), BUDGET)
            spent = train_once(module, optimizer, batch, "packed", plan, loss)
            seconds[name] += [spent] if turn else []
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = medians["exmate"] / medians["clm"]
    print(f"a step of 64 rows: CLM {medians['clm']:.2f} s, ExMATE {medians['exmate']:.2f} s, ratio {ratio:.2f}")


def peak(kind, tokens=8192, vocabulary=49152):
    """MiB by which forward and backward of the logprobs of random targets exceed inputs, outputs and their gradients."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 576, requires_grad=True), torch.randn(vocabulary, 576, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    for leaf in (hidden, weight):
        leaf.grad = torch.zeros_like(leaf)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if kind == "chunked":
        logprobs, _ = token_logprobs(hidden, weight, targets)
    else:
        logprobs = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])
    logprobs.sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory():
    extra = {}
    for kind in ("chunked", "full"):
        found = subprocess.run([sys.executable, __file__, "--peak", kind], capture_output=True, text=True, check=True)
        extra[kind] = float(found.stdout)
    ratio = extra["chunked"] / extra["full"]
    print(f"extra peak memory: chunked {extra['chunked']:,.0f} MiB, full logits {extra['full']:,.0f} MiB, ratio {ratio:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", choices=("chunked", "full"), help="used by the script itself, in a process of its own")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        print(peak(arguments.peak))
        return

    def make(layout):
        model = load_policy(arguments.model, "float32") if arguments.model else random_model()
        module = PolicyModule(model, 1.0).train()
        settle(module, "this model", layout, torch.device("cpu"))
        return module

    packing(make, arguments.rounds)
    contrast(make, arguments.rounds)
    memory()


if __name__ == "__main__":
    main()
