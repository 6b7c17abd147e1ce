"""The training-free method at serving time ([SH] section 3.1): draw several answers, keep the one whose scores are nearest to the dial.

Source: [SH] Tuan et al., arXiv 2404.01295.
"""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from ctrlrl.control import Control
from ctrlrl.evaluation.baselines import nearest


def candidates(fields: dict[str, Any], count: int) -> dict[str, Any]:
    """The request for `count` whole answers."""
    return {name: value for name, value in fields.items() if name not in ("stream", "stream_options", "logprobs")} | {"n": count}


def chosen(completion: dict[str, Any], scores: Sequence[dict[str, float | None]], control: Control) -> dict[str, Any]:
    """`completion` with the nearest of its answers alone, of those that have scores if any has; its usage counts all that were drawn."""
    table = np.array([[[score[name] for name in control.attributes.names] for score in scores]], np.float64)
    best = int(nearest(table, np.array([control.levels]))[0])
    return {**completion, "choices": [{**completion["choices"][best], "index": 0}]}


async def as_events(completion: dict[str, Any], fields: dict[str, Any]) -> AsyncIterator[str]:
    """A completion as the server-sent events of a stream."""
    choice = completion["choices"][0]
    head = {key: completion[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    text = choice["message"].get("content") or ""
    for delta, finish in (({"role": "assistant", "content": ""}, None), ({"content": text}, choice["finish_reason"])):
        yield _event(head | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]})
    if (fields.get("stream_options") or {}).get("include_usage"):
        yield _event(head | {"choices": [], "usage": completion["usage"]})
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
