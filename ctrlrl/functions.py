"""Functions of somebody else's Python file, given as `file.py:function`: found, known by their source, loaded, and called."""

import ast
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ctrlrl.errors import DataError, ModelError

# What code of somebody else may raise: anything, and an exit would end the job as if all were well.
_RAISED = (Exception, SystemExit)


def parts(place: str) -> tuple[Path, str]:
    """File and function of "file.py:function"; ValueError if that is no such place."""
    file, colon, function = place.rpartition(":")
    if not colon or not file.endswith(".py") or not function.isidentifier():
        raise ValueError(f'{place!r} is not "file.py:function"')
    return Path(file).expanduser(), function


def check_defined(place: str) -> None:
    """ValueError unless `place` is a `file.py:function` that is there and defines it; runs nothing of it."""
    try:
        file, name = parts(place)
        tree = ast.parse(file.read_text("utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{place!r} is no file.py:function: {error}") from None
    if not any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body):
        raise ValueError(f"{place!r}: {file} defines no function {name!r}")


def source_sha256(place: str) -> str:
    """SHA-256 of the source of the function's file, and of the function's name; ModelError if the file cannot be read."""
    file, function = parts(place)
    try:
        source = file.read_bytes()
    except OSError as error:
        raise ModelError(f"{place!r} cannot be read: {error.strerror}: give the path of a Python file") from None
    return hashlib.sha256(source + f"\n:{function}".encode()).hexdigest()


def loaded(place: str, what: str) -> Callable[..., object]:
    """The function at `place`, after its file was run; ModelError, which calls it `what`, if that fails."""
    file, function = parts(place)
    module = ModuleType(f"ctrlrl_{file.stem}_{source_sha256(place)[:8]}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # where dataclasses, among others, look for what they are in
    try:
        # From its source, whose hash is the identity: Python's byte code on disk may be that of an earlier text of the same second.
        exec(compile(file.read_bytes(), str(file), "exec", dont_inherit=True), module.__dict__)
        return getattr(module, function)
    except ImportError as error:
        remedy = "it is one file: install what it imports, or name its folder in PYTHONPATH on every node"
        raise ModelError(f"{what} {place!r} cannot be loaded: {error}: {remedy}") from error
    except _RAISED as error:
        raise ModelError(f"{what} {place!r} cannot be loaded: {type(error).__name__}: {error}") from error


def called(function: Callable[..., object], what: str, *given: object) -> object:
    """What the function returns for `given`; DataError, which calls it `what`, for what it raises."""
    try:
        return function(*given)
    except _RAISED as error:
        raise DataError(f"{what} failed: {type(error).__name__}: {error}") from error
