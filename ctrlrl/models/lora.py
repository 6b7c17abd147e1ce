"""Low-rank adapters (peft): put on a model before training, and written on their own after it."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from ctrlrl.config import Section
from ctrlrl.errors import RecipeError
from ctrlrl.models.reading import load_config, reading

_CLASSES = {
    "tokens": AutoModelForCausalLM,
    "value": AutoModelForTokenClassification,
    "reward": AutoModelForSequenceClassification,
}


class LoraConfig(Section):
    """rank 0 trains all weights. export: the whole model with the adapter added in, or the adapter alone (a directory of peft)."""

    rank: int = Field(0, ge=0)
    alpha: float = 16.0
    targets: str | list[str] = "all-linear"
    export: Literal["merged", "adapter"] = "merged"


def with_adapters(model: PreTrainedModel, config: LoraConfig):
    """`model` with new adapters, which alone are trained, but for the head of a classifier: that is new, and trained whole.

    RecipeError for targets that the model does not have, and for the output head of a language model and embeddings tied to it: logprobs
    are made from the head's own weight, which would not have the adapter in it.
    """
    import peft

    inside = {id(module) for module in model.base_model.modules()}
    new = [name for name, module in model.named_children() if id(module) not in inside and [*module.parameters()]]
    head = model.get_output_embeddings()
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=config.targets, lora_dropout=0.0, modules_to_save=None if head else new
    )
    try:
        adapted = peft.get_peft_model(model, settings)
    except (ValueError, re.error) as error:
        raise RecipeError(f"lora.targets = {config.targets!r} cannot be adapted: {str(error).splitlines()[0]}") from None
    layers = [(name, module) for name, module in adapted.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    if head is not None:
        shared = [name for name, layer in layers if getattr(layer.get_base_layer(), "weight", None) is head.weight]
        if shared:
            raise RecipeError(
                f"lora.targets = {config.targets!r} has the output head, or embeddings tied to it ({shared[0].split('.')[-1]!r}), which "
                "adapters do not train here: name other layers, or use 'all-linear', which leaves it out"
            )
    return adapted


@contextmanager
def without_adapters(model: torch.nn.Module) -> Iterator[None]:
    """Forwards inside are those of the base model. (peft's own switch also turns gradients off and on, under the engine's hooks.)"""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def check_adapters(name: str, config: LoraConfig, head: Literal["tokens", "value", "reward"] = "tokens") -> None:
    """RecipeError, as of with_adapters, for targets that the model `name`, with this head, cannot have; reads its configuration alone."""
    if not config.rank:
        return
    with torch.device("meta"):
        with reading(name, "model"):
            model = _CLASSES[head].from_config(load_config(name), trust_remote_code=False)
        with_adapters(model, config)


def save_adapter(model, directory: Path, writes: bool, gather: Callable[[list[Tensor]], AbstractContextManager] | None) -> None:
    """Write all that a peft model trains (safetensors and adapter_config.json). gather: as in full_weights; `writes`: on rank 0 only."""
    state = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            with gather([parameter]) if gather else nullcontext():
                state[name] = parameter.detach().to("cpu", copy=True)
    if writes:
        model.save_pretrained(directory, state_dict=state)
