"""Fingerprints of models: what was used is known by its content, not by the name of its directory."""

import hashlib
from pathlib import Path

from huggingface_hub import snapshot_download

from ctrlrl.data.atomic import file_sha256
from ctrlrl.errors import ModelError
from ctrlrl.models.python_scorer import python_contents
from ctrlrl.models.reading import check_no_pointer, existing
from ctrlrl.models.scorer_names import is_python, is_service, weights_of

CONTENT = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")


def model_fingerprint(name: str) -> str:
    """SHA-256 over the names and contents of a model's weights, configuration and tokenizer files; a hub name is fetched for it."""
    return hashlib.sha256("".join(f"{file} {content}\n" for file, content in model_contents(name).items()).encode()).hexdigest()


def model_contents(name: str) -> dict[str, str]:
    """The SHA-256 of each of these files, by file name; of a scorer that is a Python function that of its source, of a service that of
    its address."""
    if is_service(name):
        return {"url": hashlib.sha256(name.encode()).hexdigest()}
    if is_python(name):
        return python_contents(name)
    folder = model_folder(weights_of(name))
    files = sorted({file for pattern in CONTENT for file in folder.glob(pattern)})
    if not any(file.suffix == ".safetensors" for file in files):
        raise ModelError(f"{name!r} has no safetensors weights: save it with save_pretrained")
    for file in files:
        check_no_pointer(file)  # two models that are not there would be the same
    return {file.name: file_sha256(file) for file in files}


def model_folder(name: str) -> Path:
    """Where a model's files lie; those of a hub name are fetched for it."""
    path = Path(existing(name))
    try:
        return path if path.is_dir() else Path(snapshot_download(name, allow_patterns=list(CONTENT)))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the files of {name!r}: {error}: give a local directory, or a hub name") from None
