"""The evaluation grid ([SH] section 3.4): every test prompt under every control, answered and scored; one row of a table each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ctrlrl.attributes import HIGH, LOW, PAPER, Attributes
from ctrlrl.control import Control, corners, grid
from ctrlrl.data.schemas import with_attributes
from ctrlrl.data.sources import Prompt
from ctrlrl.evaluation.baselines import in_words, under_attack, under_system_prompt
from ctrlrl.prompts import Messages

JUDGES = ("optimisation", "held_out")


@dataclass(frozen=True)
class Cell:
    """One prompt under one control, asked for by `method`; `index` numbers it within the grid and seeds its response.

    template: which of the four prompting templates spells the control (methods "prompting" and "reranking"), else None. attack: a text
    with {prompt} in it that the user writes in the prompt's place; judges see the plain prompt.
    """

    index: int
    prompt: Prompt
    control: Control
    method: str = "control"
    template: int | None = None
    attack: str = ""

    @property
    def instruction(self) -> str:
        """The text by which the method asks for the control: control tokens, a template's sentence, or a system prompt."""
        return in_words(self.method, self.control, self.template)

    @property
    def asked(self) -> tuple[Messages, str]:
        """What `ctrlrl.prompts.render` takes: the messages and what is appended to the last of them."""
        messages = under_attack(self.prompt.messages, self.attack)
        if self.method == "system":
            return under_system_prompt(messages, self.instruction, self.prompt.source), ""
        return messages, self.instruction


def make_cells(
    prompts: Sequence[Prompt], controls: Sequence[Control], method: str = "control", templates: Sequence[int | None] = (None,)
) -> list[Cell]:
    """The grid: for every prompt every template, for every template every control (neighbours share a prefix)."""
    triples = [(prompt, template, control) for prompt in prompts for template in templates for control in controls]
    return [Cell(i, prompt, control, method, template) for i, (prompt, template, control) in enumerate(triples)]


def controls_of(levels: Sequence[float], attributes: Attributes) -> tuple[Control, ...]:
    """The controls that are asked: by default the corners, else every combination of `levels`."""
    return corners(attributes) if tuple(levels) == (LOW, HIGH) else grid(tuple(levels), attributes)


def score_columns(judge: str, attributes: Attributes = PAPER) -> tuple[str, ...]:
    """Names of the score columns of one set of reward models, in the order of the attributes."""
    return tuple(f"{judge}.{name}" for name in attributes.names)


def make_table(
    cells: Sequence[Cell],
    responses: Sequence[str],
    tokens: Sequence[int],
    finished: np.ndarray,
    scores: Mapping[str, Mapping[str, np.ndarray]],
) -> pa.Table:
    """The long table that evaluation.results reads.

    tokens: length of each response, end token included. scores: judge -> attribute -> [cells].
    """
    attributes = cells[0].control.attributes if cells else PAPER
    columns = {
        "prompt_id": pa.array([cell.prompt.prompt_id for cell in cells], pa.string()),
        "prompt": pa.array([cell.prompt.messages[-1]["content"] for cell in cells], pa.string()),
        "method": pa.array([cell.method for cell in cells], pa.string()),
        "template": pa.array([cell.template for cell in cells], pa.int8()),
        **{f"{name}_request": pa.array([c.control.levels[a] for c in cells], pa.float64()) for a, name in enumerate(attributes.names)},
        "instruction": pa.array([cell.instruction for cell in cells], pa.string()),
        "response": pa.array(list(responses), pa.string()),
        "tokens": pa.array(np.asarray(tokens, np.int32)),
        "finish_reason": pa.array(["stop" if f else "length" for f in finished], pa.string()),
    }
    for judge, by_attribute in scores.items():
        columns |= {f"{judge}.{name}": by_attribute[name].astype(np.float64) for name in attributes.names}
    table = pa.table(columns)
    return table.cast(with_attributes(table.schema, attributes))
