"""Architectures by description, for planning where a model itself cannot be read: shapes alone, no weights."""

from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from ctrlrl.errors import ModelError, RecipeError
from ctrlrl.models.reading import existing, reading

_KEYS = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocabulary": "vocab_size",
    "intermediate": "intermediate_size",
    "tied": "tie_word_embeddings",
}
SIZES = {  # as their publishers' config.json have them
    "135m": "hidden=576,layers=30,heads=9,kv_heads=3,vocabulary=49152,intermediate=1536,tied=true",
    "1b": "hidden=2048,layers=16,heads=32,kv_heads=8,vocabulary=128256,intermediate=8192,tied=true",
    "3b": "hidden=3072,layers=28,heads=24,kv_heads=8,vocabulary=128256,intermediate=8192,tied=true",
    "7b": "hidden=4096,layers=32,heads=32,kv_heads=32,vocabulary=32000,intermediate=11008",
    "8b": "hidden=4096,layers=32,heads=32,kv_heads=8,vocabulary=128256,intermediate=14336",
    "70b": "hidden=8192,layers=80,heads=64,kv_heads=8,vocabulary=128256,intermediate=28672",
}
# The models that shipped recipes name; of those that a reader is to fill in, a size that such a recipe is for.
_KNOWN = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "135m",
    "meta-llama/Llama-3.2-1B-Instruct": "1b",
    "meta-llama/Llama-3.2-3B-Instruct": "3b",
    "meta-llama/Llama-2-7b-chat-hf": "7b",
    "meta-llama/Llama-3.1-8B-Instruct": "8b",
    "meta-llama/Llama-3.1-70B-Instruct": "70b",
    "path/to/helpfulness-reward-model": "8b",
    "path/to/safety-reward-model": "8b",
    "path/to/small-helpfulness-reward-model": "1b",
    "path/to/small-safety-reward-model": "1b",
}


def described(text: str) -> PretrainedConfig:
    """The Llama of a description: a name of SIZES, or `hidden=…,layers=…,heads=…,kv_heads=…,vocabulary=…,intermediate=…[,tied=true]`."""
    given = dict(part.partition("=")[::2] for part in SIZES.get(text.lower(), text).split(","))
    missing = [key for key in _KEYS if key not in given and key != "tied"]
    unknown = [key for key in given if key not in _KEYS]
    numbers = {key: value for key, value in given.items() if key != "tied"}
    if missing or unknown or not all(value.isdecimal() and int(value) for value in numbers.values()):
        raise RecipeError(
            f"--sizes {text!r} describes no model: give one of {', '.join(SIZES)}, or {SIZES['8b']} (tied=true: head and embedding are one)"
        )
    values = {_KEYS[key]: int(value) for key, value in numbers.items()}
    if values["hidden_size"] % values["num_attention_heads"] or values["num_attention_heads"] % values["num_key_value_heads"]:
        raise RecipeError(f"--sizes {text!r}: hidden must be a multiple of heads, and heads of kv_heads")
    return LlamaConfig(**values, tie_word_embeddings=given.get("tied") == "true", max_position_embeddings=131072)


def shape_of(name: str, size: str = "") -> tuple[PretrainedConfig, str]:
    """The configuration of a model, and where it is from: `size` if given, else its own files if they are on this machine, else what is
    known of it. ModelError if nothing is."""
    if size:
        return described(size), f"described as {size}"
    try:
        with reading(name, "configuration", ("config.json",)):
            return AutoConfig.from_pretrained(existing(name), trust_remote_code=False, local_files_only=True), "its config.json"
    except ModelError as error:
        if name in _KNOWN:
            return described(_KNOWN[name]), f"not on this machine, counted as {_KNOWN[name]}"
        raise ModelError(f"{error}; or describe it: --sizes 8b, or --sizes policy.model=8b for one of several") from None
