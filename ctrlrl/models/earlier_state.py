"""Checkpoints in DeepSpeed's own format, which earlier versions wrote: read as plain data, by the number of ranks that wrote them."""

import json
import pickle
from pathlib import Path

import torch

from ctrlrl.errors import RunError
from ctrlrl.models.state import INDEX, damaged

TAG = "engine"  # the folder of DeepSpeed's files


def is_earlier(directory: Path) -> bool:
    """Whether `directory` holds a checkpoint of an earlier version."""
    return (directory / TAG).is_dir()


def load_earlier(engine, directory: Path, partial: bool) -> int:
    """Continue from such a checkpoint; returns the steps done. partial: it leaves out frozen weights (LoRA).

    RunError: written by another number of ranks, damaged, of another model, or holding more than tensors and settings.
    """
    world = torch.distributed.get_world_size()
    try:
        state = json.loads((directory / INDEX).read_text())
        steps, writers = int(state["steps"]), int(state["world"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(directory / INDEX, error) from None
    if writers != world:
        raise RunError(
            f"the checkpoint in {str(directory)!r} was made by {writers} ranks and an earlier version, whose files no other number of "
            f"ranks can read; this run has {world}: set ranks = {writers} until its next checkpoint, which any number can"
        )
    engine.checkpoint_engine.load = _read  # DeepSpeed's own would run code that a file names
    try:
        engine.load_checkpoint(str(directory), tag=TAG, load_module_strict=not partial)
    except RunError:
        raise
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, AssertionError, AttributeError) as error:
        reason = str(error) or type(error).__name__
        raise RunError(f"the checkpoint in {str(directory)!r} does not fit: {reason}: resume with the recipe that wrote it") from None
    finally:
        del engine.checkpoint_engine.load
    return steps


def _read(path: str, map_location=None):
    """torch.load that makes tensors, plain Python values and the three small classes of DeepSpeed's files, and nothing else."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[-1]
        raise RunError(f"{path} is refused, since it holds more than tensors and settings, or is damaged: {reason}") from None
    except (OSError, EOFError, RuntimeError, ValueError, LookupError) as error:
        raise damaged(Path(path), error) from None
