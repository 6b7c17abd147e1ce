"""Low-rank adapters (peft): put on a model before training, and written on their own after it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from ctrlrl.config import Section


class LoraConfig(Section):
    """rank 0 trains all weights. export: the whole model with the adapter added in, or the adapter alone (a directory of peft)."""

    rank: int = Field(0, ge=0)
    alpha: float = 16.0
    targets: str | list[str] = "all-linear"
    export: Literal["merged", "adapter"] = "merged"


def with_adapters(model: PreTrainedModel, config: LoraConfig):
    """`model` with new adapters, which alone are trained."""
    import peft

    return peft.get_peft_model(
        model, peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=config.targets, lora_dropout=0.0)
    )


def save_adapter(model, directory: Path, writes: bool, gather: Callable[[list[Tensor]], AbstractContextManager] | None) -> None:
    """Write the adapter of a peft model (safetensors and adapter_config.json). gather: as in full_weights; `writes`: on rank 0 only."""
    state = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            with gather([parameter]) if gather else nullcontext():
                state[name] = parameter.detach().to("cpu", copy=True)
    if writes:
        model.save_pretrained(directory, state_dict=state)
