"""Builds the demo world in a folder: prompts, a tiny policy and four reward models, from a seed, without any download; cached."""
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ctrlrl.control import ATTRIBUTES
from ctrlrl.demo.corpus import Judged, conversations, preferences
from ctrlrl.demo.training import raw_scores, train_policy, train_reward_model
from ctrlrl.demo.world import CELLS, World, make_world
from ctrlrl.errors import RunError
from ctrlrl.prompts import render
from ctrlrl.seeds import derive_seed

JUDGES = tuple(f"{judge}/{attribute}" for judge in ("reward", "held_out") for attribute in ATTRIBUTES)
CELL_NAMES = {cell: f"{'helpful' if cell[0] else 'unhelpful'}, {'safe' if cell[1] else 'unsafe'}" for cell in CELLS}


@dataclass(frozen=True)
class WorldSize:
    """How much is trained. Every model takes one pass over its rows; processes = 1 builds in this process."""

    conversations: int = 24000
    policy_tokens: int = 1472
    policy_width: int = 128
    policy_layers: int = 3
    policy_batch: int = 16
    pairs: int = 15000  # for helpfulness; safety takes half
    reward_tokens: int = 1024
    reward_width: int = 64
    reward_batch: int = 16
    test_pairs: int = 600
    samples: int = 3  # per test prompt, to look at the uncontrolled policy
    processes: int = 2


FULL = WorldSize()
# For tests of engines and jobs: the right shapes and file formats, answers that are hardly fluent, rough judges.
TINY = WorldSize(conversations=2400, policy_tokens=768, policy_width=64, policy_layers=2, pairs=1600, reward_tokens=512, processes=1)


@dataclass(frozen=True)
class DemoWorld:
    """Where everything lies. reward, held_out: attribute -> model folder. *_prompts: JSONL with a text `prompt` a row. facts: figures.

    fingerprint: differs where seed, size or the code that built it do.
    """

    folder: Path
    policy: Path
    reward: dict[str, Path]
    held_out: dict[str, Path]
    train_prompts: Path
    test_prompts: Path
    facts: dict
    fingerprint: str


def build(folder: Path, seed: int, report: Callable[[str], None], size: WorldSize = FULL) -> DemoWorld:
    """Build the world of `seed` in `folder`, or reuse it at once if this very code built it there with the same seed and size.

    With size.processes > 1 spawned processes do the work, so the calling script needs the usual `if __name__ == "__main__"`.
    """
    folder = Path(folder)
    wanted = fingerprint(seed, size)
    if _manifest(folder).get("fingerprint") == wanted:
        report(f"demo world: reused from {folder}")
        return load(folder)
    if folder.exists() and any(folder.iterdir()) and not _manifest(folder):
        raise RunError(f"{str(folder)!r} holds something that is not a demo world: give an empty or a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    started, building = time.monotonic(), Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    building.chmod(0o755)  # mkdtemp makes it private
    try:
        facts = _build_parts(building, seed, size, report)
        facts["seconds"]["all"] = round(time.monotonic() - started, 1)
        manifest = {"fingerprint": wanted, "seed": seed, "size": asdict(size), "facts": facts}
        (building / "world.json").write_text(json.dumps(manifest, indent=2))
        if _manifest(folder).get("fingerprint") != wanted:  # another process may have been faster
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    report(f"demo world: built in {facts['seconds']['all']} s in {folder}")
    return load(folder)


def load(folder: Path) -> DemoWorld:
    """The world that `build` left in `folder`; raises RunError if there is none."""
    folder = Path(folder)
    manifest = _manifest(folder)
    if not manifest:
        raise RunError(f"{str(folder)!r} holds no finished demo world: build one first")
    judges = {judge: {attribute: folder / judge / attribute for attribute in ATTRIBUTES} for judge in ("reward", "held_out")}
    return DemoWorld(
        folder, folder / "policy", judges["reward"], judges["held_out"], folder / "train.jsonl", folder / "test.jsonl", manifest["facts"],
        manifest["fingerprint"],
    )  # fmt: skip


def is_world(folder: Path) -> bool:
    """Whether `folder` holds what `build` leaves."""
    return bool(_manifest(Path(folder)))


def holds_another(folder: Path, seed: int, size: WorldSize = FULL) -> bool:
    """Whether `folder` holds a world that `build` would replace."""
    return _manifest(Path(folder)).get("fingerprint", "") not in ("", fingerprint(seed, size))


def fingerprint(seed: int, size: WorldSize) -> str:
    """Hash of what a world depends on: seed, size, this package's source and the versions of torch and transformers."""
    digest = hashlib.sha256(json.dumps([seed, asdict(size), torch.__version__, transformers.__version__]).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()


def _manifest(folder: Path) -> dict:
    path = folder / "world.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _build_parts(folder: Path, seed: int, size: WorldSize, report: Callable[[str], None]) -> dict:
    """Train every model, the policy beside the reward models, then look at the policy's samples."""
    world = make_world(seed)
    for name, prompts in (("train", world.train_prompts), ("test", world.test_prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    facts = {"prompts": {"train": len(world.train_prompts), "test": len(world.test_prompts)}, "seconds": {}}
    for parts in (("policy", *JUDGES), ("samples",)):
        for part, figures in _run(parts, folder, seed, size):
            facts["seconds"][part] = figures.pop("seconds")
            facts[part] = figures
            shown = ", ".join(f"{key} {value:g}" for key, value in figures.items() if not isinstance(value, dict))
            report(f"demo world: {part} in {facts['seconds'][part]} s: {shown}")
    return facts


def _run(parts: tuple[str, ...], folder: Path, seed: int, size: WorldSize) -> Iterator[tuple[str, dict]]:
    if size.processes == 1 or len(parts) == 1:
        for part in parts:
            yield _part(part, folder, seed, size)
        return
    with ProcessPoolExecutor(size.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_part, part, folder, seed, size) for part in parts]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _part(part: str, folder: Path, seed: int, size: WorldSize) -> tuple[str, dict]:
    """Make one part of the world; the caller's threads and random state are left as they were."""
    started, world, own_seed = time.monotonic(), make_world(seed), derive_seed(seed, f"demo.{part}")
    with _alone():
        if part == "policy":
            rows = conversations(world, size.conversations, own_seed)
            shape = (size.policy_tokens, size.policy_width, size.policy_layers)
            figures = train_policy(folder / part, rows, *shape, batch=size.policy_batch, seed=own_seed)
        elif part == "samples":
            figures = _sample_figures(folder, world, own_seed, size.samples)
        else:
            figures = _judge_figures(folder, part, world, own_seed, size)
    return part, {**figures, "seconds": round(time.monotonic() - started, 1)}


@contextmanager
def _alone():
    """One thread (tiny matrices lose by more) and quiet progress bars."""
    threads, bars = torch.get_num_threads(), transformers.utils.logging.is_progress_bar_enabled()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _judge_figures(folder: Path, part: str, world: World, seed: int, size: WorldSize) -> dict:
    """Train a reward model. The optimisation and the held-out ones share no prompt, and both meet the test prompts here first."""
    judge, attribute = part.split("/")
    held_out = judge == "held_out"
    prompts = world.train_prompts[1::2] if held_out else world.train_prompts[0::2]
    pairs = preferences(world, prompts, attribute, held_out, size.pairs // (1 if attribute == "helpful" else 2), seed)
    train_reward_model(folder / part, pairs, held_out, size.reward_tokens, size.reward_width, size.reward_batch, seed)
    tests = preferences(world, world.test_prompts, attribute, held_out, size.test_pairs, derive_seed(seed, "test"))
    chosen, rejected = (_scores(folder / part, [pair[side] for pair in tests]) for side in (0, 1))
    return {"accuracy": _short((chosen > rejected).mean()), "good": _short(chosen.mean()), "bad": _short(rejected.mean())}


def _scores(model: Path, rows: list[Judged]) -> np.ndarray:
    network = AutoModelForSequenceClassification.from_pretrained(model).eval()
    return 1 / (1 + np.exp(-raw_scores(network, AutoTokenizer.from_pretrained(model), rows)))


def _sample_figures(folder: Path, world: World, seed: int, samples: int) -> dict:
    """What the uncontrolled policy says to test prompts at temperature 1: known answers, cells, judged entanglement."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy").eval()
    prompts = list(world.test_prompts) * samples
    inputs = tokenizer.pad({"input_ids": [render(tokenizer, [{"role": "user", "content": p}]) for p in prompts]}, return_tensors="pt")
    torch.manual_seed(seed)
    with torch.no_grad():
        output = policy.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=48)
    output = output[:, inputs.input_ids.shape[1] :]
    rows = [Judged(*row) for row in zip(prompts, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True)]
    answers = [world.classify(row.prompt, row.answer) for row in rows]
    helpful, harmless = (_scores(folder / "reward" / attribute, rows) for attribute in ATTRIBUTES)
    judged = [(bool(a > 0.5), bool(b > 0.5)) for a, b in zip(helpful, harmless, strict=True)]
    return {
        "known": _short(np.mean([answer is not None for answer in answers])),
        "tokens": _short(np.mean([(row != tokenizer.pad_token_id).sum() for row in output])),
        "pearson": _short(np.corrcoef(helpful, harmless)[0, 1]),
        "cells": {CELL_NAMES[cell]: _short(np.mean([j == cell for j in judged])) for cell in CELLS},
        "known_cells": {CELL_NAMES[cell]: _short(np.mean([a is not None and a.cell == cell for a in answers])) for cell in CELLS},
    }


def _short(value) -> float:
    return round(float(value), 3)
