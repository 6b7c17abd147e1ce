"""Functions of a file of one's own: the place, the source, and what is wrong with either, told by name."""

import pytest

from ctrlrl.errors import DataError, ModelError
from ctrlrl.functions import called, check_defined, loaded, source_sha256


@pytest.fixture
def place(tmp_path):
    def write(source, function="f"):
        (tmp_path / "mine.py").write_text(source)
        return f"{tmp_path}/mine.py:{function}"

    return write


def test_a_function_is_known_by_its_source_and_its_name(place):
    one = place("def f(x): return x + 1\n")
    assert called(loaded(one, "it"), "it", 1) == 2
    before, other = source_sha256(one), source_sha256(one.replace(":f", ":g"))
    assert source_sha256(one) == before != other
    assert source_sha256(place("def f(x): return x + 2\n")) != before


def test_what_is_wrong_is_told(place):
    check_defined(place("raise SystemError\ndef f(x): ...\n"))  # runs nothing
    for source, function, told in (("def g(x): ...", "f", "defines no function 'f'"), ("def f(:", "f", "is no file.py:function")):
        with pytest.raises(ValueError, match=told):
            check_defined(place(source, function))
    with pytest.raises(ModelError, match="^the judge '.*mine.py:f' cannot be loaded: ZeroDivisionError: division by zero"):
        loaded(place("1 / 0"), "the judge")
    with pytest.raises(ModelError, match="cannot be loaded: AttributeError"):
        loaded(place("x = 1"), "the judge")
    with pytest.raises(DataError, match="^the judge failed: KeyError: 'a'"):
        called(loaded(place("def f(x): return {}[x]"), "the judge"), "the judge", "a")


def test_whatever_code_of_others_raises_is_told_and_an_exit_ends_nothing(place):
    odd = "class Odd(Exception): ...\n"
    for source, told in ((odd + "raise Odd('x')", "Odd: x"), ("import sys; sys.exit(0)", "SystemExit: 0")):
        with pytest.raises(ModelError, match=f"cannot be loaded: {told}"):
            loaded(place(source), "the judge")
    with pytest.raises(ModelError, match="No module named 'beside_it': it is one file: install what it imports, or name its folder"):
        loaded(place("import beside_it"), "the judge")
    for source, told in ((odd + "def f(): raise Odd('x')", "failed: Odd: x"), ("def f(): raise SystemExit(3)", "failed: SystemExit: 3")):
        with pytest.raises(DataError, match=told):
            called(loaded(place(source), "the judge"), "the judge")


def test_a_file_may_be_what_python_files_are_and_its_present_text_counts(place):
    source = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    source += "@dataclass\nclass A:\n    x: int\ndef f(): return A(1).x\n"
    assert loaded(place(source), "it")() == 1
    assert loaded(place(source.replace("A(1)", "A(2)")), "it")() == 2  # of the same size, in the same second
