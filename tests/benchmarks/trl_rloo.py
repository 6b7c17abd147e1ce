"""A step of RLOO by `ctrlrl ppo` beside a step by TRL: same policy, prompts, controls' spelling, lengths, batch, updates and reward.

    pip install --target /some/folder trl datasets        # TRL is not a dependency
    PYTHONPATH=/some/folder .venv/bin/python tests/benchmarks/trl_rloo.py --policy runs/demo/world/policy \
        --prompts runs/demo/world/train.jsonl --rewards runs/demo/world/reward [--held-out-prompts runs/demo/world/test.jsonl] [...]

Each round runs one after the other, each with the whole machine, and prints the median seconds of a step (the first is left out), samples a
second, the largest memory of all its processes together (proportional set size) and the mean reward of the last steps. With
--held-out-prompts the trained models are evaluated, too. TRL's trainer has its defaults but for what makes it faster here: no
recomputation of activations, float32, every core. It takes a machine's threads by one process, ctrlrl's kinds of workers by one each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ATTRIBUTES = ("helpful", "harmless")


def settings(given) -> list[str]:
    """What `ctrlrl ppo` is given beside the laptop's settings."""
    return [
        f"policy.model={given.policy}", f"prompts={given.prompts}", *(f"reward.{a}.model={given.rewards / a}" for a in ATTRIBUTES),
        f"steps={given.steps}", "checkpoint_every=100000", "algorithm.advantage=rloo", f"algorithm.samples_per_query={given.samples}",
        f"algorithm.queries_per_step={given.queries}", f"algorithm.epochs={given.epochs}", f"algorithm.minibatches={given.minibatches}",
        f"algorithm.kl.beta={given.beta}", "algorithm.old_logprobs=engine", f"policy.train.learning_rate={given.rate}",
        f"policy.train.micro_batch_tokens={given.micro_batch_tokens}", f"sampling.max_new_tokens={given.tokens}",
        f"rollout.engine.max_model_tokens={given.max_model_tokens}", *given.set,
    ]  # fmt: skip


def of_ctrlrl(given, folder: Path) -> dict:
    """Run `ctrlrl ppo`, or whatever job --job names."""
    from ctrlrl.runs import read_metrics

    overrides = [part for setting in settings(given) for part in ("--set", setting)]
    command = [sys.executable, "-m", "ctrlrl.cli", given.job, "--out", str(folder), *overrides]
    memory = watched(command, folder.with_suffix(".log"))
    rows = read_metrics(folder)
    parts = {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0] if name.startswith(("seconds/", "idle/"))}
    return {
        "seconds": [row["seconds/step"] for row in rows],
        "reward": [row["reward/mean"] for row in rows],
        "tokens": [row["response/length"] for row in rows],
        "memory": memory,
        "parts": parts,
    }


def of_trl(given, folder: Path) -> dict:
    """Run TRL's trainer in a process of its own."""
    command = [sys.executable, __file__, "--part", str(folder), *sys.argv[1:]]
    memory = watched(command, folder.with_suffix(".log"))
    return {**json.loads((folder / "steps.json").read_text()), "memory": memory}


def watched(command: list[str], log: Path) -> float:
    """Run to the end; returns the most memory, in MiB, of the process and all that it began."""
    most, over = [0.0], threading.Event()
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        watcher = threading.Thread(target=lambda: _watch(process.pid, most, over))
        watcher.start()
        code = process.wait()
        over.set()
        watcher.join()
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}:\n{log.read_text()[-3000:]}")
    return most[0]


def _watch(root: int, most: list[float], over: threading.Event) -> None:
    import psutil

    while not over.wait(2):
        try:
            family = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        total = 0
        for process in family:
            try:
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        most[0] = max(most[0], total / 2**20)


def train_by_trl(given, folder: Path) -> None:
    """The same run as TRL does it; writes steps.json and the model."""
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    from ctrlrl.control import CORNERS, Control
    from ctrlrl.data.sources import read_prompts
    from ctrlrl.models.loading import end_token_ids
    from ctrlrl.models.scorer import Scorer, ScorerConfig
    from ctrlrl.ppo.reward import control_reward
    from ctrlrl.prompts import controlled

    torch.set_num_threads(os.cpu_count())
    prompts, dice, rows = list(read_prompts(given.prompts)), np.random.default_rng(0), []
    for order in (dice.permutation(len(prompts)) for _ in range(given.steps * given.queries // len(prompts) + 1)):
        for i in order:
            control = CORNERS[int(dice.integers(len(CORNERS)))]
            told = {"plain": json.dumps(prompts[i].messages), "helpful": control.helpful, "harmless": control.harmless}
            rows.append({"prompt": controlled(prompts[i].messages, control.spell()), **told})
    scorers = [Scorer(ScorerConfig(model=str(given.rewards / a), dtype="float32")) for a in ATTRIBUTES]
    ends, rewards, lengths = set(end_token_ids(str(given.policy))), [], []

    def reward(prompts, completions, completion_ids, plain, helpful, harmless, **_):
        asked = [(json.loads(m), c[0]["content"].strip()) for m, c in zip(plain, completions, strict=True)]
        scores = torch.tensor(np.stack([scorer.score(asked) for scorer in scorers], 1), dtype=torch.float64)
        controls = torch.tensor([Control(*pair).levels for pair in zip(helpful, harmless, strict=True)], dtype=torch.float64)
        earned, _ = control_reward(controls, scores)
        finished = torch.tensor([len(ids) > 0 and ids[-1] in ends for ids in completion_ids])
        earned = torch.where(finished, earned, 0)  # as ctrlrl: an answer cut at the limit did not answer
        rewards.append(float(earned.mean()))
        lengths.append(float(np.mean([len(ids) for ids in completion_ids])))
        return earned.tolist()

    batch, times = given.queries * given.samples // given.minibatches, [time.perf_counter()]
    per_device = min(batch, given.per_device)
    config = RLOOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no",
        per_device_train_batch_size=per_device, gradient_accumulation_steps=batch // per_device,
        steps_per_generation=batch // per_device * given.minibatches, num_iterations=given.epochs, num_generations=given.samples,
        max_completion_length=given.tokens, temperature=1.0, beta=given.beta, learning_rate=given.rate, lr_scheduler_type="constant",
        max_steps=given.steps * given.epochs * given.minibatches, logging_steps=given.epochs * given.minibatches, disable_tqdm=True,
        max_grad_norm=1.0, epsilon=0.2,
    )  # fmt: skip
    per_step = given.epochs * given.minibatches

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            times[0] = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            if state.global_step % per_step == 0:
                times.append(time.perf_counter())

    trainer = RLOOTrainer(
        model=str(given.policy), reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows), callbacks=[Clock()],
        processing_class=AutoTokenizer.from_pretrained(given.policy, padding_side="left"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(folder / "model"))
    found = {"seconds": np.diff(times).tolist(), "reward": rewards, "tokens": lengths}
    (folder / "steps.json").write_text(json.dumps(found))


def evaluated(given, model: Path, out: Path) -> dict[str, float]:
    """MP of both attributes by the reward models of training, on prompts that it did not see."""
    recipe = Path(__file__).parents[2] / "jobs" / "recipes" / "demo_evaluate.toml"
    named = [f"judges.optimisation.{a}.model={given.rewards / a}" for a in ATTRIBUTES]
    overrides = [part for s in (f"model={model}", f"prompts={given.held_out_prompts}", *named) for part in ("--set", s)]
    command = [sys.executable, "-m", "ctrlrl.cli", "evaluate", "--recipe", str(recipe), "--out", str(out), *overrides]
    watched(command, out.with_suffix(".log"))
    return json.loads((out / "metrics.json").read_text())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--rewards", type=Path, required=True, help="a folder with the reward models helpful and harmless")
    parser.add_argument("--held-out-prompts", type=Path)
    parser.add_argument("--job", default="ppo")
    parser.add_argument("--set", action="append", default=[], help="further settings of ctrlrl's run")
    parser.add_argument("--only", choices=("ctrlrl", "trl"))
    for name, default in {
        "queries": 64, "samples": 4, "tokens": 48, "epochs": 2, "minibatches": 2, "steps": 8, "rounds": 1, "per_device": 128,
        "micro_batch_tokens": 8192, "max_model_tokens": 256,
    }.items():  # fmt: skip
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--rate", type=float, default=7e-4)
    parser.add_argument("--beta", type=float, default=0.05)
    given = parser.parse_args()
    if given.part:
        given.part.mkdir(parents=True)
        return train_by_trl(given, given.part)
    with tempfile.TemporaryDirectory() as folder:
        medians = {}
        for number in range(given.rounds):
            for name, run in {"trl": of_trl, "ctrlrl": of_ctrlrl}.items():
                if given.only in (None, name):
                    medians.setdefault(name, []).append(told(given, name, number, run, Path(folder, f"{name}{number}")))
    if len(medians) == 2:
        ours, theirs = (statistics.median(medians[name]) for name in ("ctrlrl", "trl"))
        print(f"a step: ctrlrl {ours:.2f} s, trl {theirs:.2f} s: {theirs / ours:.2f} times the samples a second")


def told(given, name: str, number: int, run, folder: Path) -> float:
    """One run and what is printed of it; returns its median seconds a step."""
    found = run(given, folder)
    median, last = statistics.median(found["seconds"][1:]), found["reward"][-max(1, given.steps // 4) :]
    print(
        f"round {number} {name:6}  {median:.2f} s a step ({min(found['seconds'][1:]):.2f} to {max(found['seconds'][1:]):.2f})  "
        f"{given.queries * given.samples / median:.1f} samples/s  {found['memory']:,.0f} MiB  "
        f"reward {statistics.mean(last):.3f}  tokens an answer {statistics.mean(found['tokens']):.1f}",
        *(f"{part} {seconds:.2f}" for part, seconds in found.get("parts", {}).items()),
        flush=True,
    )
    if given.held_out_prompts:
        found = evaluated(given, folder / "model", folder.with_name(folder.name + "-evaluation"))
        print("  on prompts not seen:", json.dumps(found), flush=True)
    return median


if __name__ == "__main__":
    main()
