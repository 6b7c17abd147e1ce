"""Files of models, which others made: where they lie, whether they are whole, and what a library says of those that are not."""

import json
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from ctrlrl.errors import CtrlrlError, ModelError

# Their bars and reports about loading and writing would tear up the jobs' own progress; what matters of them is an error here.
disable_progress_bar()
set_verbosity_error()

_POINTER = b"version https://git-lfs"
_CONFIGS = ("config.json", "generation_config.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json")
# First folders that name a place on this machine. Any other `a/b` may be a name on the hub, unless the folder `a` is here.
_LOCAL = {"runs", "models", "checkpoints", "data", "out", "output", "outputs", "results", "tmp"}
_SHORTEST = 8  # tokens of a conversation
_NOT_THE_FILES = (CtrlrlError, MemoryError, torch.OutOfMemoryError)


class reading:  # noqa: N801 (reads as a statement: `with reading(name, "model"):`)
    """Context of one call to a library that reads a model's files: whatever it raises becomes a ModelError.

    Libraries raise nearly every kind of error for a file that is damaged, of a newer version or of another kind, `Exception` itself
    included. So only that call belongs into the context, and none of our own code. files: those that it reads.
    """

    def __init__(self, name: str, what: str, files: tuple[str, ...] = ()):
        self._name, self._what, self._files = name, what, files

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if not isinstance(error, Exception) or isinstance(error, _NOT_THE_FILES):
            return
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        reason = " ".join(lines[:2]).strip() if lines else type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own, which is never run: give a model of an architecture that transformers knows"
        here = [file for file in self._files if (Path(self._name).expanduser() / file).exists()]
        raise ModelError(
            f"cannot load the {self._what} {self._name!r}{' from ' + ', '.join(here) if here else ''}: {reason} "
            "(give a local directory with safetensors weights, or a hub name)"
        ) from error


def existing(name: str) -> str:
    """`name`, with `~` of a path expanded; a path that does not exist is refused before the hub is asked for it.

    A path is what begins with `.`, `/` or `~`, has more than one slash or ends in one, whose first folder is here or has one of the
    usual names of local folders, or whose last one is `model`, as in a run directory.
    """
    try:
        path = Path(name).expanduser()
        if name and path.is_dir():
            return str(path)
    except (OSError, RuntimeError) as error:  # a name too long, no permission, the home of nobody
        raise ModelError(f"model directory {name!r} cannot be read: {error}") from None
    first, _, last = name.partition("/")
    local = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists()
    if local or (last and (first in _LOCAL or last == "model" or Path(first).is_dir())) or name.endswith("/") or not name:
        raise ModelError(f"model directory {name!r} does not exist: give a directory that save_pretrained wrote, or a hub name")
    return name


def load_config(name: str) -> PretrainedConfig:
    """The configuration of a model; raises ModelError if there is no such directory or hub name, or it cannot be read."""
    place = existing(name)
    for file in _CONFIGS:
        check_json(Path(place) / file)
    if (Path(place) / "adapter_config.json").is_file():  # transformers would put it on the model, the rollout engine would not
        raise ModelError(f"{name!r} holds an adapter (adapter_config.json): give a model that it is merged into, as merge_and_unload does")
    with reading(name, "model", ("config.json",)):
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers < 1:
        raise ModelError(f"{name!r} has {layers} layers by its config.json: give a config.json that fits")
    return config


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; raises ModelError if it is missing or cannot be read."""
    place = existing(name)
    for file in _TOKENIZERS:
        check_no_pointer(Path(place) / file)
    check_json(Path(place) / "tokenizer_config.json")
    with reading(name, "tokenizer", _TOKENIZERS):
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    if tokenizer.model_max_length < _SHORTEST:
        raise ModelError(f"the tokenizer of {name!r} takes {tokenizer.model_max_length} tokens (model_max_length): no conversation fits")
    return tokenizer


def has_tokenizer(name: str) -> bool:
    """Whether a directory holds a tokenizer; of a hub name it is taken for granted."""
    folder = Path(existing(name))
    return not folder.is_dir() or any((folder / file).exists() for file in (*_TOKENIZERS, "vocab.txt"))


def load_generation_config(name: str) -> GenerationConfig | None:
    """What a model says of generation with it; None for a model that comes without."""
    place = existing(name)
    check_json(Path(place) / "generation_config.json")
    if Path(place).is_dir() and not (Path(place) / "generation_config.json").is_file():
        return None
    with reading(name, "generation configuration", ("generation_config.json",)):
        try:
            return GenerationConfig.from_pretrained(place)
        except OSError:
            return None  # a hub name may come without, too


def check_no_pointer(file: Path) -> None:
    """Raise ModelError if `file` is a pointer of Git LFS in place of the file itself."""
    if file.is_file():
        with file.open("rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                raise ModelError(f"{str(file)!r} is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`")


def check_json(file: Path) -> None:
    """Raise ModelError if `file` is there and does not hold a JSON object in UTF-8."""
    check_no_pointer(file)
    if not file.is_file():
        return
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{str(file)!r} cannot be read as JSON in UTF-8: {error}: write it again with save_pretrained") from None
    if not isinstance(value, dict):
        raise ModelError(f"{str(file)!r} holds a {type(value).__name__}, not a JSON object: write it again with save_pretrained")


def reward_kind(config: PretrainedConfig) -> type:
    """What a reward model is loaded as: a classifier of sequences, or of tokens, of which the last one's output counts."""
    tokens = any("TokenClassification" in architecture for architecture in config.architectures or [])
    return AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification


def label_index(name: str, label: str) -> int:
    """Which output of a classifier of several labels is `label`, in any case; ModelError names those that there are."""
    names = {number: str(text) for number, text in (load_config(name).id2label or {}).items()}
    found = [number for number, text in names.items() if text.lower() == label.lower()]
    if len(found) != 1 or len(names) < 2:
        raise ModelError(f"classifier {name!r} has the labels {', '.join(names.values())}: label = {label!r} is none of several")
    return found[0]
