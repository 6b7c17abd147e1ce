"""The evaluation grid ([SH] section 3.4): every test prompt under every control, answered and scored; one row of a table each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ctrlrl.control import ATTRIBUTES, Control
from ctrlrl.data.sources import Prompt

JUDGES = ("optimisation", "held_out")


@dataclass(frozen=True)
class Cell:
    """One prompt under one control; `index` numbers it within the grid and seeds its response."""

    index: int
    prompt: Prompt
    control: Control


def make_cells(prompts: Sequence[Prompt], controls: Sequence[Control]) -> list[Cell]:
    """The grid, the controls of a prompt next to each other (they share a prefix)."""
    pairs = [(prompt, control) for prompt in prompts for control in controls]
    return [Cell(i, prompt, control) for i, (prompt, control) in enumerate(pairs)]


def score_columns(judge: str) -> tuple[str, str]:
    """Names of the two score columns of one set of reward models, helpfulness first."""
    return tuple(f"{judge}.{attribute}" for attribute in ATTRIBUTES)


def make_table(cells: Sequence[Cell], responses: Sequence[str], finished: np.ndarray, scores: dict[str, dict[str, np.ndarray]]) -> pa.Table:
    """The long table that evaluation.metrics reads. scores: judge -> attribute -> [cells]."""
    columns = {
        "prompt_id": [cell.prompt.prompt_id for cell in cells],
        "prompt": [cell.prompt.messages[-1]["content"] for cell in cells],
        **{f"{name}_request": [getattr(cell.control, name) for cell in cells] for name in ATTRIBUTES},
        "response": list(responses),
        "finished": finished,
    }
    for judge, by_attribute in scores.items():
        columns |= {column: by_attribute[name].astype(np.float64) for column, name in zip(score_columns(judge), ATTRIBUTES, strict=True)}
    return pa.table(columns)
