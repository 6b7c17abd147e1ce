"""What the steps of a study would be refused for, found before the first of them begins.

Each job's own checks are made, of every step; in the place of a model that an earlier step will make stands the one that it will be made
from, which has its tokenizer, template and architecture. What only a table or a trained model will show is left to the step itself.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ctrlrl.config import Section, dump
from ctrlrl.data.sources import Prompt
from ctrlrl.models.exporting import check_attributes
from ctrlrl.models.loading import check_policy
from jobs import critique, dpo, evaluate, finetune, generate, reward_model
from jobs.critique import CritiqueRecipe
from jobs.dpo import DPORecipe
from jobs.evaluate import EvaluateRecipe
from jobs.finetune import FinetuneRecipe
from jobs.generate import GenerateRecipe
from jobs.parts.cast import check_asked
from jobs.parts.variants import Step
from jobs.ppo import PPORecipe
from jobs.reward_model import RewardModelRecipe

_log = logging.getLogger("ctrlrl")


def check_steps(steps: Sequence[Step]) -> list[Section]:
    """Raise whatever a step would raise about its models, prompts, pairs and settings; returns their recipes as they were looked at,
    `grounded`. steps: in the order in which they are done."""
    configs = grounded(steps)
    learned, asked = set(), {}
    for config in {_looks_at(config): config for config in configs}.values():
        prompts = {prompt.prompt_id: prompt for prompt in _check(config)}
        if isinstance(config, EvaluateRecipe):
            asked |= prompts
        else:
            learned |= prompts.keys()
    _check_judges(steps)
    if both := [prompt.source for prompt_id, prompt in asked.items() if prompt_id in learned]:
        _log.warning(
            "%d of %d test prompts are also trained on, the first at %s: what is measured on them says little of others",
            len(both), len(asked), both[0],
        )  # fmt: skip
    return configs


def grounded(steps: Sequence[Step]) -> list[Section]:
    """The recipes, with every name of a model that is still to be made replaced by that of the one which it is made from."""
    bases: dict[str, str] = {}  # a model that will be made -> what from

    def replaced(value: Any) -> Any:
        if isinstance(value, Section):
            return value.model_copy(update={name: replaced(part) for name, part in value if part is not None})
        if isinstance(value, Mapping):
            return {key: replaced(part) for key, part in value.items()}
        return bases.get(value, value) if isinstance(value, str) else value

    configs = []
    for step in steps:
        configs.append(config := replaced(step.config))
        match config:
            case RewardModelRecipe():
                bases[f"{step.folder}/model"] = config.reward_model.model
            case FinetuneRecipe() | PPORecipe() | DPORecipe():
                bases[f"{step.folder}/model"] = config.policy.model
    return configs


def _looks_at(config: Section) -> tuple[type, str]:
    """What the check of a step depends on, so that many variants take no longer than one."""
    parts = {"chat", "policy"} if isinstance(config, FinetuneRecipe) else set(type(config).model_fields) - {"out", "name"}
    return type(config), config.model_dump_json(include=parts - (set() if isinstance(config, RewardModelRecipe) else {"seed"}))


def _check(config: Section) -> Sequence[Prompt]:
    """Raise what the job would; the prompts that it asks."""
    match config:
        case RewardModelRecipe():
            reward_model.check_inputs(config)
        case GenerateRecipe():
            return generate.check_inputs(config)[1]
        case CritiqueRecipe():
            return critique.check_inputs(config)[1]
        case FinetuneRecipe():
            finetune.check_model(config)
        case DPORecipe():
            tokenizer = dpo.check_models(config)
            if not config.critiques:  # which will be made; the pairs of tasks are there
                dpo.read_data(config, tokenizer, [] if config.skip_bad_rows else None)
        case PPORecipe():
            return check_asked(config)[0]
        case EvaluateRecipe():
            check_policy(config.model)
            check_attributes(config.model, config.attributes)
            return [cell.prompt for cell in evaluate.asking_of(config).cells]
    return ()


def _check_judges(steps: Sequence[Step]) -> None:
    """Raise what is wrong with the reward models that are there already; warn of those that are held out from nothing."""
    made = tuple(f"{step.folder}/" for step in steps)
    judges, twice = [], {}
    for step in steps:
        match step.config:
            case GenerateRecipe(reward=models) | PPORecipe(reward=models):
                judges += models.values()
            case EvaluateRecipe(judges=given):
                judges += step.config.workers.values()
                held_out = given.held_out or {}
                twice |= {a: one.model for a, one in given.optimisation.items() if a in held_out and held_out[a].model == one.model}
    for reward in {dump(reward): reward for reward in judges}.values():
        if not reward.model.startswith(made) and not reward.calibration_file.startswith(made):
            reward.check()
    for attribute, judge in twice.items():
        _log.warning("the held-out judge of %s is the one that is optimised, %s: it tells nothing of its own", attribute, judge)
