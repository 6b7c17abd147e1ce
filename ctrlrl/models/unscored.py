"""Answers that a service or a judge gives no score: set aside and counted, never guessed. Too many of them are an error."""

import math
import threading
from collections.abc import Mapping, Sequence

import numpy as np

from ctrlrl.errors import DataError
from ctrlrl.prompts import Messages

# Answers that a run is taken to have at least, so that one early answer is no large share of it.
ENOUGH = 200


class Unscored:
    """Counts what one scorer was asked in a run. name: of the scorer. limit: the share of the answers that may stay without a score: of all
    that came, or of ENOUGH while they are fewer; 0: none may. May be used from any thread."""

    def __init__(self, name: str, limit: float):
        self._name, self._limit, self._lock = name, limit, threading.Lock()
        self.answers = self.unscored = 0
        self._first = ""

    def count(self, conversations: Sequence[tuple[Messages, str]], raw: np.ndarray, reasons: Mapping[int, str]) -> str:
        """Add answers with their raw outputs, NaN where there is none, and why, by row; returns a line to print when the first one comes
        that is set aside, else "". DataError, with how many there are and the first of them, if they are too many."""
        with self._lock:
            before, self.answers = self.unscored, self.answers + len(raw)
            for row in np.flatnonzero(np.isnan(raw)).tolist():
                self.unscored += 1
                self._first = self._first or f"{shown(conversations[row])}: {reasons.get(row, 'without a reason')}"
            if self.unscored > self._limit * max(self.answers, ENOUGH):
                raise DataError(
                    f"{self._name} could not score {self.unscored} of {self.answers} answers, and unscored = {self._limit:g} is the share "
                    f"that may be set aside; the first is {self._first}"
                )
            told = f"{self._name} has no score for {self._first} (the first that is set aside; unscored = {self._limit:g} of all may be)"
            return told if self.unscored and not before else ""


def check_unscored(name: str, unscored: int, answers: int, limit: float, remedy: str) -> None:
    """DataError if of a whole set of scores too many are missing."""
    if unscored > limit * answers:
        allowed = f"unscored = {limit:g} is the share that may be set aside"
        raise DataError(f"{name} has no score for {unscored} of {answers} answers, and {allowed}: {remedy}")


def shown(conversation: tuple[Messages, str]) -> str:
    """The beginning of an answer and of what it answers, for messages."""
    messages, answer = conversation
    return f"the answer {answer[:60]!r} to {messages[-1]['content'][:60]!r}"


def score_or_none(score: float) -> float | None:
    """A score as JSON can hold it: None where there is none."""
    return None if math.isnan(score) else score
