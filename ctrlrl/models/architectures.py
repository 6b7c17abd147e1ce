"""Which models the rollout engine takes, told from a model's configuration and files before anything is started.

vLLM has code of its own for some architectures and runs others by transformers' classes. tests/benchmarks/families.py compares it with
transformers, architecture by architecture.
"""

import ast
import importlib.util
from functools import lru_cache
from pathlib import Path

import transformers
from transformers import PreTrainedModel

from ctrlrl.errors import ModelError
from ctrlrl.models.reading import check_weight_files, existing, load_config

# Architectures of which the engine computes something else than transformers, with its figures: see tests/benchmarks/families.py.
_WRONG = {"gpt_bigcode": "1.0 nats", "ernie4_5_moe": "0.09 nats"}
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def check_engine_takes(model: str) -> None:
    """ModelError unless the rollout engine has code for `model`, agrees with transformers about it, and can read its files."""
    config, architecture = load_config(model), architecture_of(model)
    by_transformers = _runs_by_transformers(architecture) and not carries_state(model)
    if config.model_type in _WRONG:
        raise ModelError(
            f"{model!r} is a {config.model_type}: the rollout engine's logprobs of this architecture are up to "
            f"{_WRONG[config.model_type]} off: use a model of another architecture"
        )
    known = engine_architectures()
    if known and architecture not in known and not by_transformers:
        raise ModelError(
            f"{model!r} is a {architecture}, which the rollout engine (vLLM) does not know: use a model of another architecture"
        )
    folder = Path(existing(model))
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ModelError(f"{model!r} has no safetensors weights, the only ones that are read: save it with save_pretrained")
    check_weight_files(model)


def architecture_of(model: str) -> str:
    """The class that a model's configuration names."""
    config = load_config(model)
    return (config.architectures or [config.model_type])[0]


def carries_state(model: str) -> bool:
    """Whether layers of a model carry a state along the sequence (convolution, state space, linear attention)."""
    kind = getattr(transformers, architecture_of(model), None)
    layers = set(load_config(model).to_dict().get("layer_types") or ())
    return kind is not None and kind._is_stateful or bool(layers - _ATTENTION)


@lru_cache
def engine_architectures() -> frozenset[str]:
    """Architectures that vLLM has code for; empty where it is not installed. Read from its registry's source, since importing it takes
    eight seconds."""
    package = importlib.util.find_spec("vllm")
    if package is None:
        return frozenset()
    source = Path(package.submodule_search_locations[0], "model_executor", "models", "registry.py").read_text()
    tables = {
        node.targets[0].id: node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Dict)
    }
    parts = [part.id for part in tables["_VLLM_MODELS"].values if isinstance(part, ast.Name)]  # a dictionary of dictionaries
    return frozenset(key.value for part in parts for key in tables[part].keys if isinstance(key, ast.Constant))


def _runs_by_transformers(architecture: str) -> bool:
    """Whether vLLM can run an architecture that it has no code for by transformers' class."""
    kind = getattr(transformers, architecture, None)
    if kind is None or not issubclass(kind, PreTrainedModel):
        return False
    return kind.is_backend_compatible() or kind._can_set_attn_implementation()
