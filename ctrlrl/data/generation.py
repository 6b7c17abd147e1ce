"""What a self-generation directory holds, and which samples belong to which of its shards ([SH] section 2.2).

    prompts.parquet                   the prompts (schema PROMPTS)
    rejects.jsonl                     rows of the sources that were set aside, if that was allowed
    samples/                          shards of answers (schema SAMPLES)
    scores/SET/ATTRIBUTE/             shards of scores (schema SCORES), row by row those of samples/, such as optimisation/helpful/; one SET
                                      for each choice of reward models
    scores/SET/attributes.json        the attributes of the set, where they are not the paper's two
    manifest.json                     what all of it was made from, and how fast; written last
"""
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrlrl.attributes import FILE, PAPER, Attributes, stored, unlike
from ctrlrl.data.atomic import write_atomically, write_text
from ctrlrl.data.calibration import Calibration
from ctrlrl.data.rejects import REJECTS, Reject, write_rejects
from ctrlrl.data.schemas import SAMPLES, SCORES, UNSCORED, conform, prompts_table
from ctrlrl.data.shards import ShardStore
from ctrlrl.data.sources import Prompt
from ctrlrl.errors import DataError, RunError
from ctrlrl.seeds import derive_seed

OPTIMISATION = "optimisation"  # the set of scores that generation itself makes
_KEY = ["prompt_id", "unit", "index"]


@dataclass(frozen=True)
class Layout:
    """The places in a self-generation directory."""

    directory: Path

    @property
    def prompts(self) -> Path:
        """The Parquet file of the prompts."""
        return self.directory / "prompts.parquet"

    @property
    def rejects(self) -> Path:
        """Rows that were set aside."""
        return self.directory / REJECTS

    @property
    def manifest(self) -> Path:
        """The summary of a finished generation."""
        return self.directory / "manifest.json"

    def samples(self) -> ShardStore:
        """The store of answers."""
        return ShardStore(self.directory / "samples")

    def scores(self, name: str, attribute: str) -> ShardStore:
        """The store of one attribute's scores in the set `name`."""
        return ShardStore(self.directory / "scores" / name / attribute, self.samples())

    def attributes(self, name: str) -> Attributes:
        """Those of the set `name` of scores."""
        file = self.directory / "scores" / name / FILE
        return stored(file.read_bytes() if file.exists() else None, file)

    def set_attributes(self, name: str, attributes: Attributes) -> None:
        """Bind the set `name` to `attributes`; RunError, which names the difference, if it has scores of others."""
        folder = self.directory / "scores" / name
        if any(folder.glob("*/store.json")):
            self.check_attributes(name, attributes)
        elif attributes != PAPER:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / FILE, json.dumps(attributes.dumped(), indent=2) + "\n")

    def check_attributes(self, name: str, attributes: Attributes) -> None:
        """RunError, which names the difference, unless `attributes` are those of the set `name`, or nothing is in it."""
        folder = self.directory / "scores" / name
        if any(folder.glob("*/store.json")) and (other := unlike(attributes, self.attributes(name))):
            raise RunError(f"{str(folder)!r} holds scores of other attributes ({other}): undo the change, or give another place")

    def score_stores(self, name: str) -> dict[str, ShardStore]:
        """The stores of the set `name`, by attribute."""
        return {attribute: self.scores(name, attribute) for attribute in self.attributes(name).names}

    def score_sets(self) -> dict[str, list[str]]:
        """The attributes of each set of scores that is there, finished or not."""
        folders = sorted((self.directory / "scores").glob("*")) if (self.directory / "scores").is_dir() else []
        found = {folder.name: [a for a in self.attributes(folder.name).names if (folder / a / "store.json").exists()] for folder in folders}
        return {name: attributes for name, attributes in found.items() if attributes}

    @property
    def finished(self) -> bool:
        """Whether the manifest is there, and all that it sums up: the answers and their scores, as they were then."""
        made = [(OPTIMISATION, a) for a in self.score_sets().get(OPTIMISATION, [])]
        return self.manifest.exists() and all(store.finished for store in (self.samples(), *(self.scores(*which) for which in made)))

    def existing(self) -> "Layout":
        """Itself; raises RunError unless `ctrlrl generate` has begun here."""
        if not (self.directory / "samples" / "store.json").exists() or not self.prompts.exists():
            raise RunError(f"{str(self.directory)!r} is no directory of ctrlrl generate: give one that has samples/ and prompts.parquet")
        return self

    def write_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Write prompts.parquet, unless it is there and holds these."""
        try:
            if self.prompts.exists() and pq.read_table(self.prompts, columns=["prompt_id"])["prompt_id"].to_pylist() == [
                prompt.prompt_id for prompt in prompts
            ]:
                return
        except (OSError, pa.ArrowException):
            pass  # damaged: written again
        write_atomically(self.prompts, lambda out: pq.write_table(prompts_table(prompts), out, compression="zstd"))

    def write_sources(self, prompts: Sequence[Prompt], rejects: Sequence[Reject]) -> None:
        """Write prompts.parquet, as write_prompts, and what was set aside."""
        self.write_prompts(prompts)
        write_rejects(self.directory, rejects)

    def messages(self) -> dict[str, list[dict[str, str]]]:
        """Messages by prompt id."""
        try:
            table = pq.read_table(self.prompts, columns=["prompt_id", "messages"])
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.prompts} cannot be read: {error}: restore it, or run ctrlrl generate here again") from None
        return dict(zip(*(table[name].to_pylist() for name in ("prompt_id", "messages")), strict=True))


@dataclass(frozen=True)
class Draw:
    """One sample to draw: which prompt (its place among all), the unit, the index among the unit's samples of it, and its seed."""

    prompt: int
    unit: int
    index: int
    seed: int


@dataclass(frozen=True)
class Plan:
    """A fixed division of all samples into shards: unit by unit, whole prompts, about `shard` samples each.

    Neither workers nor scale have a part in it, so a shard is the same whoever makes it, and a larger scale only adds shards.
    """

    prompts: int
    samples_per_prompt: int
    shard: int
    seed: int

    @property
    def prompts_per_shard(self) -> int:
        """All samples of a prompt are in one shard, where they share the prompt's prefix."""
        return max(1, self.shard // self.samples_per_prompt)

    @property
    def shards_per_unit(self) -> int:
        """Shards of one pass over the prompts."""
        return -(-self.prompts // self.prompts_per_shard)

    def draws(self, shard: int, ids: Sequence[str]) -> list[Draw]:
        """The samples of a shard in their order; `ids`: the prompt ids of all prompts, from which the seeds come."""
        unit, block = divmod(shard, self.shards_per_unit)
        first = block * self.prompts_per_shard
        return [
            Draw(prompt, unit, index, derive_seed(self.seed, "generate", int(ids[prompt], 16), unit, index))
            for prompt in range(first, min(first + self.prompts_per_shard, self.prompts))
            for index in range(self.samples_per_prompt)
        ]


def prompts_fingerprint(prompts: Sequence[Prompt]) -> dict:
    """How many prompts, and a hash of all of them in their order."""
    ids = "\n".join(p.prompt_id for p in prompts)
    return {"count": len(prompts), "sha256": hashlib.sha256(ids.encode()).hexdigest()}


def samples_table(
    draws: Sequence[Draw], ids: Sequence[str], texts: Sequence[str], tokens: Sequence[np.ndarray], finished: np.ndarray, policy: str
) -> pa.Table:
    """Answers as a table of the SAMPLES schema, in the order of `draws`."""
    lengths = np.array([len(t) for t in tokens], np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    flat = np.concatenate([*tokens, np.zeros(0, np.int32)]).astype(np.int32)
    columns = {
        "prompt_id": pa.array([ids[d.prompt] for d in draws], pa.string()),
        **{name: pa.array([getattr(d, name) for d in draws], pa.int64()) for name in ("unit", "index", "seed")},
        "response": pa.array(texts, pa.string()),
        "token_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat)),
        "finish_reason": pa.array(np.where(finished, "stop", "length").tolist(), pa.string()),
        "token_count": pa.array(lengths),
        "policy": pa.array([policy] * len(draws), pa.string()),
    }
    return conform(pa.table(columns), SAMPLES, "samples")


def scores_table(samples: pa.Table, raw: np.ndarray, calibration: Calibration) -> pa.Table:
    """Scores of `samples`, in their order, as a table of the SCORES schema; of UNSCORED, with nulls, if some raw outputs are NaN."""
    none = np.isnan(raw)
    scores = {"score": pa.array(calibration(raw), mask=none), "raw": pa.array(raw.astype(np.float32), mask=none)}
    return conform(pa.table({name: samples[name] for name in _KEY} | scores), UNSCORED if none.any() else SCORES, "scores")


def score_facts(table: pa.Table) -> dict:
    """Of a shard of scores: their mean (None without any), and, where there are some, how many answers have none."""
    scores = table["score"].drop_null()
    mean = float(np.mean(scores)) if len(scores) else None
    return {"mean": mean} | ({"unscored": table["score"].null_count} if table["score"].null_count else {})


def judge_mean(store: ShardStore, rows: int, shards: int) -> float | None:
    """Mean score over the first `shards` shards, of so many rows, without the answers that have none; None if all have none."""
    records = [store.record(index) for index in range(shards)]
    total = sum(r.facts["mean"] * (r.rows - r.facts.get("unscored", 0)) for r in records if r.facts["mean"] is not None)
    scored = rows - sum(r.facts.get("unscored", 0) for r in records)
    return total / scored if scored else None
