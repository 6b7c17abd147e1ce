"""Scorers that are a Python function: `python = "file.py:function"` in the place of a reward model.

The function gets a list of (messages, answer) and returns as many numbers from 0 to 1. It runs in the workers of its own pool; its file's
source is its fingerprint, and the model's name in recipes and messages is `python:file.py:function`.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ctrlrl.errors import DataError, ModelError
from ctrlrl.functions import called, loaded, parts, source_sha256
from ctrlrl.models.scorer_names import PYTHON, is_python
from ctrlrl.prompts import Messages

# Conversations on which scorers are tried before anything starts.
TRIED = ((({"role": "user", "content": "A question?"},), "An answer."), (({"role": "user", "content": "A question?"},), ""))


def named(place: str) -> str:
    """The name of the scorer at "file.py:function"; ValueError if that is no such place."""
    file, function = parts(place)
    return f"{PYTHON}{file.absolute()}:{function}"


def python_contents(name: str) -> dict[str, str]:
    """SHA-256 of the source of the function's file, with the function's name, by the file's name."""
    place = name.removeprefix(PYTHON)
    return {parts(place)[0].name: source_sha256(place)}


def check_python(name: str) -> bool:
    """Whether a scorer is a function; ModelError if that is not there, or does not score two small conversations."""
    if not is_python(name):
        return False
    try:
        PythonScorer(name).raw(TRIED)
    except DataError as error:
        raise ModelError(str(error)) from None
    return True


class PythonScorer:
    """A function of conversations as a scorer. calibration: that of its configuration, by default none."""

    def __init__(self, name: str, calibration=None):
        self._name, self._calibration = name, calibration
        source_sha256(name.removeprefix(PYTHON))
        self._function = loaded(name.removeprefix(PYTHON), "the scorer")

    def score(self, conversations: Sequence[tuple[Messages, str]]) -> np.ndarray:
        """Scores in [0, 1], fp32 [B], of (prompt messages, response text) pairs."""
        raw = self.raw(conversations)
        return (self._calibration(raw) if self._calibration else raw).astype(np.float32)

    def raw(self, conversations: Sequence[tuple[Messages, str]]) -> np.ndarray:
        """What the function returns, fp32 [B]; DataError for anything else than as many numbers from 0 to 1, and for what it raises."""
        if not conversations:
            return np.zeros(0, np.float32)
        raw = called(lambda asked: _array(self._function(asked)), f"the scorer {self._name!r}", list(conversations))
        if raw.dtype.kind not in "fiub" or raw.shape != (len(conversations),) or not ((raw >= 0) & (raw <= 1)).all():
            some = f"{raw.ravel()[:3].tolist()} … of shape {list(raw.shape)}"
            raise DataError(f"the scorer {self._name!r} must return {len(conversations)} numbers from 0 to 1; it gave {some}")
        return raw.astype(np.float32)


def _array(given: object) -> np.ndarray:
    """What a function returned, a tensor of any dtype among it, as an array."""
    return np.asarray(given.detach().cpu().double() if isinstance(given, torch.Tensor) else given)
