"""An engine with several devices: how a model, the processors and a message of weights are shared. test_sampler.py runs one."""

import os
import subprocess

import numpy as np
import pytest
from transformers import GPT2Config, LlamaConfig

from actors.faults import Failure
from actors.waiting import classify
from ctrlrl.errors import RecipeError, WorkerLost
from ctrlrl.models.architectures import check_even, check_split
from ctrlrl.models.ranks import Ranks, shares
from ctrlrl.models.shared_message import shared
from ctrlrl.models.weights import WeightMessage


def test_each_rank_has_neighbouring_cores_of_its_own():
    smt = [(0, core, core) for core in range(4)] + [(0, core, core + 4) for core in range(4)]  # two threads on each core
    assert shares(smt, 2) == [{0, 4, 1, 5}, {2, 6, 3, 7}]
    assert shares([(0, 0, 0), (1, 1, 1), (0, 2, 2), (1, 3, 3)], 2) == [{0, 2}, {1, 3}]  # two NUMA nodes
    assert shares([(0, core, core) for core in range(5)], 2) == [{0, 1}, {2, 3, 4}]
    assert shares([(0, 0, 0)], 2) == [{0}, {0}]


def test_a_complaint_of_a_process_that_is_gone_is_a_lost_worker(monkeypatch):
    monkeypatch.setattr("ctrlrl.models.ranks._COMPLAINT_S", 0.2)
    gone = subprocess.Popen(["true"])
    gone.wait()
    for pids, found in (([os.getpid(), gone.pid], WorkerLost), ([os.getpid()], RuntimeError), ([], RuntimeError)):
        ranks = Ranks("m", 1, None)
        ranks._pids = pids
        with pytest.raises(RuntimeError) as error, ranks.at_work():
            raise RuntimeError("Connection reset by peer")
        assert type(error.value) is found
    assert classify(WorkerLost("as a worker says")) is Failure.WORKER_DIED


def test_a_message_is_read_in_place_and_leaves_nothing():
    arrays = np.arange(6, dtype=np.float32), np.arange(3, dtype=np.uint16), np.zeros(0, np.float32)
    message = WeightMessage(7, "bfloat16", ("a", "b", "c"), ((2, 3), (3,), (0,)), arrays)
    with shared(message) as shelf:
        found = shelf.message()
    assert (found.version, found.dtype, found.names, found.shapes) == (7, "bfloat16", ("a", "b", "c"), ((2, 3), (3,), (0,)))
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(found.arrays, arrays, strict=True))
    assert not found.arrays[0].flags.writeable
    with pytest.raises(FileNotFoundError):
        shelf.message()


@pytest.mark.parametrize(
    ("config", "fits", "said"),
    [
        (LlamaConfig(num_attention_heads=8, num_key_value_heads=2, intermediate_size=96), (1, 2, 4, 8), "= 3, but 'm' has num_attention"),
        (LlamaConfig(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, intermediate_size=96), (1, 2, 6), "has num_key_value_h"),
        (GPT2Config(n_head=4), (1, 2, 4), "has num_attention_heads = 4, which it does not divide: set parts to 1 or 2 or 4$"),
    ],
)
def test_a_model_that_does_not_come_out_even_is_refused_with_what_would(config, fits, said):
    for devices in range(1, 9):
        if devices in fits:
            check_even("m", config, devices, "parts")
            continue
        with pytest.raises(RecipeError) as error:
            check_even("m", config, devices, "parts")
        assert " or ".join(map(str, fits)) in str(error.value)
    with pytest.raises(RecipeError, match=said):
        check_even("m", config, 3, "parts")


def test_what_carries_a_state_is_not_split(monkeypatch, models):
    check_split(models["policy"], 2, "parts")
    monkeypatch.setattr("ctrlrl.models.architectures.carries_state", lambda model: True)
    check_split(models["policy"], 1, "parts")
    with pytest.raises(RecipeError, match="carry a state along the sequence, which is not split: set it to 1"):
        check_split(models["policy"], 2, "parts")
