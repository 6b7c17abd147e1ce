"""Reservations: places that exist, places that never will, and waits with an end."""

import os
import time

import pytest
from ray.util import placement_group_table

from actors.placement import ClusterConfig, Resources, connect, reserve
from ctrlrl.errors import PlacementError


def test_places_are_reserved_and_released(ray_cluster):
    place = reserve({"policy": [{"CPU": 1}] * 2, "rollout": [{"CPU": 0.5}]}, ClusterConfig())
    assert place.offsets == {"policy": 0, "rollout": 2}
    assert place.at("rollout", 0).placement_group_bundle_index == 2
    held = placement_group_table(place.group)
    assert held["state"] == "CREATED" and [bundle["CPU"] for bundle in held["bundles"].values()] == [1, 1, 0.5]
    place.release()
    end = time.monotonic() + 60
    while placement_group_table(place.group)["state"] != "REMOVED" and time.monotonic() < end:
        time.sleep(0.05)
    assert placement_group_table(place.group)["state"] == "REMOVED"


def test_an_impossible_reservation_says_what_was_asked_what_there_is_and_what_to_change(ray_cluster):
    with pytest.raises(
        PlacementError, match=r"need 200 CPU and 4 GPU \(policy: 4 x \{'CPU': 50, 'GPU': 1\}\).*of 32 CPU free.*lower.*without --recipe"
    ) as caught:
        reserve({"policy": [{"CPU": 50, "GPU": 1}] * 4}, ClusterConfig())
    assert "waited" not in str(caught.value)  # our own cluster never grows: told at once


def test_on_a_cluster_that_may_grow_the_wait_ends_at_the_deadline(ray_cluster, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(PlacementError, match="waited 1 s"):
        reserve({"rollout": [{"GPU": 1}]}, ClusterConfig(placement_deadline_s=1))


def test_no_cluster_at_the_address(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: (_ for _ in ()).throw(ConnectionError("refused")))
    with pytest.raises(PlacementError, match="no Ray cluster at '10.0.0.1:6379'"):
        connect(ClusterConfig(address="10.0.0.1:6379"), {})


def test_a_machine_on_which_ray_does_not_start_is_told(monkeypatch):
    import ray

    def init(**_):
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(PlacementError, match=r"cannot be started on this machine: The current node timed out .*It has \d+ cores"):
        connect(ClusterConfig(), {})


def test_resources_become_a_bundle_and_an_environment():
    resources = Resources(cpus=4, gpus=1, threads=2)
    assert resources.bundle == {"CPU": 4, "GPU": 1}
    options = resources.environment({"A": "b"}, ("wave",))
    assert options["runtime_env"]["env_vars"] == {
        "OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "A": "b"
    }  # fmt: skip
    alone = Resources(cpus=0.5).environment({}, ("wave", "cgi"))["runtime_env"]["env_vars"]
    assert (alone["OMP_NUM_THREADS"], alone["CTRLRL_IMPORTS"]) == ("1", "wave,cgi")  # without GPUs it may be forked
    assert alone["OPENBLAS_NUM_THREADS"] == "1"  # or NumPy would begin threads when it is imported
    assert alone["CUDA_VISIBLE_DEVICES"] == ""  # it asked for no GPU: it uses none, although Ray would let it
    both = Resources().environment({}, ("wave",), ("cgi", "chunk"))["runtime_env"]["env_vars"]
    assert both["CTRLRL_IMPORTS"] == "cgi,chunk;wave"


@pytest.mark.parametrize(("said", "found"), [("3", "3"), ("2,1", "2"), ("", "7"), ("0", "7"), (None, "7")])
def test_a_worker_may_have_all_cores(monkeypatch, said, found):
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    if said is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    variables = Resources(threads="cores").environment({}, ("wave",))["runtime_env"]["env_vars"]
    assert (variables["OMP_NUM_THREADS"], variables["CTRLRL_IMPORTS"]) == (found, "wave")
