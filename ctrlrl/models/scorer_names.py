"""What scorers are called in recipes and messages, and what that says of them: `python:file.py:function`, an address, `judge:MODEL`."""

PYTHON, JUDGE = "python:", "judge:"


def is_python(name: str) -> bool:
    """Whether a scorer is a function."""
    return name.startswith(PYTHON)


def is_service(name: str) -> bool:
    """Whether a scorer, or the judge that it is, is behind an address."""
    return name.removeprefix(JUDGE).startswith(("http://", "https://"))


def is_classifier(name: str) -> bool:
    """Whether a scorer is a reward model, which reads a conversation by its own chat template."""
    return not (is_python(name) or is_service(name) or name.startswith(JUDGE))


def weights_of(name: str) -> str:
    """The directory or hub name whose weights a scorer of this name loads; empty for functions and services."""
    return "" if is_python(name) or is_service(name) else name.removeprefix(JUDGE)
