"""What runs cost: time, tokens and where the time went, from the figures that each kind of run keeps."""

from collections.abc import Mapping
from dataclasses import dataclass

from ctrlrl.evaluation.exhibits import Data, Evaluated, Trained


@dataclass(frozen=True)
class Cost:
    """One run's cost; a figure that the run does not keep is None.

    seconds: of its work; of training without starts, checkpoints and looks in between. phases: phase -> share of it, the largest first.
    """

    name: str
    kind: str
    seconds: float | None
    tokens: float | None
    work: str
    phases: Mapping[str, float]

    @property
    def rate(self) -> float | None:
        """Tokens a second."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None


def evaluation_cost(run: Evaluated) -> Cost | None:
    """From cost.json; None where it is absent."""
    if run.cost is None:
        return None
    total = run.cost["start_s"] + run.cost["wall_s"]
    phases = _shares({"starting workers": run.cost["start_s"], "answering and scoring": run.cost["wall_s"]}, total)
    return Cost(run.name, "evaluation", total, run.cost["tokens"], f"{run.cost['answers']:,.0f} answers", phases)


def training_cost(run: Trained) -> Cost | None:
    """From the rows of metrics.jsonl; None where they say nothing of time."""
    timed = [row for row in run.rows if "seconds/step" in row]
    if not timed:
        return None
    total = sum(row["seconds/step"] for row in timed)
    names = {name for row in timed for name in row if name.startswith("seconds/") and name != "seconds/step"}
    phases = _shares({name.removeprefix("seconds/"): sum(row.get(name, 0.0) for row in timed) for name in names}, total)
    if any("data/tokens" in row for row in timed):
        tokens = float(sum(row.get("data/tokens", 0) for row in timed))
    else:
        tokens = sum(row["tokens_per_s/step"] * row["seconds/step"] for row in timed if "tokens_per_s/step" in row) or None
    return Cost(run.name, "training", total, tokens, f"{len(timed):,} steps", phases)


def generation_cost(run: Data) -> Cost:
    """From the manifest of a generation or a self-critique."""
    counts = run.facts["counts"]
    kind, made = ("self-critique", "pairs") if "pairs" in counts else ("generation", "samples")
    return Cost(run.name, kind, run.facts.get("wall_s"), counts.get("tokens"), f"{counts.get(made, 0):,} {made}", {})


def _shares(seconds: Mapping[str, float], total: float) -> dict[str, float]:
    """Shares of `total`, those of at least one per cent, the largest first."""
    shares = {name: s / total for name, s in seconds.items()} if total else {}
    return {name: share for name, share in sorted(shares.items(), key=lambda item: -item[1]) if share >= 0.01}
