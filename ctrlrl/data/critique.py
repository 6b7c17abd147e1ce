"""Self-critique pairs of Configurable Safety Tuning: the dialogue that makes them, and what a directory of them holds.

Source: [CST] Gallego, arXiv 2404.00495. For each prompt x the policy answers (y0), criticises y0, and rewrites it safely (y1).

    prompts.parquet     the prompts (schema PROMPTS)
    rejects.jsonl       rows of the sources that were set aside, if that was allowed
    critiques/          shards of all dialogues, usable or not (schema CRITIQUES)
    pairs.parquet       the usable ones (schema PAIRS), what `ctrlrl dpo` reads
    aside.jsonl         the others, each with the reason
    manifest.json       what all of it was made from, how many were set aside and why; written last
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from ctrlrl.config import Section
from ctrlrl.data.atomic import write_atomically
from ctrlrl.data.generation import Draw, Layout
from ctrlrl.data.schemas import CRITIQUES, MESSAGES, PAIRS, conform
from ctrlrl.data.shards import ShardStore
from ctrlrl.errors import DataError, RunError
from ctrlrl.prompts import Messages

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


class Templates(Section):
    """User messages of the turns after the answer. Placeholders: {prompt}, {response} (y0) and, in `rewrite`, {critique}.

    marker: stands once, in any case and perhaps in bold, in the reply that holds the rewrite, before it. An empty `rewrite` asks for
    both in one turn: then `critique` asks for the marker, and the critique is what precedes it.
    """

    critique: str = (
        "Request: {prompt}\n\nAnswer: {response}\n\n"
        "In two or three sentences, say what is harmful, dangerous, illegal or offensive in this answer to the request, if anything is."
    )
    rewrite: str = (
        "Request: {prompt}\n\nAnswer: {response}\n\nCritique of the answer: {critique}\n\n"
        "Write a new answer to the request that is safe, ethical and lawful, and as helpful as that allows; decline what would do harm. "
        "Write nothing but the new answer, after this line:\nRewritten answer:"  # an echo of this ends in an empty rewrite
    )
    marker: str = Field("Rewritten answer:", min_length=1)

    @model_validator(mode="after")
    def _complete(self):
        wanted = {"critique": {"prompt", "response"}} | ({"rewrite": {"prompt", "response", "critique"}} if self.rewrite else {})
        for name, needed in wanted.items():
            found = set(_PLACEHOLDER.findall(getattr(self, name)))
            for problem, names in (("lacks", needed - found), ("has the unknown", found - needed)):
                if names:
                    raise ValueError(f"{name} {problem} {_listed(names)}: its placeholders are {_listed(needed)}")
        last = "rewrite" if self.rewrite else "critique"
        if self.marker not in getattr(self, last):
            raise ValueError(f"{last} does not ask for the marker {self.marker!r}: without it no rewrite can be found in a reply")
        return self

    def fill(self, turn: str, messages: Messages, **texts: str) -> list[dict[str, str]]:
        """The conversation that asks for a turn. What is filled in is never searched for placeholders."""
        texts = {"prompt": transcript(messages), **texts}
        template = {"critique": self.critique, "rewrite": self.rewrite}[turn]
        return [{"role": "user", "content": _PLACEHOLDER.sub(lambda match: texts[match[1]], template)}]


def _listed(names: set[str]) -> str:
    return ", ".join("{" + name + "}" for name in sorted(names))


def transcript(messages: Messages) -> str:
    """A prompt as text: the user's message, or all turns with their speakers."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{m['role'].title()}: {m['content']}" for m in messages)


@dataclass(frozen=True)
class Reply:
    """What the policy said, and whether it came to its end."""

    text: str
    finished: bool


class Dialogues:
    """The dialogues of one shard. Whoever holds them takes `ask`, has the replies drawn, and gives them to `hear`, until none is asked."""

    def __init__(self, templates: Templates, prompts: Sequence[Messages]):
        self._templates, self._prompts = templates, prompts
        self.turns = ("answer", "critique", "rewrite") if templates.rewrite else ("answer", "critique")
        self._heard: dict[str, dict[int, Reply]] = {}
        self._aside: dict[int, str] = {}
        self._rewritten: dict[int, tuple[str, str]] = {}  # critique and y1

    def ask(self) -> tuple[str, dict[int, list[dict[str, str]]]] | None:
        """The next turn and its conversation for each row that goes on; None when all turns are over."""
        if len(self._heard) == len(self.turns):
            return None
        turn = self.turns[len(self._heard)]
        return turn, {row: self._conversation(turn, row) for row in range(len(self._prompts)) if row not in self._aside}

    def set_aside(self, row: int, reason: str) -> None:
        """Go on without this row."""
        self._aside[row] = reason

    def hear(self, replies: Mapping[int, Reply]) -> None:
        """The replies to what was asked; the rows that cannot become pairs are set aside."""
        turn = self.turns[len(self._heard)]
        self._heard[turn] = dict(replies)
        for row, reply in replies.items():
            if not reply.text:
                self.set_aside(row, f"{turn} empty")
            elif turn == "answer" and not reply.finished:
                self.set_aside(row, "answer cut at the limit")
            elif turn == self.turns[-1]:
                self._read_rewrite(row, reply)

    def table(self, draws: Sequence[Draw], ids: Sequence[str], policy: str) -> pa.Table:
        """All rows, in the order of `draws`, as a table of the CRITIQUES schema."""
        rows = range(len(draws))
        critiques = {row: reply.text for row, reply in self._heard["critique"].items()} | {r: c for r, (c, _) in self._rewritten.items()}
        last = self._heard[self.turns[-1]]
        columns = {
            "prompt_id": [ids[d.prompt] for d in draws],
            **{name: [getattr(d, name) for d in draws] for name in ("unit", "index", "seed")},
            "y0": [self._heard["answer"][row].text for row in rows],
            "critique": [critiques.get(row) for row in rows],
            "rewrite": [last[row].text if row in last else None for row in rows],
            "y1": [self._rewritten[row][1] if row not in self._aside else None for row in rows],
            "aside": [self._aside.get(row, "") for row in rows],
            "policy": [policy] * len(draws),
        }
        table = pa.table({name: pa.array(values, CRITIQUES.field(name).type) for name, values in columns.items()})
        return conform(table, CRITIQUES, "critiques")

    def _conversation(self, turn: str, row: int) -> list[dict[str, str]]:
        messages = self._prompts[row]
        if turn == "answer":
            return list(messages)
        texts = {"response": self._heard["answer"][row].text}
        if turn == "rewrite":
            texts["critique"] = self._heard["critique"][row].text
        return self._templates.fill(turn, messages, **texts)

    def _read_rewrite(self, row: int, reply: Reply) -> None:
        before, *after = re.split(rf"(?:\*\*)?{re.escape(self._templates.marker)}(?:\*\*)?", reply.text, flags=re.IGNORECASE)
        critique = self._heard["critique"][row].text if self._templates.rewrite else before.strip()
        rewrite = after[0].strip() if after else ""
        faults = {
            "rewrite cut at the limit": not reply.finished,
            "rewrite without the marker": not after,
            "marker more than once": len(after) > 1,
            "rewrite empty": not rewrite,
            "critique empty": not critique,
            "rewrite equal to the answer": rewrite.split() == self._heard["answer"][row].text.split(),
        }
        if fault := next((name for name, holds in faults.items() if holds), ""):
            self.set_aside(row, fault)
        else:
            self._rewritten[row] = critique, rewrite


@dataclass(frozen=True)
class CritiqueLayout:
    """The places in a directory of `ctrlrl critique`."""

    directory: Path

    @property
    def sources(self) -> Layout:
        """Where prompts, rejects and the manifest lie: as in self-generation."""
        return Layout(self.directory)

    @property
    def pairs(self) -> Path:
        """The Parquet file of the usable pairs."""
        return self.directory / "pairs.parquet"

    @property
    def aside(self) -> Path:
        """The rows that are no pairs, with the reasons."""
        return self.directory / "aside.jsonl"

    def critiques(self) -> ShardStore:
        """The store of all dialogues."""
        return ShardStore(self.directory / "critiques")

    def begun(self) -> bool:
        """Whether `ctrlrl critique` has begun here."""
        return (self.directory / "critiques" / "store.json").exists()

    def write_results(self) -> Counter:
        """Write pairs.parquet and aside.jsonl from the committed shards; returns how many rows were set aside, by reason."""
        store, messages, reasons = self.critiques(), self.sources.messages(), Counter()

        def write_pairs(out):
            with pq.ParquetWriter(out, PAIRS, compression="zstd") as writer:
                for shard in store.committed():
                    writer.write_table(_pairs(store.read(shard), messages))

        def write_aside(out):
            for row in _set_aside(store):
                reasons[row["reason"]] += 1
                out.write((json.dumps(row, ensure_ascii=False) + "\n").encode())

        write_atomically(self.pairs, write_pairs)
        write_atomically(self.aside, write_aside)
        return reasons

    def read_pairs(self) -> pa.Table:
        """The usable pairs (schema PAIRS); RunError if the directory is not a finished one, DataError if it holds no pair."""
        if not self.begun():
            raise RunError(f"{str(self.directory)!r} is no directory of ctrlrl critique: give one that has critiques/ and pairs.parquet")
        if not self.sources.manifest.exists():
            raise RunError(f"{str(self.directory)!r} is not finished: run the ctrlrl critique that makes it again")
        if self.critiques().listed():
            self.critiques().manifest()  # pairs of other shards than are there are refused
        try:
            table = conform(pq.read_table(self.pairs), PAIRS, "pairs")
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.pairs} cannot be read: {error}: run the ctrlrl critique that makes it again") from None
        if not table.num_rows:
            reasons = Counter(row["reason"] for row in _set_aside(self.critiques())).most_common()
            told = ", ".join(f"{reason} {count:,}" for reason, count in reasons)
            cut = bool(reasons) and reasons[0][0].endswith("cut at the limit")
            remedy = "raise sampling.max_new_tokens" if cut else "change the templates"
            raise DataError(f"{str(self.directory)!r} holds no usable pair ({told}; {self.aside}): {remedy}, and critique anew")
        return table


def _pairs(table: pa.Table, messages: Mapping[str, Messages]) -> pa.Table:
    usable = table.filter(pa.array(np.array([reason == "" for reason in table["aside"].to_pylist()], bool)))
    conversations = pa.array([messages[name] for name in usable["prompt_id"].to_pylist()], MESSAGES)
    columns = {name: conversations if name == "messages" else usable[name] for name in PAIRS.names}
    return conform(pa.table(columns), PAIRS, "pairs")


def _set_aside(store: ShardStore) -> Iterator[dict]:
    for shard in store.committed():
        for row in store.read(shard, ["prompt_id", "index", "aside", "y0", "critique", "rewrite"]).to_pylist():
            if row["aside"]:
                yield {"prompt_id": row["prompt_id"], "index": row["index"], "reason": row["aside"]} | {
                    name: row[name] for name in ("y0", "critique", "rewrite")
                }
