"""What slow scorers have said, by content: the same conversation is not asked about twice in a run, nor when it goes on.

One line an answer in a file of the run, appended as they come: the SHA-256 of the conversation, and the raw output. A line that a killed
run left half written counts as none. There is one file for each identity of a scorer, so that no other's answers are found in it. An
answer without a score (NaN) is remembered by the process alone: a run that goes on asks for it anew.
"""

import hashlib
import json
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import numpy as np

from ctrlrl.data.disk import storage_error
from ctrlrl.prompts import Messages

Conversation = tuple[Messages, str]
REMEMBERED = "remembered"  # the folder in that of a run
_DIGITS = 64  # of a SHA-256


class Remembered:
    """`ask`, a function of up to `portion` conversations that gives a future of their raw outputs, fp32 [B], with a memory.

    file: where it is kept; None: in this process alone. May be used from any thread. What is asked and not yet answered is not asked again
    either; what failed is.
    """

    def __init__(self, ask: Callable[[list[Conversation]], Future], portion: int, file: Path | None):
        self._ask, self._portion, self._file, self._lock = ask, portion, file, threading.Lock()
        self._known, self._torn = _read(file) if file else ({}, False)
        self._pending: dict[str, Future] = {}

    def raw(self, conversations: Sequence[Conversation]) -> Future:
        """A future of the raw outputs, fp32 [B], in the order of the conversations; it fails as the first asking for one of them does."""
        keys, result = [key_of(conversation) for conversation in conversations], Future()
        result.set_running_or_notify_cancel()  # others may wait for the same answers
        with self._lock:
            new = {key: one for key, one in zip(keys, conversations, strict=True) if key not in self._known and key not in self._pending}
            unasked = list(new)
            portions = {tuple(unasked[i : i + self._portion]): Future() for i in range(0, len(unasked), self._portion)}
            self._pending |= {key: asked for portion, asked in portions.items() for key in portion}
            waited = {self._pending[key] for key in keys if key not in self._known}
        left = [len(waited)]

        def done(one: Future) -> None:
            with self._lock:
                left[0] -= 1
                last = left[0] == 0
            if one.exception() is not None and not result.done():
                result.set_exception(one.exception())
            elif last and not result.done():
                result.set_result(self._of(keys))

        for portion, asked in portions.items():
            self._ask([new[key] for key in portion]).add_done_callback(partial(self._answered, portion, asked))
        if not waited:
            result.set_result(self._of(keys))
        for one in waited:
            one.add_done_callback(done)
        return result

    def _answered(self, keys: Sequence[str], asked: Future, answering: Future) -> None:
        """Keep what was answered, and tell those who wait."""
        error = answering.exception()
        with self._lock:
            if error is None:
                raw = [float(value) for value in answering.result()]
                self._known |= dict(zip(keys, raw, strict=True))
                error = self._append(keys, raw)
            for key in keys:
                del self._pending[key]
        if error is None:
            asked.set_result(None)
        else:
            asked.set_exception(error)

    def _append(self, keys: Sequence[str], raw: list[float]) -> BaseException | None:
        if not self._file:
            return None
        lines = "".join(f"{key} {value!r}\n" for key, value in zip(keys, raw, strict=True) if not math.isnan(value))
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as file:
                file.write("\n" * self._torn + lines)
        except OSError as error:
            return storage_error(error, self._file) or error
        self._torn = False
        return None

    def _of(self, keys: list[str]) -> np.ndarray:
        return np.array([self._known[key] for key in keys], np.float32)


def key_of(conversation: Conversation) -> str:
    """SHA-256 of the messages and the answer."""
    messages, answer = conversation
    plain = json.dumps([[[message["role"], message["content"]] for message in messages], answer])
    return hashlib.sha256(plain.encode()).hexdigest()


def _read(file: Path) -> tuple[dict[str, float], bool]:
    """The answers in a file, which may not be there, and whether its last line lacks its end."""
    text, known = file.read_text("utf-8", errors="replace") if file.exists() else "", {}
    for line in text.split("\n")[:-1]:
        key, _, value = line.partition(" ")
        try:
            known |= {key: float(value)} if len(key) == _DIGITS else {}
        except ValueError:
            continue  # half of one, and the next behind it
    return known, bool(text) and not text.endswith("\n")
