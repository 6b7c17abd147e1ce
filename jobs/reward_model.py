"""Training of a reward model: Bradley-Terry on preference pairs, from any encoder or causal backbone.

    python jobs/reward_model.py --recipe jobs/recipes/reward_model.toml --set data=pairs.jsonl --out runs/harmless

Every other job takes the result, an ordinary sequence classifier with one output, as a reward model.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
import typer
from pydantic import Field

from actors.ending import end_all
from actors.placement import connect, reserve
from actors.recovery import ready
from actors.reward_trainer import RewardTrainer, RewardTrainerConfig
from ctrlrl.data.epochs import Subset
from ctrlrl.data.preferences import PairExamples, longer_wins, share_interval, split_pairs
from ctrlrl.data.rejects import Reject, aside_line, write_rejects
from ctrlrl.data.sources import PreferencePair, read_pairs
from ctrlrl.models.conversations import encode_conversation, longest_input
from ctrlrl.models.exporting import check_export
from ctrlrl.models.loading import check_backbone, load_tokenizer, reads_token_types
from ctrlrl.models.lora import check_adapters
from ctrlrl.models.origins import Origins, record_origins, rows_fingerprint, same_origins
from ctrlrl.models.pooling import conversation_batch
from ctrlrl.objectives.preference import bradley_terry
from ctrlrl.runs import absolute_out
from jobs.parts.launch import Out, Recipe, Resume, Set, SkipBadRows, run_job
from jobs.parts.offline import OfflineRecipe, Task, epochs_of, open_run, scheduled, train_offline
from jobs.parts.reading import renderable


class RewardModelRecipe(OfflineRecipe):
    """Reward-model training. data: preference pairs. max_length: tokens; longer conversations lose their beginning, as in scoring.

    centre: weight of the penalty that keeps scores near 0 (see objectives.preference). skip_bad_rows: set them aside in rejects.jsonl.
    """

    out: str = "runs/reward_model"
    data: str
    max_length: int = Field(1024, gt=1)
    centre: float = Field(0.0, ge=0)
    skip_bad_rows: bool = False
    reward_model: RewardTrainerConfig


def train_reward_model(config: RewardModelRecipe, resume: bool = False) -> int:
    """Train to the end, or until a signal asks to stop; returns the exit code."""
    tokenizer, pairs, rejects, (kept, held), examples = check_inputs(config)
    if rejects:
        print(aside_line(rejects), flush=True)
    train = Subset(examples, kept)
    epochs = epochs_of(config, train)
    with open_run(config, resume, ("data", "reward_model.model")) as run:
        origins = origins_of(config, run.directory, pairs)
        trainer_config = scheduled(config.reward_model, config, epochs.total)
        demands = {"reward_model": config.reward_model.bundles}
        connect(config.cluster, demands)
        place = reserve(demands, config.cluster)
        trainer = RewardTrainer(trainer_config, place, config.cluster, seed=config.seed)
        try:
            ready([trainer], config.cluster)
            loss = partial(bradley_terry, centre=config.centre)
            held_out = [pairs[i] for i in held]
            task = Task(
                "reward-model", train, loss, partial(validate, trainer, examples, held, held_out), partial(export, trainer, tokenizer)
            )
            run.begin()
            record_origins(run.directory, origins)
            write_rejects(run.directory, rejects)
            return train_offline(config, run, trainer, task, epochs)
        finally:
            end_all(trainer.close, place.release)


def check_inputs(
    config: RewardModelRecipe,
) -> tuple[object, list[PreferencePair], list[Reject], tuple[np.ndarray, np.ndarray], PairExamples]:
    """Everything that can be wrong before an actor starts; returns the tokenizer, the pairs, the rows set aside, the numbers of the pairs
    that are trained on and of those that are held out, and the pairs as token ids."""
    check_backbone(config.reward_model.model)
    check_adapters(config.reward_model.model, config.reward_model.train.lora, "reward")
    tokenizer = load_tokenizer(config.reward_model.model)
    check_export(config.reward_model.model, config.out, tokenizer.save_pretrained)
    pairs, rejects = usable_pairs(config)
    split = split_pairs(pairs, config.validation.share, config.validation.rows, config.seed, repr(config.data))
    return tokenizer, pairs, rejects, split, encode_pairs(config, tokenizer, pairs)


def origins_of(config: RewardModelRecipe, directory: Path, pairs: list[PreferencePair], **remedy: str) -> Origins:
    """What a run in `directory` began with; RunError as of same_origins."""
    data = rows_fingerprint([pair.messages, pair.chosen, pair.rejected] for pair in pairs)
    return same_origins(directory, {"reward_model.model": config.reward_model.model}, {"data": data}, **remedy)


def check_reused_reward_model(config: RewardModelRecipe) -> None:
    """RunError if the model that lies in the recipe's `out` was trained on other pairs or from another backbone than lie there now."""
    pairs, _ = usable_pairs(config)
    origins_of(config, absolute_out(config.out), pairs, remedy=f"remove {config.out!r}, and the model is trained anew")


def usable_pairs(config: RewardModelRecipe) -> tuple[list[PreferencePair], list[Reject]]:
    """The pairs that are trained on or held out, and the rows that are set aside."""
    tokenizer, rejects = load_tokenizer(config.reward_model.model), []
    pairs = read_pairs(config.data, rejects=rejects if config.skip_bad_rows else None)
    if config.skip_bad_rows:
        limit = longest_input(config.reward_model.model, tokenizer, config.max_length)
        pairs = renderable(pairs, lambda p: encode_conversation(tokenizer, p.messages, p.chosen, limit, source=p.source), rejects)
    return pairs, rejects


def encode_pairs(config: RewardModelRecipe, tokenizer, pairs: list[PreferencePair]) -> PairExamples:
    """Every pair as two token sequences; the second text (the answer) is what a model with token types is told to judge."""
    model = config.reward_model.model
    limit, typed = longest_input(model, tokenizer, config.max_length), reads_token_types(model)
    encoded = [encode_conversation(tokenizer, p.messages, a, limit, source=p.source) for p in pairs for a in (p.chosen, p.rejected)]
    batch = conversation_batch(encoded, typed)
    return PairExamples(batch.tokens, batch.prompt_lengths)


def validate(trainer: RewardTrainer, examples: PairExamples, rows: np.ndarray, pairs: list[PreferencePair]) -> dict[str, float]:
    """Loss and pair accuracy with its 95 % interval on held-out pairs (a tie counts as half), beside "the longer answer wins"."""
    if not len(rows):
        return {}
    margins = trainer.scores(examples.batch(rows, 0)).reshape(-1, 2) @ np.array([1.0, -1.0])
    hits = float(((1 + np.sign(margins)) / 2).sum())
    low, high = share_interval(hits, len(rows))
    loss = float(-torch.nn.functional.logsigmoid(torch.from_numpy(margins)).mean())
    return {"loss": loss, "accuracy": hits / len(rows), "accuracy_low": low, "accuracy_high": high, "longer_wins": longer_wins(pairs)}


def export(trainer: RewardTrainer, tokenizer, folder: Path) -> None:
    """An ordinary sequence classifier with its tokenizer."""
    trainer.export(folder)
    tokenizer.save_pretrained(folder)


def main(
    recipe: Recipe = "",
    overrides: Set = None,
    out: Out = "",
    resume: Resume = False,
    skip_bad_rows: SkipBadRows = False,
) -> None:
    """Train a reward model on preference pairs."""
    options = {"skip_bad_rows": skip_bad_rows}
    raise typer.Exit(run_job(RewardModelRecipe, train_reward_model, recipe, overrides, out, options, resume=resume))


if __name__ == "__main__":
    typer.run(main)
