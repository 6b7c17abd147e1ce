"""Scorers that are a Python function: `python = "file.py:function"` in the place of a reward model.

The function gets a list of (messages, answer) and returns as many numbers from 0 to 1. It runs in the workers of its own pool; its file's
source is its fingerprint, and the model's name in recipes and messages is `python:file.py:function`.
"""

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ctrlrl.errors import DataError, ModelError
from ctrlrl.prompts import Messages

PREFIX = "python:"
# What a function of somebody else may raise.
_RAISED = (
    ArithmeticError, LookupError, TypeError, ValueError, AttributeError, NameError, RuntimeError, AssertionError, ImportError, SyntaxError,
    OSError,
)  # fmt: skip
_TRIED = ((({"role": "user", "content": "A question?"},), "An answer."), (({"role": "user", "content": "A question?"},), ""))


def is_python(name: str) -> bool:
    """Whether a scorer is a function."""
    return name.startswith(PREFIX)


def named(place: str) -> str:
    """The name of the scorer at "file.py:function"; ValueError if that is no such place."""
    file, colon, function = place.rpartition(":")
    if not colon or not file.endswith(".py") or not function.isidentifier():
        raise ValueError(f'{place!r} is not "file.py:function"')
    return f"{PREFIX}{Path(file).expanduser().absolute()}:{function}"


def source_sha256(name: str) -> str:
    """SHA-256 of the source of the function's file, and of the function's name."""
    file, _, function = name.removeprefix(PREFIX).rpartition(":")
    try:
        source = Path(file).read_bytes()
    except OSError as error:
        raise ModelError(f"the scorer {name!r} cannot be read: {error.strerror}: give the path of a Python file") from None
    return hashlib.sha256(source + f"\n:{function}".encode()).hexdigest()


def check_python(name: str) -> bool:
    """Whether a scorer is a function; ModelError if that is not there, or does not score two small conversations."""
    if not is_python(name):
        return False
    try:
        PythonScorer(name).raw(_TRIED)
    except DataError as error:
        raise ModelError(str(error)) from None
    return True


class PythonScorer:
    """A function of conversations as a scorer. calibration: that of its configuration, by default none."""

    def __init__(self, name: str, calibration=None):
        self._name, self._calibration = name, calibration
        file, _, function = name.removeprefix(PREFIX).rpartition(":")
        source_sha256(name)
        module = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("ctrlrl_scorer", file))
        try:
            spec.loader.exec_module(module)
            self._function = getattr(module, function)
        except _RAISED as error:
            raise ModelError(f"the scorer {name!r} cannot be loaded: {type(error).__name__}: {error}") from error

    def score(self, conversations: Sequence[tuple[Messages, str]]) -> np.ndarray:
        """Scores in [0, 1], fp32 [B], of (prompt messages, response text) pairs."""
        raw = self.raw(conversations)
        return (self._calibration(raw) if self._calibration else raw).astype(np.float32)

    def raw(self, conversations: Sequence[tuple[Messages, str]]) -> np.ndarray:
        """What the function returns, fp32 [B]; DataError for anything else than as many numbers from 0 to 1, and for what it raises."""
        if not conversations:
            return np.zeros(0, np.float32)
        try:
            raw = np.asarray(self._function(list(conversations)), np.float32)
        except _RAISED as error:
            raise DataError(f"the scorer {self._name!r} failed: {type(error).__name__}: {error}") from error
        if raw.shape != (len(conversations),) or not ((raw >= 0) & (raw <= 1)).all():
            some = raw.ravel()[:3].tolist()
            raise DataError(f"the scorer {self._name!r} must return {len(conversations)} numbers from 0 to 1; it gave {raw.size}: {some} …")
        return raw
