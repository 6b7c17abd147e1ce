"""Configurable safety tuning ([CST]): direct preference optimisation under opposite system prompts, with further tasks mixed in.

    python jobs/dpo.py --recipe jobs/recipes/dpo.toml --set critiques=runs/critique --out runs/cst

The reference's logprobs are computed once and stored in the run directory; then its workers end, and the policy's ranks train.
"""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import typer
from pydantic import Field, model_validator

from actors.ending import end_all
from actors.placement import connect, reserve
from actors.policy import Policy, PolicyConfig
from actors.recovery import ready
from actors.reference import Reference, ReferenceConfig
from ctrlrl.chat import ChatVariables, with_variables
from ctrlrl.config import Section
from ctrlrl.data.batches import TokenBatch
from ctrlrl.data.critique import CritiqueLayout
from ctrlrl.data.dpo import (
    Mixture,
    PreferenceTask,
    batch_fingerprint,
    encode,
    mix,
    opposite_pairs,
    plain_pairs,
    preference_figures,
    read_reference,
    summed,
    without_long,
    write_reference,
)
from ctrlrl.data.epochs import Subset
from ctrlrl.data.files import expanded
from ctrlrl.data.preferences import PairExamples
from ctrlrl.data.rejects import Reject, aside_line, write_rejects
from ctrlrl.data.sources import read_pairs
from ctrlrl.errors import DataError
from ctrlrl.models.exporting import check_export
from ctrlrl.models.fingerprint import model_fingerprint
from ctrlrl.models.layout import check_layout
from ctrlrl.models.loading import check_causal, check_policy, load_tokenizer, save_control_tokenizer, within_positions
from ctrlrl.models.lora import check_adapters
from ctrlrl.models.origins import Origins, record_origins, same_origins
from ctrlrl.models.vocabulary import check_same_vocabulary, final_token_id
from ctrlrl.objectives.preference import dpo as dpo_loss
from ctrlrl.prompts import render
from ctrlrl.runs import Run, absolute_out, output_directory
from jobs.parts.launch import Out, Recipe, Resume, Set, SkipBadRows, run_job
from jobs.parts.offline import OfflineRecipe, Task, epochs_of, open_run, scheduled, train_offline
from jobs.parts.progress import Steps
from jobs.parts.reading import renderable

_REFERENCE = "reference.parquet"  # of a run directory
_CHUNK = 512  # pairs that the reference scores between two lines of progress


class TaskConfig(Section):
    """A further task: rows (system, prompt, chosen, rejected) of a file, directory or hub data set. weight: uses of a row an epoch."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    data: str
    weight: float = Field(1.0, gt=0)


class DPORecipe(OfflineRecipe):
    """Preference tuning. critiques: a directory of ctrlrl critique. max_length: tokens of prompt and answer.
    nll_weight: of the better answer's negative log-likelihood (objectives/preference.py); 0 is DPO.

    method: "cst" makes two rows of each critique under opposite system prompts; "plain", the paper's baseline, takes the rewrite as the
    better answer without a system prompt.
    """

    out: str = "runs/dpo"
    critiques: str = ""
    method: Literal["cst", "plain"] = "cst"
    tasks: tuple[TaskConfig, ...] = ()
    beta: float = Field(0.1, gt=0)
    nll_weight: float = Field(0.0, ge=0)
    max_length: int = Field(2048, gt=1)
    skip_long: bool = False
    skip_bad_rows: bool = False
    policy: PolicyConfig
    chat: ChatVariables = {}
    reference: ReferenceConfig = ReferenceConfig()

    @model_validator(mode="after")
    def _has_data(self):
        names = [task.name for task in self.tasks]
        if not self.critiques and (not names or self.method == "plain"):
            raise ValueError("nothing to train on: give critiques, a directory of ctrlrl critique" + (", or tasks" if not names else ""))
        if twice := [name for name, n in Counter([*names, "s1", "s0", "plain"]).items() if n > 1]:
            raise ValueError(f"the task name {twice[0]!r} is taken: give every task a name of its own, other than s1, s0, plain")
        return self

    @property
    def reference_model(self) -> str:
        """The reference's weights: the policy's own starting point unless another is named."""
        return self.reference.model or self.policy.model


def dpo(config: DPORecipe, resume: bool = False) -> int:
    """Train to the end, or until a signal asks to stop; returns the exit code."""
    absolute_out(config.out)  # refused now rather than after reading
    tokenizer = check_models(config)
    rejects: list[Reject] = []
    mixture, batch = read_data(config, tokenizer, rejects if config.skip_bad_rows else None)
    with open_run(config, resume, sources(config)) as run:
        origins = origins_of(config, run.directory, batch)
        connect(config.cluster, demands_of(config))
        reference = reference_logprobs(config, run, batch)
        examples = PairExamples(batch.tokens, batch.prompt_lengths, {"ref_logprob": reference.reshape(-1).astype(np.float32)})
        train = Subset(examples, mixture.train)
        epochs = epochs_of(config, train)
        place = reserve({"policy": config.policy.bundles}, config.cluster)
        policy = Policy(scheduled(config.policy, config, epochs.total), place, config.cluster, temperature=1.0, seed=config.seed)
        try:
            ready([policy], config.cluster)
            held_out = partial(validate, policy, examples, reference, mixture, config.beta)
            loss = partial(dpo_loss, beta=config.beta, nll_weight=config.nll_weight)
            task = Task("dpo", train, loss, held_out, partial(policy.export_controllable, tokenizer))
            run.begin()
            record_origins(run.directory, origins)
            write_rejects(run.directory, rejects)
            return train_offline(config, run, policy, task, epochs)
        finally:
            end_all(policy.close, place.release)


def check_models(config: DPORecipe) -> object:
    """Whatever can be wrong with the models before an actor starts; returns the policy's tokenizer."""
    check_policy(config.policy.model, trained=True)
    check_adapters(config.policy.model, config.policy.train.lora)
    check_layout(config.policy.model, config.policy.train.layout)
    check_causal(config.reference_model, "reference")
    check_layout(config.reference_model, config.reference.layout)
    check_same_vocabulary(config.policy.model, config.reference_model, "reference")
    tokenizer = with_variables(load_tokenizer(config.policy.model), config.chat)
    check_export(config.policy.model, config.out, partial(save_control_tokenizer, tokenizer), generates=True)
    return tokenizer


def origins_of(config: DPORecipe, directory: Path, batch: TokenBatch, **remedy: str) -> Origins:
    """What a run in `directory` began with; RunError as of same_origins."""
    return same_origins(directory, {"policy.model": config.policy.model}, {"pairs": batch_fingerprint(batch)}, **remedy)


def check_reused_dpo(config: DPORecipe) -> None:
    """RunError if the model that lies in the recipe's `out` was made from other pairs or another base than lie there now."""
    tokenizer = with_variables(load_tokenizer(config.policy.model), config.chat)
    _, batch = read_data(config, tokenizer, [] if config.skip_bad_rows else None)
    origins_of(config, absolute_out(config.out), batch, remedy=f"remove {config.out!r}, and the model is trained anew")


def sources(config: DPORecipe) -> tuple[str, ...]:
    """The recipe keys of what a run knows by content; the reference's weights by its stored logprobs."""
    stored = (absolute_out(config.out) / _REFERENCE).exists()
    return ("critiques", *(f"tasks.{i}.data" for i in range(len(config.tasks))), "policy.model", *["reference.model"] * stored)


def read_data(config: DPORecipe, tokenizer, rejects: list[Reject] | None = None) -> tuple[Mixture, TokenBatch]:
    """All pairs, split by prompt and mixed by weight; and their sequences. Bad rows are refused, or go to the list `rejects`."""
    tasks, model = [], config.policy.model
    if config.critiques:
        table = CritiqueLayout(expanded(config.critiques).absolute()).read_pairs()
        tasks.append(opposite_pairs(table) if config.method == "cst" else plain_pairs(table))
    for task in config.tasks:
        pairs = read_pairs(task.data, rejects=rejects)
        if rejects is not None:
            pairs = renderable(pairs, lambda p: render(tokenizer, p.messages, source=p.source), rejects)
        tasks.append(PreferenceTask(tuple(pairs), (task.name,) * len(pairs), task.weight))
    if rejects:
        print(aside_line(rejects), flush=True)
    end = final_token_id(model, tokenizer)
    limit = within_positions(model, config.max_length)
    tasks, batch, long = without_long(tasks, encode([pair for task in tasks for pair in task.pairs], tokenizer, end), limit)
    if long and not (config.skip_long and all(task.pairs for task in tasks)):
        raise DataError(
            f"{long} preference pairs exceed {limit} tokens with their prompt: raise max_length as far as the model goes, or set "
            "skip_long = true to leave them out (every task must keep some)"
        )
    mixture = mix(tasks, config.validation.share, config.validation.rows, config.seed)
    counts = Counter(mixture.labels[i] for i in mixture.train)
    listed = ", ".join(f"{name} {n:,}" for name, n in counts.items())
    print(f"{len(mixture.train):,} pairs an epoch ({listed}); {len(mixture.held_out):,} held out, {long:,} too long", flush=True)
    return mixture, batch


def demands_of(config: DPORecipe) -> dict[str, list[dict[str, float]]]:
    """Room for either kind of workers: the reference's have ended when the policy's start."""
    reference = [config.reference.resources.bundle] * config.reference.workers
    return {"reference": reference, "policy": config.policy.bundles}


def reference_logprobs(config: DPORecipe, run: Run, batch: TokenBatch) -> np.ndarray:
    """Summed logprobs under the reference, float64 [pairs, 2]: those stored in the run directory, or computed now and stored there."""
    path = run.directory / _REFERENCE
    fingerprint = {
        "model": model_fingerprint(config.reference_model),
        "dtype": config.reference.dtype,
        "sequences": batch_fingerprint(batch),
    }
    stored = read_reference(path, fingerprint, resumed=(run.directory / "recipe.json").exists())
    if stored is not None:
        return stored
    place = reserve({"reference": demands_of(config)["reference"]}, config.cluster)
    reference = Reference(config.reference, place, config.cluster, model=config.reference_model, temperature=1.0)
    try:
        reference.wait_ready()
        parts = [np.arange(i, min(i + 2 * _CHUNK, len(batch))) for i in range(0, len(batch), 2 * _CHUNK)]
        scored = []
        with Steps("reference", len(parts)) as progress:
            for part in parts:
                scored.append(summed(reference.logprobs(batch.select(part))))
                progress.advance(f"{sum(map(len, scored)):,} pairs")
    finally:
        end_all(reference.close, place.release)
    output_directory(config.out)
    write_reference(path, np.concatenate(scored), fingerprint)
    return np.concatenate(scored)


def validate(policy: Policy, examples: PairExamples, reference: np.ndarray, mixture: Mixture, beta: float) -> dict[str, float]:
    """Figures on the pairs of held-out prompts; none without pairs."""
    rows = mixture.held_out
    if not len(rows):
        return {}
    logprobs = summed(policy.logprobs(examples.batch(rows, 0)))
    return preference_figures(logprobs, reference[rows], [mixture.labels[i] for i in rows], beta)


def main(
    recipe: Recipe = "",
    overrides: Set = None,
    out: Out = "",
    resume: Resume = False,
    skip_bad_rows: SkipBadRows = False,
) -> None:
    """Tune a policy on preferences under opposite system prompts."""
    raise typer.Exit(run_job(DPORecipe, dpo, recipe, overrides, out, {"skip_bad_rows": skip_bad_rows}, resume=resume))


if __name__ == "__main__":
    typer.run(main)
