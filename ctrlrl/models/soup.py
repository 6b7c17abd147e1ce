"""Rewarded soups (Rame et al., arXiv 2306.04488): a model whose weights lie between those of two models of the same make.

theta = (1 - share) theta_A + share theta_B, tensor by tensor, in fp32 (fp64 for fp64), in the files and the dtypes of A. Whatever makes two
models of other make is refused by name before anything is written.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctrlrl.chat import own_template
from ctrlrl.data.atomic import write_directory, write_json
from ctrlrl.errors import ModelError, RecipeError, RunError
from ctrlrl.models.fingerprint import CONTENT, model_fingerprint, model_folder
from ctrlrl.models.loading import check_causal
from ctrlrl.models.reading import load_config, load_tokenizer
from ctrlrl.models.weight_files import header

SOUP = "soup.json"  # beside the weights: what they were made of
_INDEX = "model.safetensors.index.json"
# Of a configuration, what says nothing of the weights' meaning; nor do dropouts, which training sets to 0.
_NO_MATTER = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "pad_token_id"}
_DROPOUT = ("dropout", "pdrop", "drop_rate")
_PROBE = "How do I bake 12 loaves?\n\tÜber 3.5 % — 'naïve' 日本 🙂"
_NAMED = 3

Files = Mapping[str, tuple[Path, dict]]  # tensor -> its file, and what the header says of it


def soup(first: str, second: str, share: float, out: str) -> Path:
    """Write the model (1 - share) `first` + share `second` into the new directory `out`, whole or not at all; returns its path."""
    if not 0 <= share <= 1:
        raise RecipeError(f"--share {share:g} is not a share: give a number from 0 (all of the first model) to 1 (all of the second)")
    target = Path(out).expanduser().absolute()
    if target.exists() or target.is_symlink():
        raise RunError(f"{out!r} exists: give another --out, or remove it")
    ours, theirs = check_soup(first, second)
    target.parent.mkdir(parents=True, exist_ok=True)
    made_of = {"share": share, "models": [model_fingerprint(first), model_fingerprint(second)]}
    write_directory(target, lambda folder: _write(folder, model_folder(first), ours, theirs, share, made_of))
    return target


def check_soup(first: str, second: str) -> tuple[Files, Files]:
    """The tensors of two models that can be mixed; ModelError names the first thing in which they are of another make."""
    for name in (first, second):
        check_causal(name, "model")
        if getattr(load_config(name), "quantization_config", None):
            raise ModelError(f"{name!r} is quantised, and quantised weights cannot be mixed: give the model in full precision")
    _check_configs(first, second)
    _check_tokenizers(first, second)
    tied = load_config(first).get_text_config().tie_word_embeddings
    ours, theirs = (_tensors(model_folder(name), tied) for name in (first, second))
    if differ := sorted(set(ours) ^ set(theirs)):
        where = [f"{key} ({'the first' if key in ours else 'the second'})" for key in differ[:_NAMED]]
        raise ModelError(f"{first!r} and {second!r} have other tensors: {len(differ)} are in one alone, {', '.join(where)}")
    for key, (_, entry) in ours.items():
        other = theirs[key][1]
        if entry["shape"] != other["shape"]:
            raise ModelError(f"{key} is {entry['shape']} in {first!r} and {other['shape']} in {second!r}: only models of one shape mix")
        if _counts(entry) != _counts(other):
            raise ModelError(f"{key} is {entry['dtype']} in {first!r} and {other['dtype']} in {second!r}: they do not mix")
        if not _counts(entry) and not torch.equal(_read(ours, key), _read(theirs, key)):
            raise ModelError(f"{key}, of {entry['dtype']}, differs between {first!r} and {second!r}: integers do not mix")
    return ours, theirs


def mixed(a: Tensor, b: Tensor, share: float) -> Tensor:
    """(1 - share) a + share b, computed in fp32 or better, in the dtype of `a`; integers as they are."""
    if not a.is_floating_point():
        return a
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return ((1 - share) * a.to(wide) + share * b.to(wide)).to(a.dtype)


def _write(folder: Path, source: Path, ours: Files, theirs: Files, share: float, made_of: dict) -> None:
    """The whole model directory: what lies beside A's weights, and a file of the soup for each of A's."""
    for file in sorted({file for pattern in CONTENT for file in source.glob(pattern)}):
        if file.suffix != ".safetensors" and file.name not in (_INDEX, SOUP):
            shutil.copyfile(file, folder / file.name)
    size = 0
    for file in sorted({file for file, _ in ours.values()}):
        tensors = {}
        for key in (key for key, (where, _) in ours.items() if where == file):
            tensors[key] = mixed(_read(ours, key), _read(theirs, key), share).contiguous()
            size += tensors[key].numel() * tensors[key].element_size()
            if tensors[key].is_floating_point() and not torch.isfinite(tensors[key]).all():
                raise ModelError(f"{key} is not finite in the soup: one of the models is broken, or its values exceed their dtype")
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
    if (source / _INDEX).is_file():
        write_json(folder / _INDEX, {"metadata": {"total_size": size}, "weight_map": {key: file.name for key, (file, _) in ours.items()}})
    write_json(folder / SOUP, made_of)


def _tensors(folder: Path, tied: bool) -> Files:
    """Where each tensor of a model lies. A head that is tied to the embedding is not a tensor of its own."""
    index = folder / _INDEX
    listed = json.loads(index.read_text("utf-8"))["weight_map"].values() if index.is_file() else ()
    names = listed or [file.name for file in folder.glob("*.safetensors")]
    found = {key: (folder / name, entry) for name in sorted(set(names)) for key, entry in header(folder / name).items()}
    return {key: place for key, place in found.items() if not (tied and key == "lm_head.weight")}


def _read(files: Files, key: str) -> Tensor:
    with safe_open(files[key][0], framework="pt") as opened:
        return opened.get_tensor(key)


def _counts(entry: dict) -> bool:
    """Whether a tensor holds numbers that can be averaged."""
    return entry["dtype"] in ("F64", "F32", "F16", "BF16")


def _check_configs(first: str, second: str) -> None:
    ours, theirs = (_telling(load_config(name).to_dict()) for name in (first, second))
    differ = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    if differ:
        told = "; ".join(f"{key} is {ours.get(key)!r} in the first and {theirs.get(key)!r} in the second" for key in differ[:_NAMED])
        raise ModelError(f"{first!r} and {second!r} are of another architecture: {told}: give two models that descend from the same")


def _telling(config: dict) -> dict:
    """What a configuration says of the weights' meaning, that of its parts included."""
    kept = {k: v for k, v in config.items() if k not in _NO_MATTER and not any(word in str(k) for word in _DROPOUT)}
    return {k: _telling(v) if isinstance(v, dict) else v for k, v in kept.items()}


def _check_tokenizers(first: str, second: str) -> None:
    ours, theirs = load_tokenizer(first), load_tokenizer(second)
    same = {
        "vocabulary": ours.get_vocab() == theirs.get_vocab(),
        "special tokens": ours.special_tokens_map == theirs.special_tokens_map,
        "ways to cut text": ours(_PROBE)["input_ids"] == theirs(_PROBE)["input_ids"],
        "chat templates": own_template(ours) == own_template(theirs),
    }
    if wrong := [what for what, equal in same.items() if not equal]:
        raise ModelError(f"the tokenizers of {first!r} and {second!r} have other {', '.join(wrong)}: give two models that share theirs")
