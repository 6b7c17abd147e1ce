"""What a directory of ctrlrl generate or ctrlrl critique holds: counts, readable examples; whether every byte is sound; what is missing.

The file is not called inspect.py: `python jobs/….py` puts this folder before the standard library, whose `inspect` it would hide.

python jobs/examine.py runs/generated
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Annotated

import numpy as np
import pyarrow as pa
import typer

from ctrlrl.attributes import Attributes
from ctrlrl.control import cells
from ctrlrl.data.critique import CritiqueLayout
from ctrlrl.data.generation import Layout
from ctrlrl.data.selection import classes
from ctrlrl.data.shards import ShardStore, Verification
from ctrlrl.evaluation.metrics import correlation
from ctrlrl.runs import absolute_out
from jobs.parts.launch import Data, mistakes_told

Examples = Annotated[int, typer.Option(help="How many samples to show.")]
_SHOWN = 300  # characters of a text


@dataclass
class Finding:
    """One store: what its verification says, shards its manifest lists that are gone, and score shards of other samples."""

    name: str
    store: ShardStore
    verified: Verification
    lost: list[int] = field(default_factory=list)
    foreign: list[int] = field(default_factory=list)

    @property
    def damaged(self) -> bool:
        """Whether something that was there is wrong or gone; shards that were never made do not count."""
        return bool(self.lost or self.foreign or self.verified.damaged or self.verified.duplicates)

    @property
    def sound(self) -> set[int]:
        """Shards that can be read."""
        return set(self.store.committed()) - set(self.verified.damaged)

    def lines(self) -> Iterator[str]:
        """The finding in words."""
        v = self.verified
        state = "DAMAGED" if self.damaged else "unfinished" if v.missing else "whole"
        yield f"{self.name:28} {v.shards} of {self.store.planned} shards, {v.rows:,} rows, {state}"
        yield from (f"  damaged: {problem}" for problem in v.damaged.values())
        if self.lost:
            yield f"  gone although the manifest lists them: shards {_some(self.lost)}: run the command that made them again"
        if v.duplicates:
            yield f"  {v.duplicates} samples stand more than once: {'; '.join(v.doubled)}"
        if self.foreign:
            yield f"  scores of other samples than those that are there: shards {_some(self.foreign)}: run the command that made them again"
        if never := sorted(set(v.missing) - {*self.lost, *self.foreign}):
            yield f"  not made yet: shards {_some(never)}: run the command that makes them again"
        if v.strays:
            yield f"  left by an interrupted writer, harmless: {', '.join(v.strays[:5])}"


def inspect_data(data: str, examples: int) -> int:
    """Print everything; returns 1 if something is damaged."""
    if (critiques := CritiqueLayout(absolute_out(data))).begun():
        return inspect_critiques(critiques, examples)
    layout = Layout(absolute_out(data)).existing()
    samples = checked("samples", layout.samples())
    stores = [(name, a) for name, found in layout.score_sets().items() for a in found]
    scores = {(name, a): checked(f"scores/{name}/{a}", layout.scores(name, a)) for name, a in stores}
    for finding in scores.values():
        finding.foreign = [i for i in finding.store.outdated() if i in samples.sound]
    prompts = layout.messages()
    print(f"{layout.directory}: {len(prompts):,} prompts, {'with' if layout.manifest.exists() else 'without'} a manifest")
    for finding in (samples, *scores.values()):
        print("\n".join(finding.lines()))
    for name in layout.score_sets():
        attributes = layout.attributes(name)
        judged = [scores[name, a] for a in attributes.names if (name, a) in scores]
        if len(judged) == len(attributes):
            print("\n".join(class_lines(name, judged, attributes)))
    if scores:
        print("\n".join(spread_lines(scores)))
    print("\n".join(example_lines(samples, scores, prompts, examples)))
    damaged = any(finding.damaged for finding in (samples, *scores.values()))
    print("damaged: see above" if damaged else "every shard that is there is sound")
    return int(damaged)


def inspect_critiques(layout: CritiqueLayout, examples: int) -> int:
    """The same of a directory of ctrlrl critique."""
    finding, prompts = checked("critiques", layout.critiques()), layout.sources.messages()
    print(f"{layout.directory}: {len(prompts):,} prompts, {'with' if layout.sources.manifest.exists() else 'without'} a manifest")
    print("\n".join(finding.lines()))
    columns = ["prompt_id", "index", "y0", "critique", "rewrite", "y1", "aside"]
    rows = [row for shard in sorted(finding.sound) for row in finding.store.read(shard, columns).to_pylist()]
    reasons = Counter(row["aside"] for row in rows)
    print(f"{'pairs':28} {reasons.pop('', 0):,}" + "".join(f"\n  set aside: {reason} {n:,}" for reason, n in reasons.most_common()))
    for row in [rows[i * len(rows) // examples] for i in range(min(examples, len(rows)))]:
        print(f"\n--- prompt {row['prompt_id']}, index {row['index']}" + (f"  set aside: {row['aside']}" if row["aside"] else ""))
        print("\n".join(f"{m['role']}: {_short(m['content'])}" for m in prompts[row["prompt_id"]]))
        said = ("y0", "critique", "rewrite" if row["y1"] is None else "y1")
        print("\n".join(f"{name}: {_short(row[name])}" for name in said if row[name] is not None))
    print("\ndamaged: see above" if finding.damaged else "\nevery shard that is there is sound")
    return int(finding.damaged)


def checked(name: str, store: ShardStore) -> Finding:
    """Verify one store."""
    verified = store.verify()
    return Finding(name, store, verified, sorted((store.listed() & set(verified.missing)) - set(store.outdated())))


def class_lines(name: str, judged: list[Finding], attributes: Attributes) -> Iterator[str]:
    """How many samples of each class the scores of a set make."""
    counts, unscored = np.zeros(len(cells(attributes)), np.int64), 0
    for shard in sorted(set.intersection(*(finding.sound for finding in judged))):
        scores = np.stack([finding.store.read(shard, ["score"])["score"].to_numpy() for finding in judged], axis=1)
        unscored += int(np.isnan(scores).any(1).sum())
        scores = scores[~np.isnan(scores).any(1)]
        counts += np.bincount(classes(scores, attributes), minlength=len(counts))
    yield f"classes by {name}: " + ", ".join(f"{c.name} {n:,}" for c, n in zip(cells(attributes), counts.tolist(), strict=True))
    if unscored:
        yield f"  without a score, set aside: {unscored:,}"


def spread_lines(scores: dict[tuple[str, str], Finding]) -> Iterator[str]:
    """How far the answers to one prompt differ, by each set of scores, and whether two sets see the same differences: what control can
    be learned from, and how much of it others would notice."""
    shards = sorted(set.intersection(*(finding.sound - set(finding.foreign) for finding in scores.values())))
    apart = {}
    for (name, attribute), finding in scores.items() if shards else ():
        table = pa.concat_tables(finding.store.read(shard, ["prompt_id", "score"]) for shard in shards)
        found = table["score"].to_numpy().astype(np.float64)
        within = apart[name, attribute] = from_the_mean(table["prompt_id"].to_pylist(), found)
        if np.isfinite(within).any():
            spread, whole = np.nanstd(within), np.nanstd(found)
            yield f"answers to one prompt differ by {spread:.3f} in {name}.{attribute} (standard deviation; {whole:.3f} over all)"
    for (one, a), (other, b) in combinations(apart, 2):
        both = np.isfinite(apart[one, a]) & np.isfinite(apart[other, b])
        if a == b and both.any():
            agreed = correlation(apart[one, a][both], apart[other, b][both])
            yield f"{one} and {other} agree on these differences in {a} by {agreed:.2f} (Pearson)"


def from_the_mean(prompts: list[str], scores: np.ndarray) -> np.ndarray:
    """Scores less the mean of their prompt's, NaN where there is no score or no other of the prompt. float64 [N]."""
    known = np.isfinite(scores)
    _, place = np.unique(prompts, return_inverse=True)
    count = np.bincount(place, known)
    total = np.bincount(place, np.where(known, scores, 0))
    return np.where(known & (count[place] > 1), scores - total[place] / np.maximum(count[place], 1), np.nan)


def example_lines(samples: Finding, scores: dict, prompts: dict[str, list[dict]], wanted: int) -> Iterator[str]:
    """Samples spread evenly over the shards, with their scores."""
    sound = sorted(samples.sound)
    for number in range(min(wanted, samples.verified.rows)):
        shard = sound[number * len(sound) // wanted]
        table = samples.store.read(shard, ["prompt_id", "unit", "index", "response", "finish_reason"])
        place = (2 * number + 1) * table.num_rows // (2 * wanted)
        row = table.slice(place, 1).to_pylist()[0]
        judged = [
            f"{name}.{a} {'-' if (score := finding.store.read(shard, ['score'])['score'][place].as_py()) is None else format(score, '.2f')}"
            for (name, a), finding in scores.items()
            if shard in finding.sound
        ]
        yield f"\n--- prompt {row['prompt_id']}, unit {row['unit']}, index {row['index']}  {'  '.join(judged)}"
        yield from (f"{m['role']}: {_short(m['content'])}" for m in prompts.get(row["prompt_id"], []))
        yield f"answer: {_short(row['response'])}" + (" (cut at the limit)" if row["finish_reason"] == "length" else "")
    yield ""


def _some(shards: list[int]) -> str:
    return ", ".join(map(str, shards[:8])) + (f" and {len(shards) - 8} more" if len(shards) > 8 else "")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " …"


def main(data: Data, examples: Examples = 5) -> None:
    """Say what a directory of ctrlrl generate or critique holds and verify it; exit code 1 if it is damaged."""
    with mistakes_told():
        raise typer.Exit(inspect_data(data, examples))


if __name__ == "__main__":
    typer.run(main)
