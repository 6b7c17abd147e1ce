"""What scored answers are good for, before anything is made of them: how many prompts a distillation would keep, whether answers end."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ctrlrl.attributes import PAPER, Attributes
from ctrlrl.control import cells
from ctrlrl.data.calibration import Calibration, WithinPrompts, fit_to_store, fit_within_prompts
from ctrlrl.data.distill import calibrated_by
from ctrlrl.data.keys import row_keys
from ctrlrl.data.selection import HIGH_START, LOW_END, classes, extremes
from ctrlrl.data.shards import ShardStore

_ENOUGH = 0.05  # answers that may be cut


@dataclass(frozen=True)
class Outlook:
    """Of all prompts how many MOEC keeps; which of the classes (in the order of control.cells) any sample is in. unscored: samples that
    lack a score, and are left out."""

    prompts: int
    moec: int
    classes: tuple[bool, ...]
    unscored: int = 0


def outlook(
    stores: Mapping[str, ShardStore], maps: Mapping[str, Calibration | WithinPrompts] | None = None, attributes: Attributes = PAPER
) -> Outlook:
    """What the finished score stores, by attribute, promise; with `maps`, if their raw outputs were calibrated by these."""
    seen, pairs, there = np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(len(cells(attributes)), bool)
    low = np.uint64((1 << (len(there) - 1).bit_length()) - 1)
    column, unscored, start = "raw" if maps else "score", 0, 0
    for record in stores[attributes.names[0]].manifest()["shards"]:
        tables = [stores[a].read(record["index"], ["prompt_id", column]) for a in attributes.names]
        scores = np.stack([t[column].to_numpy() for t in tables], 1)
        if maps:
            scores = np.stack([maps[a].at(start, scores[:, i]) for i, a in enumerate(attributes.names)], 1)
        start += len(scores)
        whole = ~np.isnan(scores).any(1)
        scores, unscored = scores[whole], unscored + int((~whole).sum())
        prompt, of = row_keys(tables[0]["prompt_id"].filter(pa.array(whole))), classes(scores, attributes)
        extreme = extremes(scores, attributes)
        there |= np.bincount(of, minlength=len(there)) > 0
        seen = np.union1d(seen, prompt)
        # A key of 64 bits gives some up for the class; if it is two, two of three million prompts fall together once in 10^6 times.
        pairs = np.union1d(pairs, (prompt[extreme] & ~low) | of[extreme].astype(np.uint64))
    _, corners = np.unique(pairs & ~low, return_counts=True)
    return Outlook(len(seen), int((corners >= 2).sum()), tuple(there.tolist()), unscored)


def outlook_lines(stores: Mapping[str, ShardStore], attributes: Attributes = PAPER) -> list[str]:
    """How many prompts would survive each distillation, as the scores are and calibrated, by quantiles and within prompts."""
    found = outlook(stores, attributes=attributes)
    lines = [
        f"  would be kept: vanilla all {found.prompts:,} prompts; oversampling {sum(found.classes)} of {len(found.classes)} classes; moec "
        f"{found.moec:,} prompts ({found.moec / max(found.prompts, 1):.0%})"
    ]
    lines += [f"  {found.unscored:,} samples without all their scores would be left out"] if found.unscored else []
    most = found.moec
    for kind, fit in {"quantile": fit_to_store, "prompt": fit_within_prompts}.items():
        maps = {a: fitted for a in attributes.names if (fitted := fit(stores[a])) is not None}
        if len(maps) == len(attributes) and (spread := outlook(stores, maps, attributes)).moec > most:
            most = spread.moec
            share = most / max(spread.prompts, 1)
            lines.append(f"  with ctrlrl distill --calibrate {kind}: moec {most:,} prompts ({share:.0%})")
    return lines


def few_kept(report: dict) -> str:
    """Why a distillation kept so little, and what mends it, from its report."""
    marginals = report.get("marginals") or {a: np.array(report["histogram"]).sum(1 - axis) for axis, a in enumerate(PAPER.names)}
    ranges = []
    for attribute, counts in marginals.items():
        bins = np.flatnonzero(counts) / len(counts)
        low, high = bins[0], bins[-1] + 1 / len(counts)
        none = " (none is extreme)" if low >= LOW_END and high <= HIGH_START else ""
        ranges.append(f"{attribute} from {low:.2f} to {high:.2f}{none}")
    rows, prompts = report["rows"], report["prompts"]
    spread = {
        "": "Add --calibrate quantile, which spreads the stored outputs of the reward models over [0, 1], or --calibrate prompt, which "
        "does so among the answers to each prompt (no model runs again); or draw",
        "quantile": "Take --calibrate prompt, which goes by an answer's place among those to its prompt; or draw",
        "prompt": "Draw",
    }[calibrated_by(report)]
    return (
        f"{report['method']} keeps {rows['after']:,} of {rows['before']:,} samples, of {prompts['after']:,} of {prompts['before']:,} "
        f"prompts: it needs prompts with answers in at least two corners of scores up to {LOW_END:g} and from {HIGH_START:g}, and the "
        f"scores are {', '.join(ranges)}. {spread} more answers a prompt (ctrlrl generate --scale); or use --method oversampling"
    )


def cut_line(samples: int, truncated: int, tokens: int, limit: int) -> str | None:
    """A warning that many answers were cut, with the length at which 95 % would end if they went on ending at the same rate; else None."""
    share = truncated / max(samples, 1)
    if share <= _ENOUGH:
        return None
    ends = samples - truncated
    needed = f"about {math.ceil(limit + math.log(share / _ENOUGH) * tokens / ends):,} would let 95 % end" if ends else "none came to an end"
    return f"  {share:.0%} of the answers are cut at sampling.max_new_tokens = {limit} ({needed}), and are scored and trained on so"
