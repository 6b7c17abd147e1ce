"""Fine-tuning on a distilled table ([SH] section 2.4): (prompt, control, response) rows as token sequences, with fakes for ExMATE.

Source: [SH] Tuan et al., arXiv 2404.01295.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrlrl.attributes import PAPER
from ctrlrl.chat import text_ids
from ctrlrl.control import Control, corners, other_corner
from ctrlrl.data.batches import TokenBatch
from ctrlrl.data.distill import TABLE
from ctrlrl.data.files import expanded
from ctrlrl.data.rejects import BadRows, Reject
from ctrlrl.data.schemas import attributes_in, conform, distilled_schema
from ctrlrl.data.selection import level_numbers
from ctrlrl.errors import DataError
from ctrlrl.objectives.exmate import exmate_columns
from ctrlrl.prompts import render
from ctrlrl.seeds import derive_seed

_HELD_OUT = -1  # the "epoch" whose fakes are used in validation: the same ones every time
_CHUNK = 1024  # rows decoded at once


def read_distilled(path: str | Path) -> pa.Table:
    """A table of a `distilled_schema`, that of its own attributes, from a file or a directory of ctrlrl distill;
    DataError if it is missing or another table."""
    file = expanded(path)
    file = file / TABLE if file.is_dir() else file
    if not file.is_file():
        raise DataError(f"{str(file)!r} does not exist: give a table or the directory of ctrlrl distill")
    try:
        found = pq.read_table(file)
        table = conform(found, distilled_schema(attributes_in(found.schema, file)), "distilled answers")
        table.validate(full=True)  # text that is not UTF-8
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read: {error}: give a Parquet table of ctrlrl distill") from None
    if not len(table):
        raise DataError(f"{file} has no rows: distil more samples, or by another method")
    return table


def without_bad_rows(table: pa.Table, tokenizer, rejects: list[Reject]) -> pa.Table:
    """The rows that teach something: with an answer, to a prompt that the chat template takes. The others go to `rejects`."""
    attributes = attributes_in(table.schema)
    bad, kept, columns = BadRows(rejects), [], [table[name].to_pylist() for name in ("messages", "response", "token_ids")]
    for row, (messages, response, ids) in enumerate(zip(*columns, strict=True)):
        try:
            if not (ids or response.strip()):
                raise DataError("its response is empty")
            render(tokenizer, messages, attributes=attributes)
            kept.append(row)
        except DataError as error:
            bad.add(f"row {row} of the table", error, response)
    if not kept:
        raise DataError(f"no row of the table is left, the first set aside was {rejects[0].source}: {rejects[0].reason}")
    return table.take(pa.array(kept))


def response_ids(table: pa.Table, tokenizer, end: int, retokenise: bool) -> list[np.ndarray]:
    """The tokens of every response, int32: those that the sampler returned, or where the table keeps none, or on demand, of its text.

    Text is followed by the token `end`, unless the response was cut. DataError if the kept tokens are not the text in this tokenizer.
    """
    kept = [None] * len(table) if retokenise else table["token_ids"].to_pylist()
    texts, reasons = table["response"].to_pylist(), table["finish_reason"].to_pylist()
    for first in range(0, len(kept), _CHUNK):
        rows = [i for i in range(first, min(first + _CHUNK, len(kept))) if kept[i] is not None]
        said = tokenizer.batch_decode([kept[i] for i in rows], skip_special_tokens=True) if rows else []
        wrong = next((i for i, text in zip(rows, said, strict=True) if text.strip() != texts[i].strip()), None)
        if wrong is not None:
            raise DataError(
                f"row {wrong} of the table: its token_ids are not its response in the model's tokenizer: "
                "fine-tune the model that gave the answers, or set retokenise = true"
            )
    missing = [i for i in range(len(kept)) if kept[i] is None]
    made = text_ids(tokenizer, [texts[i] for i in missing], [f"row {i} of the table" for i in missing])
    for i, ids in zip(missing, made, strict=True):
        kept[i] = [*ids, end] if reasons[i] == "stop" else ids
    empty = next((i for i in range(len(kept)) if not kept[i]), None)
    if empty is not None:
        raise DataError(f"row {empty} of the table has an empty response, which teaches nothing: remove it, or give --skip-bad-rows")
    return [np.array(ids, np.int32) for ids in kept]


class ControlledExamples:
    """Rows of a distilled table as examples (see data.epochs).

    objective: "plm" scores the prompt's tokens too; "clm" the response's; "exmate" adds to each row the same response under a fake
    control, drawn anew for each row and epoch. row_lengths [N]: tokens of each row; lengths [N]: of each example, in which a fake counts
    as long as its row.
    """

    def __init__(self, table: pa.Table, responses: Sequence[np.ndarray], tokenizer, objective: str, seed: int):
        self._tokenizer, self._objective, self._seed = tokenizer, objective, seed
        self._messages = table["messages"].combine_chunks()
        self.attributes = attributes_in(table.schema)
        levels = zip(*(table[name].to_pylist() for name in self.attributes.names), strict=True)
        self.controls = [Control(*each, attributes=self.attributes) for each in levels]
        self._responses = list(responses)
        self._prompts = [self._render(row, control) for row, control in enumerate(self.controls)]
        self.row_lengths = np.array([len(p) + len(r) for p, r in zip(self._prompts, self._responses, strict=True)])
        self.lengths = self.row_lengths * (2 if objective == "exmate" else 1)

    def batch(self, rows: np.ndarray, epoch: int) -> TokenBatch:
        """The sequences of these rows in this epoch; with "exmate" each is followed by its fake."""
        if self._objective == "exmate":
            return self.contrasted(rows, epoch)
        tokens = [np.concatenate([self._prompts[i], self._responses[i]]) for i in rows]
        starts = [1 if self._objective == "plm" else len(self._prompts[i]) for i in rows]
        return TokenBatch(tokens, np.array(starts), {}, {})

    def contrasted(self, rows: np.ndarray, epoch: int = _HELD_OUT) -> TokenBatch:
        """Each row under its control, then under a fake one."""
        pairs = [(self._prompts[i], self._render(i, self.fake(i, epoch))) for i in rows]
        prompts = [prompt for pair in pairs for prompt in pair]
        tokens = [np.concatenate([prompt, self._responses[rows[i // 2]]]) for i, prompt in enumerate(prompts)]
        treated = np.tile([1, 0], len(rows))
        return TokenBatch(tokens, np.array([len(p) for p in prompts]), {}, exmate_columns(treated))

    def fake(self, row: int, epoch: int) -> Control:
        """The fake control of a row in an epoch."""
        return other_corner(self.controls[row], derive_seed(self._seed, "fake", int(row), epoch))

    def _render(self, row: int, control: Control) -> np.ndarray:
        messages = self._messages[int(row)].as_py()
        source = f"row {row} of the table"
        return np.array(render(self._tokenizer, messages, control.spell(), source=source, attributes=self.attributes), np.int32)


def contrast_figures(logprobs: Sequence[np.ndarray], controls: Sequence[Control]) -> dict[str, float]:
    """Held-out figures from the logprobs of `contrasted` rows, over all rows and by the corner nearest to the control.

    loss: negative log-likelihood a response token under the true control, whatever the objective; treated_l and untreated_l: mean over
    rows of the mean logprob under the true and the fake control; gap: their difference, above 0 when the model heeds the control.
    """
    true, fake = logprobs[0::2], logprobs[1::2]
    nearest, every = [nearest_corner(control) for control in controls], corners(controls[0].attributes if controls else PAPER)
    groups = {"": np.ones(len(nearest), bool)} | {f"/{c.name}": np.array([near == c for near in nearest], bool) for c in every}
    figures = {}
    for name, chosen in groups.items():
        rows = np.flatnonzero(chosen)
        if not len(rows):
            continue
        treated, untreated = (float(np.mean([kind[i].mean(dtype=np.float64) for i in rows])) for kind in (true, fake))
        loss = -float(np.concatenate([true[i] for i in rows]).mean(dtype=np.float64))
        figures |= {f"loss{name}": loss, f"treated_l{name}": treated, f"untreated_l{name}": untreated, f"gap{name}": treated - untreated}
    return figures


def nearest_corner(control: Control) -> Control:
    """The corner of a control: each level the nearer of the attribute's first and last, of the paper's cut at 0.5 as oversampling does."""
    pairs = zip((a.ends for a in control.attributes), control.levels, strict=True)
    return Control(*(a.levels[int(level_numbers(level, a))] for a, level in pairs), attributes=control.attributes)
