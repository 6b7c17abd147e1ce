"""A model's weight files: whole, of plain numbers, and one meaning to every reader. Their headers are read, no more than needed beside."""

import hashlib
import json
from pathlib import Path

from transformers import PretrainedConfig

from ctrlrl.errors import ModelError
from ctrlrl.models.reading import check_json, check_no_pointer, existing

_PIECE = 1 << 24  # bytes that are read at once
_PLAIN = ("F64", "F32", "F16", "BF16")
_HEADS, _EMBEDDINGS = ("lm_head", "embed_out"), ("embed_tokens", "wte", "embed_in")


def check_weights(name: str, config: PretrainedConfig) -> None:
    """check_weight_files, and ModelError if a weight is quantised though the configuration names no quantisation: its numbers would be
    read without their scales. Buffers may be integers."""
    check_weight_files(name)
    if getattr(config, "quantization_config", None):
        return
    for file in sorted(Path(existing(name)).glob("*.safetensors")):
        for key, entry in header(file).items():
            if key.endswith("weight") and entry["dtype"] not in _PLAIN:
                raise ModelError(
                    f"{str(file)!r} has {key!r} in {entry['dtype']}, but config.json has no quantization_config: give the model in "
                    "full precision"
                )


def check_weight_files(name: str) -> None:
    """Raise ModelError if a weight file of a local directory is cut, a pointer, no safetensors, or missing though the index names it."""
    folder = Path(existing(name))
    index = folder / "model.safetensors.index.json"
    check_json(index)
    if index.is_file():
        shards = json.loads(index.read_text("utf-8")).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise ModelError(f"{str(index)!r} has no weight_map of file names: write it again with save_pretrained")
        for shard in sorted(set(shards.values())):
            if not (folder / shard).is_file():
                raise ModelError(f"{str(folder / shard)!r} is missing, though {index.name} names it: copy the whole directory")
    for file in sorted(folder.glob("*.safetensors")):
        _check_safetensors(file)


def check_tied(name: str) -> None:
    """ModelError if a local directory's files have an output head of their own though its configuration ties it to the embedding:
    transformers reads that head, the rollout engine does not."""
    found = {}
    for file in sorted(Path(existing(name)).glob("*.safetensors")):
        found |= {key: _digest(file, entry) for key, entry in header(file).items() if _module(key) in (*_HEADS, *_EMBEDDINGS)}
    for head in [key for key in found if _module(key) in _HEADS]:
        if not any(found[head] == weight for key, weight in found.items() if _module(key) in _EMBEDDINGS):
            raise ModelError(f"{name!r} has a {head!r} of its own, though config.json says tie_word_embeddings: set it to false there")


def _module(key: str) -> str:
    """The module that a weight, and no bias, is of; empty for those of layers."""
    *before, module, kind = ["", "", *key.split(".")]
    return module if kind == "weight" and "layers" not in before else ""


def _digest(file: Path, entry: dict) -> tuple[str, bytes]:
    """What tells a tensor of a safetensors file from another: its dtype, and a hash of its bytes."""
    begin, end = entry["data_offsets"]
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        opened.seek(8 + int.from_bytes(opened.read(8), "little") + begin)
        for place in range(begin, end, _PIECE):
            digest.update(opened.read(min(_PIECE, end - place)))
    return entry["dtype"], digest.digest()


def header(file: Path) -> dict[str, dict]:
    """What a safetensors file, found whole, holds: dtype and shape by name."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return {key: entry for key, entry in header.items() if key != "__metadata__"}


def _check_safetensors(file: Path) -> None:
    check_no_pointer(file)
    size, wrong = file.stat().st_size, None
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > size - 8:
            wrong = "is cut, or no safetensors file"
        else:
            try:
                header = json.loads(opened.read(length))
                end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
                wrong = f"has {size - 8 - length} bytes of weights, its header tells of {end}" if end != size - 8 - length else None
            except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
                wrong = "has no header of a safetensors file"
    if wrong:
        raise ModelError(f"{str(file)!r} {wrong}: fetch it again, whole")
