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
