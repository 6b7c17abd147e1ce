"""Messages by prompt id for a prompt file of any size: the file is mapped from the disk, 12 bytes a prompt are kept in memory."""
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrlrl.data.keys import prompt_keys
from ctrlrl.data.schemas import MESSAGES
from ctrlrl.errors import DataError

_BATCH = 16_384  # prompts


class PromptIndex:
    """The prompts of a Parquet file (schema PROMPTS), numbered in its order. `scratch`: folder for the mapped copy."""

    def __init__(self, path: str | Path, scratch: Path):
        try:
            file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} is not a Parquet file of prompts: {error}") from None
        absent = {"prompt_id", "messages"} - set(file.schema_arrow.names)
        if absent:
            raise DataError(f"{path} has no column {', '.join(sorted(absent))}: give the prompts file of the self-generation run")
        self.path, keys = path, []
        mapped = scratch / "prompts.arrow"
        with pa.OSFile(str(mapped), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("messages", MESSAGES)])) as writer:
            for batch in file.iter_batches(_BATCH, columns=["prompt_id", "messages"]):
                keys.append(prompt_keys(batch["prompt_id"]))
                writer.write_table(pa.table({"messages": batch["messages"].cast(MESSAGES)}))
        self._batches = pa.ipc.open_file(pa.memory_map(str(mapped)))
        self._starts = np.cumsum([0, *(len(k) for k in keys)])
        keys = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
        self._order = np.argsort(keys, kind="stable").astype(np.uint32)
        self._sorted = keys[self._order]
        doubled = self._sorted[1:][self._sorted[1:] == self._sorted[:-1]]
        if len(doubled):
            raise DataError(f"{path} holds {len(doubled)} prompts more than once, such as {doubled[0]:016x}")

    def __len__(self) -> int:
        return len(self._sorted)

    def numbers(self, keys: np.ndarray) -> np.ndarray:
        """The numbers of the prompts with these keys, uint32 [n]; raises DataError for one that is not in the file."""
        place = np.minimum(np.searchsorted(self._sorted, keys), max(len(self) - 1, 0))
        absent = self._sorted[place] != keys if len(self) else np.ones(len(keys), bool)
        if absent.any():
            raise DataError(f"prompt {keys[absent][0]:016x} has samples, and is not in {self.path}: give the prompts file of the same run")
        return self._order[place]

    def messages(self, numbers: np.ndarray) -> pa.Array:
        """The messages of the prompts with these numbers, in the order asked for."""
        wanted, back = np.unique(numbers, return_inverse=True)
        batch = np.searchsorted(self._starts, wanted, side="right") - 1
        parts = [
            self._batches.get_batch(int(b)).column(0).take(pa.array(wanted[batch == b] - self._starts[b])) for b in np.unique(batch)
        ]
        found = pa.concat_arrays(parts) if parts else pa.array([], MESSAGES)
        return found.take(pa.array(back))
