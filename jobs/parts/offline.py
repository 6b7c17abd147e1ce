"""The loop that all offline jobs share (finetune, dpo, reward_model): batches in a seeded order, one optimiser step each.

The data position is a function of the step, so a resumed run does what an undisturbed one would have done.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from pydantic import Field

from actors.gauges import show
from actors.group import CHANGEABLE, GroupConfig
from actors.placement import ClusterConfig
from actors.recovery import Restartable, Restarts
from ctrlrl.config import Section
from ctrlrl.data.batches import Loss, TokenBatch
from ctrlrl.data.epochs import BatchConfig, Epochs, Examples
from ctrlrl.errors import GroupLost, RecipeError
from ctrlrl.models.origins import known_by_content
from ctrlrl.runs import Run
from jobs.parts.launch import StopRequest, background
from jobs.parts.progress import Clock, Steps

_TRAINER = "trainer"  # of a checkpoint


class ValidationConfig(Section):
    """Held-out prompts: about this share of them, at most so many rows, measured before the first step, every n steps, and at the end."""

    share: float = Field(0.05, ge=0, lt=1)
    rows: int = Field(1000, gt=0)
    every: int = Field(100, gt=0)


class OfflineRecipe(Section):
    """What the offline jobs have in common. steps: end after this many, 0 for whole epochs. warmup_share: of all steps."""

    out: str
    seed: int = 0
    epochs: int = Field(1, gt=0)
    steps: int = Field(0, ge=0)
    batch: BatchConfig = BatchConfig(sequences=64)
    warmup_share: float = Field(0.0, ge=0, lt=1)
    validation: ValidationConfig = ValidationConfig()
    checkpoint_every: int = Field(100, gt=0)
    keep_checkpoints: int = Field(2, gt=0)
    cluster: ClusterConfig = ClusterConfig()


class TrainingHandle(Restartable, Protocol):
    """A group of ranks: Policy or RewardTrainer."""

    def train(self, batch: TokenBatch, loss: Loss, steps: list[np.ndarray]) -> list[dict[str, float]]: ...  # noqa: D102
    def save(self, directory: Path) -> None: ...  # noqa: D102
    def load(self, directory: Path) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class Task:
    """What a job brings to the loop: examples, objective, held-out figures (empty without held-out rows), how to write the model, and
    further figures after so many steps (empty where none are due)."""

    title: str
    examples: Examples
    loss: Loss
    validate: Callable[[], dict[str, float]]
    export: Callable[[Path], None]
    look: Callable[[int], dict[str, float]] = lambda steps: {}


def epochs_of(config: OfflineRecipe, examples: Examples) -> Epochs:
    """The run's steps."""
    return Epochs(examples.lengths, config.batch, epochs=config.epochs, seed=config.seed, steps=config.steps)


def scheduled(trained: GroupConfig, config: OfflineRecipe, steps: int) -> GroupConfig:
    """`trained` with the run's number of steps and its warm-up in the schedule, where the recipe leaves them open."""
    if trained.train.warmup_steps and config.warmup_share:
        raise RecipeError("train.warmup_steps and warmup_share both ask for a warm-up: give one of them")
    return trained.scheduled(steps, round(config.warmup_share * steps))


def open_run(config: OfflineRecipe, resume: bool, sources: tuple[str, ...]) -> Run:
    """The run directory of an offline job. sources: recipe keys of what its origins know by content."""
    groups = (f"{group}.{key}" for group in ("policy", "reward_model") for key in CHANGEABLE)
    free = ("cluster", "checkpoint_every", "keep_checkpoints", "evaluation", "skip_bad_rows", *groups)
    free += known_by_content(config.out, *sources)
    return Run.open(config.out, config, resume=resume, keep=config.keep_checkpoints, free=free)


def train_offline(config: OfflineRecipe, run: Run, trainer: TrainingHandle, task: Task, epochs: Epochs) -> int:
    """Train to the end, or until a signal asks to stop; returns the exit code. `run` has begun, and the caller closes it.

    A metrics row holds `train/…` of its step, and `validation/…` as measured before that step; the last row has only the latter. A
    lost group of ranks goes back to the last checkpoint.
    """
    restarts = Restarts(config.cluster)
    with StopRequest() as stop, Steps(task.title, epochs.total) as progress:
        while True:
            try:
                _steps_from_checkpoint(config, run, trainer, task, epochs, progress, stop)
                return stop.exit_code if stop else _finish(run, task, epochs)
            except GroupLost as error:
                restarts.after(error, progress.done, [trainer])


def _steps_from_checkpoint(
    config: OfflineRecipe, run: Run, trainer: TrainingHandle, task: Task, epochs: Epochs, progress: Steps, stop: StopRequest
) -> None:
    """The steps that the last checkpoint leaves to do, unless a signal asks to stop."""
    done = _restore(run, trainer)
    progress.begin_at(done)
    with background(1) as ahead:
        coming = ahead.submit(_prepare, task, epochs, done)
        for step in range(done, epochs.total):
            clock, figures = Clock(), {}
            if step % config.validation.every == 0:
                clock.start("validate")
                figures = _named("validation", task.validate())
            clock.start("data")  # what is left of it: a batch is made while the one before is trained on
            epoch, batch = coming.result()
            coming = ahead.submit(_prepare, task, epochs, step + 1)
            clock.start("train")
            stats = trainer.train(batch, task.loss, [np.arange(len(batch))])[0]
            clock.stop()
            tokens = sum(map(len, batch.tokens))
            figures |= _named("train", stats) | clock.seconds() | {"data/epoch": epoch, "data/sequences": len(batch), "data/tokens": tokens}
            figures |= task.look(step + 1)
            run.log(step, figures)
            show(figures)
            progress.advance(_headline(figures))
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == epochs.total or stop:
                run.checkpoint(step + 1, lambda folder: trainer.save(folder / _TRAINER))
            if stop:
                return


def _finish(run: Run, task: Task, epochs: Epochs) -> int:
    """The held-out figures of the trained model, and the model itself."""
    final = task.validate()
    run.log(epochs.total, _named("validation", final))
    run.whole_directory("model", task.export)
    print("\n".join([*held_out_lines(final), str(run.directory / "model")]), flush=True)
    return 0


def held_out_lines(figures: dict[str, float]) -> list[str]:
    """Held-out figures as a table: a row for each group (`loss/group`; over all rows: `loss`), a column for each figure."""
    columns = list(dict.fromkeys(name.partition("/")[0] for name in figures))
    groups = list(dict.fromkeys(name.partition("/")[2] for name in figures))
    width = max(map(len, [*groups, "held-out rows"])) + 2
    lines = [f"{'held-out rows':{width}}" + "".join(f"{name:>16}" for name in columns)] if figures else []
    for group in groups:
        values = [figures.get(f"{name}/{group}" if group else name) for name in columns]
        lines.append(f"{group or 'all':{width}}" + "".join(f"{'' if v is None else format(v, '.4f'):>16}" for v in values))
    return lines


def _restore(run: Run, trainer: TrainingHandle) -> int:
    last = run.latest()
    if last is None:
        return 0
    trainer.load(last[1] / _TRAINER)
    return last[0]


def _prepare(task: Task, epochs: Epochs, step: int) -> tuple[int, TokenBatch] | None:
    if step >= epochs.total:
        return None
    epoch, rows = epochs.at(step)
    return epoch, task.examples.batch(rows, epoch)


def _named(part: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{part}/{name}": value for name, value in values.items()}


def _headline(figures: dict[str, float]) -> str:
    shown = {"loss": "train/loss", "accuracy": "train/accuracy", "gap": "train/gap", "held-out loss": "validation/loss"}
    parts = [f"{name} {figures[key]:.4f}" for name, key in shown.items() if key in figures]
    return "  ".join([*parts, f"{figures['data/tokens'] / figures['seconds/train']:,.0f} tokens/s"])
