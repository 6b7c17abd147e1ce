"""Shared by the tests that want a GPU: `make test-cuda`, or `pytest -m cuda tests/cuda` where '.[cuda,dev]' is installed.

`--on cpu` runs the same bodies on the processors, which tries the code of the tests and says nothing about GPUs.
"""

import pytest
import torch
from transformers import LlamaForCausalLM

from actors.placement import ClusterConfig, Resources
from ctrlrl.models.sizes import described

PARAMETERS = 20_000_000  # at least, of a model that is seen on a device


def pytest_addoption(parser):
    """--on."""
    parser.addoption("--on", choices=("cuda", "cpu"), default="cuda", help="where the tests marked cuda run")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """Where the test runs; it is skipped where that is a GPU and none is here."""
    device = torch.device(request.config.getoption("--on", default="cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU is here")
    return device


@pytest.fixture(scope="session")
def gpus(device) -> int:
    """How many there are; on the processors as if there were one."""
    return torch.cuda.device_count() if device.type == "cuda" else 1


@pytest.fixture(scope="session")
def part(device):
    """A function: the resources of a worker with this share of a GPU (of one on the processors: none)."""
    return lambda share: Resources(cpus=0.5, gpus=share if device.type == "cuda" else 0)


@pytest.fixture(scope="session")
def patient() -> ClusterConfig:
    """Deadlines for workers that fork nothing, and compile at their first start."""
    return ClusterConfig(placement_deadline_s=60, call_deadline_s=300, start_deadline_s=600)


@pytest.fixture(scope="session")
def wide(device, tmp_path_factory, tokenizer) -> str:
    """A random model large enough to be seen on the device."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = described("hidden=512,layers=9,heads=8,kv_heads=4,vocabulary=384,intermediate=1024")
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) > PARAMETERS
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
