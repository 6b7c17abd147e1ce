"""A scorer that is a Python function: whether an answer says its content and stops. Of the study `attributes`."""

import re

_ENOUGH = 4  # words of a sentence that says something: "No." alone does not


def concise(conversations):
    """0.95 for an answer that ends with its first sentence of four words or more; each further word costs 0.3, down to 0.05."""
    return [max(0.95 - 0.3 * _further(answer), 0.05) if answer.strip() else 0.05 for _, answer in conversations]


def _further(answer):
    """Words after the first sentence that says something."""
    sentences = re.split(r"(?<=[.!?])\s+", answer.strip())
    first = next((i for i, sentence in enumerate(sentences) if len(sentence.split()) >= _ENOUGH), len(sentences) - 1)
    return sum(len(sentence.split()) for sentence in sentences[first + 1 :])
