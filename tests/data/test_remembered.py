"""What slow scorers said is not asked for again: within a run, while it is under way, and from the run's file."""

from concurrent.futures import Future

import numpy as np
import pytest

from ctrlrl.data.remembered import Remembered, key_of
from ctrlrl.errors import DataError, StorageError


def talk(number, answer=""):
    return [{"role": "user", "content": f"Question {number}?"}], answer


class Asked:
    """A scorer under way: what it was asked, and futures that a test answers."""

    def __init__(self):
        self.calls = []

    def __call__(self, conversations):
        self.calls.append((conversations, Future()))
        return self.calls[-1][1]

    def answer(self, call):
        conversations, future = self.calls[call]
        future.set_result(np.array([int(m[0]["content"].split()[1][:-1]) / 10 for m, _ in conversations], np.float32))


def test_nothing_is_asked_twice(tmp_path):
    asked = Asked()
    memory = Remembered(asked, 2, tmp_path / "kept" / "x.txt")
    first = memory.raw([talk(1), talk(2), talk(1), talk(3)])
    assert [conversations for conversations, _ in asked.calls] == [[talk(1), talk(2)], [talk(3)]]
    second = memory.raw([talk(3), talk(4)])  # 3 is under way
    assert [conversations for conversations, _ in asked.calls[2:]] == [[talk(4)]]
    asked.answer(2)
    asked.answer(0)
    assert not first.done() and not second.done()
    asked.answer(1)
    assert first.result().tolist() == np.float32([0.1, 0.2, 0.1, 0.3]).tolist() and first.result().dtype == np.float32
    assert second.result().tolist() == np.float32([0.3, 0.4]).tolist()
    assert memory.raw([talk(4), talk(1)]).result().tolist() == np.float32([0.4, 0.1]).tolist() and len(asked.calls) == 3
    memory.raw([talk(1, "another answer")])
    assert len(asked.calls) == 4 and memory.raw([]).result().shape == (0,)


def test_a_run_that_goes_on_reads_what_the_killed_one_was_told(tmp_path):
    file, asked = tmp_path / "x.txt", Asked()
    memory = Remembered(asked, 8, file)
    memory.raw([talk(1), talk(2)])
    asked.answer(0)
    file.write_text(file.read_text() + key_of(talk(3)) + " 0.")  # killed in the middle of a line
    again = Asked()
    memory = Remembered(again, 8, file)
    assert memory.raw([talk(2), talk(1)]).result().tolist() == np.float32([0.2, 0.1]).tolist() and not again.calls
    found = memory.raw([talk(3), talk(2)])
    again.answer(0)
    assert found.result().tolist() == np.float32([0.3, 0.2]).tolist() and again.calls[0][0] == [talk(3)]
    assert Remembered(again, 8, file).raw([talk(1), talk(2), talk(3)]).result().tolist() == np.float32([0.1, 0.2, 0.3]).tolist()
    assert len(again.calls) == 1


def test_what_failed_is_asked_again_and_the_rest_is_kept(tmp_path):
    asked = Asked()
    memory = Remembered(asked, 1, tmp_path / "x.txt")
    found = memory.raw([talk(1), talk(2)])
    asked.calls[1][1].set_exception(DataError("no verdict"))
    with pytest.raises(DataError, match="no verdict"):
        found.result(0)
    asked.answer(0)
    again = memory.raw([talk(1), talk(2)])
    assert [conversations for conversations, _ in asked.calls[2:]] == [[talk(2)]]
    asked.answer(2)
    assert again.result().tolist() == np.float32([0.1, 0.2]).tolist()


def test_an_answer_without_a_score_is_asked_for_again_when_the_run_goes_on(tmp_path):
    asked = Asked()
    memory = Remembered(asked, 8, tmp_path / "x.txt")
    found = memory.raw([talk(1), talk(2)])
    asked.calls[0][1].set_result(np.array([np.nan, 0.5], np.float32))
    assert np.isnan(found.result()[0]) and np.isnan(memory.raw([talk(1)]).result()[0]) and len(asked.calls) == 1
    again = Remembered(asked, 8, tmp_path / "x.txt").raw([talk(2), talk(1)])
    assert asked.calls[1][0] == [talk(1)]
    asked.answer(1)
    assert again.result().tolist() == np.float32([0.5, 0.1]).tolist()


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    asked = Asked()
    memory = Remembered(asked, 8, tmp_path / "x.txt")
    found = memory.raw([talk(1)])

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.open", full)
    asked.answer(0)
    with pytest.raises(StorageError, match="x.txt"):
        found.result(0)
