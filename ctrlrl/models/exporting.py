"""What goes beside an exported model, and whether it can be written: tried before the first step, since after the last it is too late."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from transformers import GenerationConfig

from ctrlrl.attributes import FILE, PAPER, Attributes, stored, unlike
from ctrlrl.data.atomic import write_text
from ctrlrl.errors import ModelError, RunError
from ctrlrl.models.reading import existing, load_config, load_generation_config, reading
from ctrlrl.models.vocabulary import end_token_ids

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def writable_generation_config(name: str) -> GenerationConfig | None:
    """A model's generation configuration as transformers can write it; None for a model that comes without.

    Settings of sampling without `do_sample` meant sampling, so it is set; with `do_sample` = false they meant nothing and are taken
    out. End tokens that are given as text, or with nulls, become ids. ModelError for what cannot be mended.
    """
    generation = load_generation_config(name)
    if generation is None:
        return None
    if not _plain(generation.eos_token_id):
        generation.eos_token_id = end_token_ids(name)
    if _refused(generation):
        file = Path(existing(name)) / "generation_config.json"
        greedy = file.is_file() and json.loads(file.read_text("utf-8")).get("do_sample") is False
        generation.do_sample = not greedy
        for setting in _SAMPLING if greedy else ():
            setattr(generation, setting, None)
    if reason := _refused(generation):
        raise ModelError(f"{name!r}: its generation_config.json cannot be written with the trained model: {reason}: correct that file")
    return generation


def check_export(name: str, out: str, tokenizer: Callable[[Path], object], generates: bool = False) -> None:
    """Raise an error unless what goes beside the trained weights of `name` can be written, near the run directory `out`.

    tokenizer: a function that writes it to a folder, as it will be saved. generates: whether the model is one that generates.
    """
    config = load_config(name)
    near = next(folder for folder in Path(out).expanduser().absolute().parents if folder.is_dir())
    try:
        trial = tempfile.TemporaryDirectory(prefix=".ctrlrl-", dir=near)
    except OSError as error:
        raise RunError(f"nothing can be written to {str(near)!r}, where {out!r} is to be: {error}: give another out") from None
    with trial as folder:
        with reading(name, "configuration for the trained model"):
            config.save_pretrained(folder)
        if generates and (generation := writable_generation_config(name)):
            generation.save_pretrained(folder)
        with reading(name, "tokenizer for the trained model"):
            tokenizer(Path(folder))


def _plain(ends: object) -> bool:
    """Whether end tokens are as every reader takes them: an id, ids, or nothing."""
    return ends is None or (isinstance(ends, int) or (isinstance(ends, list) and ends and all(isinstance(i, int) for i in ends)))


def _refused(generation: GenerationConfig) -> str:
    """Why transformers would not write it; empty if it would."""
    try:
        generation.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return ""


def write_attributes(directory: Path, attributes: Attributes) -> None:
    """Say beside a model for which attributes it was trained, where they are not the paper's two."""
    if attributes != PAPER:
        write_text(Path(directory) / FILE, json.dumps(attributes.dumped(), indent=2) + "\n")


def trained_attributes(name: str) -> Attributes:
    """The attributes for which a model was trained: the paper's two where it does not say."""
    file = Path(name) / FILE
    return stored(file.read_bytes() if file.is_file() else None, file)


def check_attributes(name: str, attributes: Attributes) -> None:
    """ModelError, which names the difference, if the model was trained for other attributes than the recipe's."""
    if (Path(name) / FILE).is_file() and (other := unlike(attributes, trained_attributes(name))):
        raise ModelError(f"{name!r} was trained for other attributes than the recipe's ({other}): give its [attributes] in the recipe")
