"""Checkpoints that are damaged, of another training, or made to run code are refused by name; those of earlier versions are read."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ctrlrl.data.batches import TokenBatch
from ctrlrl.errors import RunError
from ctrlrl.models.state import INDEX, Index, _checksum, write_checked
from ctrlrl.models.trainer import Trainer, TrainerConfig, join_world
from ctrlrl.objectives.likelihood import likelihood
from ctrlrl.ppo.reward import AdaptiveKL
from jobs.parts.cast import _read_kl

SHARD = "rank-00000.safetensors"
SETTINGS = {"learning_rate": 1e-3, "dtype": "float32", "zero_stage": 1}


class Bomb:
    """Whoever unpickles it makes a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def batch():
    rng = np.random.default_rng(0)
    return TokenBatch([rng.integers(3, 384, size=n) for n in (9, 17, 30, 12)], np.array([2, 3, 4, 5]), {}, {})


def steps(trainer, count):
    trainer.train(batch(), likelihood, [np.arange(4)] * count)
    return {name: tensor.clone() for name, tensor in trainer.weights("float32", 0).tensors()}


def rewrite(path, **changes):
    """Another content of trainer.json, with the checksum that belongs to it."""
    content = {key: value for key, value in json.loads(path.read_text()).items() if key != "checksum"} | changes
    path.write_text(json.dumps(content | {"checksum": _checksum(content)}))


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def save_as_before(trainer, folder):
    """As earlier versions did."""
    trainer.engine.save_checkpoint(str(folder), tag="engine", exclude_frozen_parameters=trainer.config.lora.rank > 0)
    (folder / INDEX).write_text(json.dumps({"steps": trainer.steps, "world": 1}))


FAULTS = {
    "flipped weight": lambda folder: flip(folder / SHARD, -5),
    "flipped header": lambda folder: flip(folder / SHARD, 12),
    "cut": lambda folder: os.truncate(folder / SHARD, 5000),
    "no shard": lambda folder: (folder / SHARD).unlink(),
    "other step": lambda folder: (folder / INDEX).write_text((folder / INDEX).read_text().replace('"steps": 2', '"steps": 3')),
    "cut index": lambda folder: os.truncate(folder / INDEX, 300),
    "not text": lambda folder: (folder / INDEX).write_bytes(b"\xff\xfe\x00"),
    "a list": lambda folder: (folder / INDEX).write_text("[]"),
    "no pieces": lambda folder: rewrite(folder / INDEX, shards=[]),
    "other optimiser": lambda folder: rewrite(folder / INDEX, optimizer="Lion"),
    "pickled shard": lambda folder: torch.save(Bomb(folder / "pwned"), folder / SHARD),
    "pickled index": lambda folder: torch.save(Bomb(folder / "pwned"), folder / INDEX),
    "other ranks, earlier": lambda folder: (folder / INDEX).write_text('{"steps": 2, "world": 2}'),
    "pickled model, earlier": lambda folder: torch.save({"module": Bomb(folder / "pwned")}, folder / "engine/mp_rank_00_model_states.pt"),
    "pickled optimiser, earlier": lambda folder: torch.save(
        Bomb(folder / "pwned"), next((folder / "engine").glob("*optim_states.pt")), _use_new_zipfile_serialization=False
    ),
    "cut, earlier": lambda folder: os.truncate(folder / "engine/mp_rank_00_model_states.pt", 5000),
    "no optimiser, earlier": lambda folder: next((folder / "engine").glob("*optim_states.pt")).unlink(),
}


def told(trainer, folder) -> str:
    try:
        trainer.load(folder)
    except RunError as error:
        return str(error)
    return "no error"


def in_one_rank(folder: Path, model: str) -> dict[str, str]:
    """What loading says of each fault; run in a process of its own, which joins a group of one."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    join_world(0, 1, "127.0.0.1", port, 60)
    trainer = Trainer("policy", model, TrainerConfig(**SETTINGS))
    steps(trainer, 2)
    trainer.save(folder / "good")
    save_as_before(trainer, folder / "earlier")
    wanted, found = steps(trainer, 2), {}
    for name in ("good", "earlier"):
        trainer.load(folder / name)
        assert trainer.steps == 2
        resumed = steps(trainer, 2)
        assert all(torch.equal(resumed[n], wanted[n]) for n in wanted), name
    for name, fault in FAULTS.items():
        shutil.copytree(folder / ("earlier" if "earlier" in name else "good"), folder / name)
        fault(folder / name)
        found[name] = told(trainer, folder / name)
    for rank in (2, 4):
        adapted = Trainer("policy", model, TrainerConfig(**SETTINGS, lora={"rank": rank}))
        steps(adapted, 1)
        adapted.save(folder / f"rank {rank}")
        save_as_before(adapted, folder / f"earlier rank {rank}")
    found |= {"other rank": told(adapted, folder / "rank 2"), "other rank, earlier": told(adapted, folder / "earlier rank 2")}
    found |= {"adapter": told(trainer, folder / "rank 2"), "whole": told(adapted, folder / "good")}
    adapted.load(folder / "earlier rank 4")
    return found


@pytest.fixture(scope="module")
def messages(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, __file__, str(folder), models["policy"]]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder, json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        *((fault, rf"{fault}/{SHARD} is damaged: ") for fault in ("flipped weight", "flipped header", "cut", "no shard", "pickled shard")),
        *((fault, rf"{fault}/{INDEX} is damaged: ") for fault in ("other step", "cut index", "not text", "a list", "pickled index")),
        ("no pieces", r"no pieces/trainer.json is damaged: it has 0 of the \d+ elements of "),
        ("other optimiser", "other optimiser/trainer.json is of another training: the optimiser is Lion there and AdamW here"),
        ("other rank", r"rank 2/trainer.json is of another training: .*lora_A.* is of shape \[2, 64\] there and of shape \[4, 64\] here"),
        ("adapter", r"another training: model.* is not trained there and of shape .* here \(and \d+ more differences\)"),
        ("whole", r"good/trainer.json is of another training: .* is not trained there and of shape"),
        ("other ranks, earlier", "made by 2 ranks and an earlier version.* this run has 1: set ranks = 2 until its next checkpoint"),
        ("pickled model, earlier", "mp_rank_00_model_states.pt is refused, since it holds more than tensors and settings"),
        ("pickled optimiser, earlier", "optim_states.pt is refused, since it holds more than tensors and settings"),
        ("cut, earlier", "mp_rank_00_model_states.pt is damaged"),
        ("no optimiser, earlier", "optim_states.pt"),
        ("other rank, earlier", "earlier rank 2' does not fit"),
    ],
)
def test_a_state_that_cannot_be_used_is_refused_by_name(messages, fault, message):
    folder, found = messages
    assert re.search(message, found[fault]), found[fault]
    assert not (folder / fault / "pwned").exists()


def test_every_fault_is_asserted_and_the_bomb_is_live(messages, tmp_path):
    _, found = messages
    assert "no error" not in found.values()
    torch.save(Bomb(tmp_path / "pwned"), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "pwned").exists()


def test_the_index_holds_nothing_but_figures_and_names(messages):
    folder, _ = messages
    content = json.loads((folder / "good" / INDEX).read_text())
    checksum = content.pop("checksum")
    index = Index.model_validate(content)
    assert checksum == _checksum(content) and index.steps == 2 and {p.adam_step for p in index.parameters.values()} == {2.0}
    assert sorted(path.name for path in (folder / "good").iterdir()) == [SHARD, INDEX]


@pytest.mark.parametrize("content", ['{"kl": {"beta": 0.3}, "checksum": "0"}', '{"kl": {"beta": 0.2', "{}", '{"kl": {"gamma": 1}}', "3"])
def test_a_damaged_state_of_the_job_is_named(tmp_path, content):
    path = tmp_path / "step-000007" / "state.json"
    path.parent.mkdir()
    write_checked(path, {"kl": AdaptiveKL(0.2).to_dict()})
    assert _read_kl(path) == AdaptiveKL(0.2)
    path.write_text('{"kl": {"beta": 0.2}}')  # of an earlier version
    assert _read_kl(path) == AdaptiveKL(0.2)
    path.write_text(content)
    with pytest.raises(RunError, match="step-000007/state.json is damaged: .*have checkpoints/latest name another.*step-000007"):
        _read_kl(path)


if __name__ == "__main__":
    print(json.dumps(in_one_rank(Path(sys.argv[1]), sys.argv[2])))
