"""Fine-tuning on self-generated answers ([SH] section 2.4): from a distilled table to a controllable model.

    python jobs/finetune.py --recipe jobs/recipes/finetune.toml --objective exmate --set data=runs/moec --out runs/exmate

PLM and CLM maximise the likelihood of the answer under its control, ExMATE also lowers it under a fake one.
"""

import math
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import typer
from pydantic import Field

from actors.ending import end_all
from actors.placement import connect, reserve
from actors.policy import Policy, PolicyConfig
from actors.recovery import ready
from ctrlrl.chat import ChatVariables, with_variables
from ctrlrl.data.batches import Loss
from ctrlrl.data.epochs import Subset, hold_out
from ctrlrl.data.rejects import Reject, aside_line, write_rejects
from ctrlrl.data.schemas import attributes_in
from ctrlrl.data.tuning import ControlledExamples, contrast_figures, read_distilled, response_ids, without_bad_rows
from ctrlrl.errors import DataError
from ctrlrl.models.exporting import check_export
from ctrlrl.models.layout import check_layout
from ctrlrl.models.loading import check_policy, load_tokenizer, save_control_tokenizer, within_positions
from ctrlrl.models.lora import check_adapters
from ctrlrl.models.origins import Origins, record_origins, same_origins, table_fingerprint
from ctrlrl.models.vocabulary import final_token_id
from ctrlrl.objectives.exmate import exmate
from ctrlrl.objectives.likelihood import likelihood
from ctrlrl.runs import absolute_out
from jobs.parts.interim import InterimCrew, InterimCrewConfig
from jobs.parts.launch import Out, Recipe, Resume, Set, SkipBadRows, run_job
from jobs.parts.offline import OfflineRecipe, Task, epochs_of, open_run, scheduled, train_offline

_UNREAD = 0.01  # nats a token of `gap`: less, and the controls are not read
_WEAK = 0.3  # of λ e^ℓ


class FinetuneRecipe(OfflineRecipe):
    """Fine-tuning. data: table or directory of ctrlrl distill. fake_weight: λ of ExMATE. max_length: tokens of prompt and response.

    retokenise: make the tokens from the response's text even where the table keeps those of the sampler (of another model).
    """

    out: str = "runs/finetune"
    data: str
    objective: Literal["plm", "clm", "exmate"] = "clm"
    fake_weight: float = Field(1.0, ge=0)
    max_length: int = Field(2048, gt=1)
    skip_long: bool = False
    skip_bad_rows: bool = False
    retokenise: bool = False
    policy: PolicyConfig
    chat: ChatVariables = {}
    evaluation: InterimCrewConfig = InterimCrewConfig()


def finetune(config: FinetuneRecipe, resume: bool = False) -> int:
    """Fine-tune to the end, or until a signal asks to stop; returns the exit code."""
    tokenizer = check_model(config)
    attributes = attributes_in(read_distilled(config.data).schema)
    check_export(config.policy.model, config.out, partial(save_control_tokenizer, tokenizer, attributes=attributes), generates=True)
    rejects: list[Reject] = []
    examples, kept, held_out = read_examples(config, tokenizer, rejects if config.skip_bad_rows else None)
    train = Subset(examples, kept)
    interim = InterimCrew(
        config.evaluation, config.cluster, config.policy.model, config.seed, config.skip_bad_rows, config.chat, attributes
    )
    epochs = epochs_of(config, train)
    with open_run(config, resume, ("data", "policy.model")) as run:
        origins = origins_of(config, run.directory)
        policy_config = scheduled(config.policy, config, epochs.total)
        demands = {"policy": config.policy.bundles}
        connect(config.cluster, demands | config.evaluation.demands)
        place = reserve(demands, config.cluster)
        policy = Policy(policy_config, place, config.cluster, temperature=1.0, seed=config.seed)
        try:
            with interim:
                ready([policy], config.cluster)
                task = Task(
                    config.objective,
                    train,
                    objective(config),
                    partial(validate, policy, examples, held_out, config.fake_weight if config.objective == "exmate" else 0.0),
                    partial(policy.export_controllable, tokenizer, attributes=attributes),
                    partial(interim.metrics, policy=policy),
                )
                run.begin()
                record_origins(run.directory, origins)
                write_rejects(run.directory, [*rejects, *interim.rejects])
                return train_offline(config, run, policy, task, epochs)
        finally:
            end_all(policy.close, place.release)


def check_model(config: FinetuneRecipe) -> object:
    """Whatever can be wrong with the policy before its table is read; returns its tokenizer."""
    check_policy(config.policy.model, trained=True)
    check_adapters(config.policy.model, config.policy.train.lora)
    check_layout(config.policy.model, config.policy.train.layout)
    return with_variables(load_tokenizer(config.policy.model), config.chat)


def origins_of(config: FinetuneRecipe, directory: Path, **remedy: str) -> Origins:
    """What a run in `directory` began with; RunError as of same_origins."""
    data = table_fingerprint(read_distilled(config.data))
    return same_origins(directory, {"policy.model": config.policy.model}, {"data": data}, **remedy)


def check_reused(config: FinetuneRecipe) -> None:
    """RunError if the model that lies in the recipe's `out` was made from another table or base than lie there now."""
    origins_of(config, absolute_out(config.out), remedy=f"remove {config.out!r}, and the model is trained anew")


def objective(config: FinetuneRecipe) -> Loss:
    """The loss; PLM and CLM differ in the tokens that the examples mark as scored."""
    return partial(exmate, weight=config.fake_weight) if config.objective == "exmate" else likelihood


def read_examples(
    config: FinetuneRecipe, tokenizer, rejects: list[Reject] | None = None
) -> tuple[ControlledExamples, np.ndarray, np.ndarray]:
    """All rows of the table, which of them to train on, and which belong to held-out prompts. Bad rows are refused, or go to `rejects`."""
    table, model = read_distilled(config.data), config.policy.model
    if rejects is not None:
        table = without_bad_rows(table, tokenizer, rejects)
    if rejects:
        print(aside_line(rejects), flush=True)
    end = final_token_id(model, tokenizer)
    responses = response_ids(table, tokenizer, end, config.retokenise)
    examples = ControlledExamples(table, responses, tokenizer, config.objective, config.seed)
    limit = within_positions(model, config.max_length)
    fits = np.flatnonzero(examples.row_lengths <= limit)
    long = len(table) - len(fits)
    if long and not (config.skip_long and len(fits)):
        raise DataError(
            f"{long} of {len(table)} rows of {config.data!r} exceed {limit} tokens, the longest has {examples.row_lengths.max()}: "
            "raise max_length as far as the model goes, or set skip_long = true to leave them out"
        )
    ids = table["prompt_id"].take(pa.array(fits)).to_pylist()
    kept, held = hold_out(ids, config.validation.share, config.validation.rows, config.seed, repr(config.data))
    print(f"{len(table):,} rows: {len(kept):,} to train on, {len(held):,} held out, {long:,} too long", flush=True)
    return examples, fits[kept], fits[held]


def validate(policy: Policy, examples: ControlledExamples, rows: np.ndarray, fake_weight: float) -> dict[str, float]:
    """Figures on held-out rows, and a word on ExMATE's λ where it is in the way; none without rows. fake_weight: 0 of other objectives."""
    if not len(rows):
        return {}
    figures = contrast_figures(policy.logprobs(examples.contrasted(rows)), [examples.controls[i] for i in rows])
    if line := weak_push(figures, fake_weight):
        print(line, flush=True)
    return figures


def weak_push(figures: dict[str, float], fake_weight: float) -> str:
    """A message if held-out answers are as likely under fake controls as under their own, and what pushes them apart is weak; else "".

    While controls are not read, ℓ is the same under both, and the two terms of ExMATE pull and push at the same thing, as 1 to λ e^ℓ. Only
    where these are about equal is their difference, the control, what a step learns most of.
    """
    push = fake_weight * math.exp(figures["untreated_l"])
    if not 0 < push < _WEAK or figures["gap"] > _UNREAD:
        return ""
    return (
        f"the controls are not read yet (gap {figures['gap']:.4f}), and ExMATE pushes away from fake ones {push:.2f} times as hard as it "
        f"pulls to the true ones (λ e^ℓ, ℓ = {figures['untreated_l']:.2f}): should it stay so, set fake_weight = {fake_weight / push:.3g}"
    )


def main(
    recipe: Recipe = "",
    objective: Annotated[str, typer.Option(help="plm, clm or exmate.")] = "",
    overrides: Set = None,
    out: Out = "",
    resume: Resume = False,
    skip_bad_rows: SkipBadRows = False,
) -> None:
    """Fine-tune a policy on a distilled table."""
    options = {"objective": objective, "skip_bad_rows": skip_bad_rows}
    raise typer.Exit(run_job(FinetuneRecipe, finetune, recipe, overrides, out, options, resume=resume))


if __name__ == "__main__":
    typer.run(main)
