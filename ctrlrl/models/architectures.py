"""Which models the rollout engine takes, told from a model's configuration and files before anything is started.

vLLM has code of its own for some architectures and runs others by transformers' classes. tests/benchmarks/families.py compares it with
transformers, architecture by architecture.
"""

import ast
import importlib.util
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from ctrlrl.errors import ModelError, RecipeError
from ctrlrl.models.reading import existing, load_config
from ctrlrl.models.weight_files import check_weight_files

# Architectures of which the engine computes something else than transformers, or nothing: see tests/benchmarks/families.py.
_WRONG = {
    "gpt_bigcode": "logprobs are up to 1.0 nats off",
    "ernie4_5_moe": "logprobs are up to 0.09 nats off",
    "phimoe": "first forward pass fails",
}
# ... and of which it computes the same, at the start and after a publish.
_RIGHT = frozenset(
    """llama qwen2 qwen3 mistral gemma gemma2 gemma3_text phi phi3 gpt2 gpt_neox gptj opt granite glm glm4 cohere stablelm
    nemotron olmo olmo2 olmo3 smollm3 starcoder2 exaone4 ernie4_5 hunyuan_v1_dense seed_oss arcee bitnet helium persimmon falcon
    bloom apertus mixtral qwen2_moe qwen3_moe gpt_oss granitemoe olmoe flex_olmo hunyuan_v1_moe glm4_moe
    gemma4_text llama4_text
    mamba2 falcon_h1 granitemoehybrid""".split()
)
# ... and also with an engine in two parts (families.py --measure --parts 2).
_RIGHT_IN_PARTS = frozenset("llama qwen2 qwen3 mistral gemma3_text".split())
_STATEFUL = {"HasInnerState", "IsHybrid", "IsAttentionFree"}  # vLLM's interfaces of models with convolutions, state spaces and the like
_SPLIT = ("num_attention_heads", "intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner")  # keys of what is split among devices
_MOST_DEVICES = 16  # of a node
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def check_engine_takes(model: str) -> None:
    """ModelError unless the rollout engine has code for `model`, agrees with transformers about it, and can read its files."""
    config, architecture = load_config(model), architecture_of(model)
    by_transformers = _runs_by_transformers(architecture) and not carries_state(model)
    if config.model_type in _WRONG:
        raise ModelError(
            f"{model!r} is a {config.model_type}: with this architecture the rollout engine's {_WRONG[config.model_type]}: "
            "use a model of another one"
        )
    known = engine_architectures()
    if known and architecture not in known and not by_transformers:
        raise ModelError(
            f"{model!r} is a {architecture}, which the rollout engine (vLLM) does not know: use a model of another architecture"
        )
    if carries_state(model) and engine_on_cpu() and config.model_type not in _RIGHT:
        raise ModelError(
            f"{model!r} is a {config.model_type}, whose layers carry a state along the sequence: the rollout engine (vLLM) does not run "
            "such an architecture rightly on this device (CPU): use a model with attention alone, or an engine for GPUs"
        )
    if getattr(config, "kv_lora_rank", None) and engine_on_cpu():
        raise ModelError(
            f"{model!r} is a {config.model_type}, which has latent attention (kv_lora_rank): the rollout engine (vLLM) does not compute "
            "it rightly on this device (CPU), its logprobs are up to 0.3 nats off: use a model of another one, or an engine for GPUs"
        )
    folder = Path(existing(model))
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ModelError(f"{model!r} has no safetensors weights, the only ones that are read: save it with save_pretrained")
    check_weight_files(model)


def check_split(model: str, devices: int, key: str) -> None:
    """RecipeError unless the engine can split `model` among so many devices; `key` is what the recipe calls that number."""
    check_even(model, load_config(model), devices, key)
    if devices == 1:
        return
    if carries_state(model):
        raise RecipeError(f"{key} = {devices}, but layers of {model!r} carry a state along the sequence, which is not split: set it to 1")
    kind = getattr(transformers, architecture_of(model), None)
    if architecture_of(model) not in engine_architectures() and not getattr(kind, "base_model_tp_plan", None):
        raise RecipeError(f"{key} = {devices}, but nothing says how a {architecture_of(model)} is split among devices: set it to 1")


def check_even(model: str, config: PretrainedConfig, devices: int, key: str) -> None:
    """RecipeError if a model of this configuration does not come out even in so many parts, with the numbers of parts in which it does."""
    text = config.get_text_config()
    if uneven := _uneven(text, devices):
        possible = [n for n in range(1, min(text.num_attention_heads, _MOST_DEVICES) + 1) if not _uneven(text, n)]
        raise RecipeError(
            f"{key} = {devices}, but {model!r} has {', '.join(uneven)}, which it does not divide: set {key} to "
            f"{' or '.join(map(str, possible))}"
        )


def _uneven(config: PretrainedConfig, devices: int) -> list[str]:
    """The sizes that so many devices do not divide. Key-value heads may be fewer than devices and divide them: then some have the same."""
    sizes, groups = {key: getattr(config, key, None) for key in _SPLIT}, getattr(config, "num_key_value_heads", None)
    found = [f"{key} = {size}" for key, size in sizes.items() if size and size % devices]
    return [*found, *([f"num_key_value_heads = {groups}"] if groups and groups % devices and devices % groups else [])]


def architecture_of(model: str) -> str:
    """The class that a model's configuration names."""
    config = load_config(model)
    return (config.architectures or [config.model_type])[0]


def carries_state(model: str) -> bool:
    """Whether layers of a model carry a state along the sequence (convolution, state space, linear attention)."""
    architecture = architecture_of(model)
    kind = getattr(transformers, architecture, None)
    layers = set(load_config(model).to_dict().get("layer_types") or ())
    engines = engine_architectures().get(architecture)
    return kind is not None and kind._is_stateful or bool(layers - _ATTENTION) or bool(engines and _STATEFUL & _made_from(*engines))


def compared(model: str, devices: int = 1) -> bool:
    """Whether the engine was found to compute what transformers does for models of this architecture with these keys: one that
    transformers' configuration does not have, and so ignores, the engine may obey (num_key_value_heads in a gpt_neox). devices: of the
    engine; one that is split is compared by itself."""
    config = load_config(model)
    kind = type(config)
    known = {*kind().to_dict(), *getattr(kind, "__dataclass_fields__", ()), *kind.attribute_map}
    ignored = [key for key, value in config.to_dict().items() if key not in known and key[0] != "_" and isinstance(value, int | float)]
    return config.model_type in (_RIGHT if devices == 1 else _RIGHT_IN_PARTS) and not ignored


@lru_cache
def engine_architectures() -> dict[str, tuple[str, str]]:
    """Module and class of vLLM's own code for each architecture that it has some for; {} where it is not installed. Read from its
    registry's source, since importing it takes eight seconds."""
    tables = {
        node.targets[0].id: node.value
        for node in _source("vllm.model_executor.models.registry").body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Dict)
    }
    parts = [part.id for part in tables["_VLLM_MODELS"].values if isinstance(part, ast.Name)] if tables else []  # dictionaries in one
    entries = [entry for part in parts for entry in zip(tables[part].keys, tables[part].values, strict=True)]
    return {key.value: tuple(part.value for part in value.elts) for key, value in entries if isinstance(value, ast.Tuple)}


@lru_cache
def _source(module: str) -> ast.Module:
    """The source of a module of vLLM's; empty where there is none."""
    package = importlib.util.find_spec("vllm")
    path = Path(package.submodule_search_locations[0], *module.split(".")[1:]).with_suffix(".py") if package else None
    return ast.parse(path.read_text()) if path and path.is_file() else ast.Module([], [])


@lru_cache
def _made_from(module: str, kind: str) -> frozenset[str]:
    """Names of all classes that a class of vLLM's is made from, as far as its own modules of models have them."""
    full = module if module.startswith("vllm.") else f"vllm.model_executor.models.{module}"
    found = frozenset({kind})
    for node in _source(full).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and kind in [alias.name for alias in node.names]:
            found |= _made_from(node.module, kind) if node.module != "interfaces" else frozenset()
        if isinstance(node, ast.ClassDef) and node.name == kind:
            found |= {name for base in node.bases if isinstance(base, ast.Name) for name in _made_from(module, base.id)}
    return found


def engine_on_cpu() -> bool:
    """Whether the engine that is installed is one for CPUs alone: vLLM tells it by the package's name or version, too."""
    try:
        return "cpu" in metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return importlib.util.find_spec("vllm") is not None


def _runs_by_transformers(architecture: str) -> bool:
    """Whether vLLM can run an architecture that it has no code for by transformers' class."""
    kind = getattr(transformers, architecture, None)
    if kind is None or not issubclass(kind, PreTrainedModel):
        return False
    return kind.is_backend_compatible() or kind._can_set_attn_implementation()
