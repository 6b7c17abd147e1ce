"""What the steps of a study will cost: answers, tokens and hours at speeds that are measured on this machine before anything else runs."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from actors.crew import start_crew
from actors.ending import end_all
from actors.group import GroupConfig
from actors.placement import ClusterConfig, reserve
from actors.policy import Policy
from actors.recovery import ready
from actors.reward_trainer import RewardTrainer
from ctrlrl.attributes import Attributes
from ctrlrl.config import Section
from ctrlrl.data.batches import Loss, TokenBatch
from ctrlrl.data.distill import TABLE
from ctrlrl.data.selection import extremes
from ctrlrl.data.sources import read_prompts
from ctrlrl.evaluation.grid import controls_of
from ctrlrl.models.loading import load_tokenizer
from ctrlrl.models.sampler import Request, prompt_room
from ctrlrl.objectives.likelihood import likelihood
from ctrlrl.objectives.preference import bradley_terry
from ctrlrl.prompts import render
from jobs.critique import CritiqueRecipe
from jobs.distill import DistillRecipe
from jobs.dpo import DPORecipe
from jobs.evaluate import EvaluateRecipe
from jobs.finetune import FinetuneRecipe
from jobs.generate import GenerateRecipe
from jobs.ppo import PPORecipe
from jobs.reward_model import RewardModelRecipe, encode_pairs, usable_pairs

_ROWS = 8  # that a speed is measured on, twice; the first time engines warm up
_FORWARD = 1 / 3  # of a training pass


@dataclass(frozen=True)
class Work:
    """What a step does at most. drawn: answers; trained: answers that pass through training (a forward alone is a third of one);
    texts: conversations that a reward model is trained on; steps: of the optimiser."""

    drawn: int = 0
    trained: float = 0
    texts: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Rates:
    """Measured. drawn, trained: answers/s; tokens: of an answer, in the mean; texts: conversations/s of each backbone, by its name."""

    drawn: float
    trained: float
    tokens: float
    texts: Mapping[str, float]


def work_of(config: Section, pairs: int = 0, generated: int = 0) -> Work:
    """What a step does at most. pairs: that a reward model is trained on. generated: answers that finetune or dpo can learn from."""
    match config:
        case GenerateRecipe():
            return Work(drawn=_prompts(config) * config.samples_per_prompt * config.units)
        case CritiqueRecipe():
            return Work(drawn=3 * _prompts(config) * config.samples_per_prompt)  # the answer, the critique, the rewrite
        case EvaluateRecipe(method=method):
            controls = 2 if method == "system" else len(controls_of(config.levels, config.attributes))
            draws = {"prompting": len(config.templates), "reranking": config.samples}.get(method, 1)
            return Work(drawn=_prompts(config) * controls * draws)
        case PPORecipe(algorithm=algorithm):
            answers = config.steps * algorithm.queries_per_step * algorithm.samples_per_query
            models = 2 if algorithm.advantage == "gae" and not config.value.head else 1
            passes = models * algorithm.epochs + _FORWARD * (models + 1)  # and the forwards: old logprobs, values, the reference
            return Work(drawn=answers, trained=answers * passes, steps=config.steps * algorithm.epochs * algorithm.minibatches)
        case RewardModelRecipe():
            return Work(texts=2 * pairs * config.epochs, steps=_steps(config, pairs))
        case FinetuneRecipe():
            rows = config.steps * config.batch.sequences if config.steps else generated * config.epochs
            return Work(trained=rows * (2 if config.objective == "exmate" else 1), steps=_steps(config, generated))
        case DPORecipe():
            found = generated * (2 if config.method == "cst" else 1)
            return Work(trained=2 * found * (config.epochs + _FORWARD), steps=_steps(config, found))
    return Work()


def hours_of(work: Work, rates: Rates, backbone: str = "") -> float:
    """At these speeds; reward models that judge are not counted."""
    seconds = work.drawn / rates.drawn + work.trained / rates.trained + (work.texts / rates.texts[backbone] if work.texts else 0)
    return seconds / 3600


def cost_lines(steps: Mapping[str, tuple[Section, bool]], rates: Rates) -> list[str]:
    """A line a step, by its folder, and the sum of those that are not finished."""
    lines = [
        f"measured here: {rates.drawn * rates.tokens:,.0f} tokens/s drawn ({rates.tokens:.0f} an answer)"
        + (f", {rates.trained:.2f} answers/s trained" if rates.trained < float("inf") else "")
        + "".join(f", {rate:.1f} texts/s by {name}" for name, rate in rates.texts.items()),
        f"{'step':36}{'answers':>10}{'tokens':>12}{'steps':>8}{'hours':>8}",
    ]
    made: dict[str, int] = {}  # what later steps can learn from, by the folder that it lies in
    drawn = {config.out: config for config, _ in steps.values() if isinstance(config, GenerateRecipe)}
    total = 0.0
    for folder, (config, finished) in steps.items():
        pairs = len(usable_pairs(config)[0]) if isinstance(config, RewardModelRecipe) else 0
        source = {FinetuneRecipe: "data", DPORecipe: "critiques", DistillRecipe: "data"}.get(type(config))
        generated = made.get(getattr(config, source), 0) if source else 0
        work = work_of(config, pairs, generated)
        turns = 3 if isinstance(config, CritiqueRecipe) else 1
        made[config.out] = (
            _kept(config, finished, generated, drawn.get(config.data)) if isinstance(config, DistillRecipe) else work.drawn // turns
        )
        hours = hours_of(work, rates, config.reward_model.model if pairs else "")
        total += 0 if finished else hours
        figures = f"{work.drawn:>10,}{work.drawn * rates.tokens:>12,.0f}{work.steps:>8,}{hours:>8.2f}"
        lines.append(f"{folder:36}{figures}{'  there already' if finished else ''}")
    kept = "MOEC is reckoned to keep of calibrated scores what it does of independent ones, other tables as large as they can be"
    return [*lines, f"{total:.1f} hours to come: {kept}; judging and starting workers are not counted"]


def measured_rates(configs: Sequence[Section], cluster: ClusterConfig) -> Rates:
    """Draw, train and compare a few answers to the study's own prompts, by the workers of its first steps of each kind."""
    drawing = next(config for config in configs if isinstance(config, GenerateRecipe | EvaluateRecipe))
    policy = drawing.policy if isinstance(drawing, GenerateRecipe) else drawing.model
    print("measuring this machine's speed: drawing", flush=True)
    prompts, answers, seconds = _drawn(drawing, policy, cluster)
    tokens = float(np.mean([len(ids) for ids in answers]))
    trained = next((config for config in configs if isinstance(config, FinetuneRecipe | PPORecipe | DPORecipe)), None)
    texts = {}
    for config in configs:
        if isinstance(config, RewardModelRecipe) and config.reward_model.model not in texts:
            print(f"measuring this machine's speed: training {config.reward_model.model}", flush=True)
            texts[config.reward_model.model] = _compared(config, cluster)
    learned = float("inf")
    if trained is not None:
        print("measuring this machine's speed: training the policy", flush=True)
        sequences = [np.concatenate(pair) for pair in zip(prompts, answers, strict=True)]
        batch = TokenBatch(sequences, np.array([len(ids) for ids in prompts]), {}, {})
        group = trained.policy.scheduled(2, 0)
        start = partial(Policy, group.model_copy(update={"model": policy}), cluster=cluster, temperature=1.0, seed=0)
        learned = len(batch) / _step_s("policy", group, start, batch, likelihood, cluster)
    return Rates(len(answers) / seconds, learned, tokens, texts)


def _drawn(config: GenerateRecipe | EvaluateRecipe, policy: str, cluster: ClusterConfig) -> tuple[list, list, float]:
    """Prompts and answers as token ids, and the seconds of the second time that they were drawn."""
    tokenizer, room = load_tokenizer(policy), prompt_room(policy, config.rollout.engine, config.sampling)
    rendered = [render(tokenizer, prompt.messages) for prompt in read_prompts(config.prompts, limit=config.max_prompts, skip_bad_rows=True)]
    fitting = [ids for ids in rendered if len(ids) <= room][: max(_ROWS, config.rollout.chunk * config.rollout.workers.min)]
    with start_crew(cluster, {}, config.rollout, policy) as crew:
        crew.wait_ready()
        for _ in range(2):
            began, answers = time.perf_counter(), {}
            for rows, completions in crew.rollout.generate([Request(tuple(ids), i) for i, ids in enumerate(fitting)], config.sampling):
                answers.update(zip(rows.tolist(), completions.response_ids, strict=True))
            seconds = time.perf_counter() - began
    return [np.array(ids) for ids in fitting], [np.array(answers[i]) for i in range(len(fitting))], seconds


def _compared(config: RewardModelRecipe, cluster: ClusterConfig) -> float:
    """Texts/s that a reward model is trained on."""
    pairs = usable_pairs(config)[0][: _ROWS // 2]
    batch = encode_pairs(config, load_tokenizer(config.reward_model.model), pairs).batch(np.arange(len(pairs)), 0)
    group = config.reward_model.scheduled(2, 0)
    start = partial(RewardTrainer, group, cluster=cluster, seed=0)
    return len(batch) / _step_s("reward_model", group, start, batch, bradley_terry, cluster)


def _step_s(name: str, group: GroupConfig, start: Callable, batch: TokenBatch, loss: Loss, cluster: ClusterConfig) -> float:
    """Seconds of the second of two optimiser steps on all of `batch`, by the ranks that `start` starts in a place of their own."""
    place = reserve({name: group.bundles}, cluster)
    trainer = start(placement=place)
    try:
        ready([trainer], cluster)
        for _ in range(2):
            began = time.perf_counter()
            trainer.train(batch, loss, [np.arange(len(batch))])
            seconds = time.perf_counter() - began
        return seconds
    finally:
        end_all(trainer.close, place.release)


def _prompts(config: GenerateRecipe | CritiqueRecipe | EvaluateRecipe) -> int:
    return len(list(read_prompts(config.prompts, limit=config.max_prompts, skip_bad_rows=True)))


def _kept(config: DistillRecipe, finished: bool, generated: int, source: GenerateRecipe | None) -> int:
    """Rows of a distillation's table; where it is not made yet, as many as there can be, or, of MOEC on calibrated scores, which are
    spread evenly, as many as are extreme in all attributes if these are independent."""
    if finished:
        return pq.read_metadata(Path(config.out) / TABLE).num_rows
    if config.method != "moec" or source is None or not generated:
        return generated
    answers = source.samples_per_prompt * source.units  # to a prompt
    corners = 2 ** len(source.attributes)
    extreme = 1.0
    if config.calibrate:
        places = np.linspace(0, 1, answers if config.calibrate == "prompt" else generated)[:, None]
        extreme = np.prod([extremes(places, Attributes((attribute,))).mean() for attribute in source.attributes])
    return round(min(generated * extreme, generated / answers * corners * config.per_cell))


def _steps(config: FinetuneRecipe | DPORecipe | RewardModelRecipe, rows: int) -> int:
    """Optimiser steps, at most; batches of tokens are not counted."""
    batch = config.batch.sequences
    return config.steps or (config.epochs * -(-rows // batch) if batch else 0)
