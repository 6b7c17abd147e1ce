"""In which layout a model is exact: judged by what the model declares, and proven once, when it is loaded, on a short ragged batch.

The proof compares the layout with the model's own plain forward of one sequence at a time. Whatever a layout breaks (state along the
sequence that runs on into the next one, positions or masks made from elsewhere, a head that does more than a matrix product, noise in
training) shows there, and is a ModelError before anything is trained.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ctrlrl.data.batches import TokenBatch
from ctrlrl.errors import ModelError
from ctrlrl.models.forward import ModelInputs, PolicyModule, attention_for, lay_out
from ctrlrl.models.reading import load_config
from ctrlrl.models.segments import SEGMENTS, why_not_packed, why_not_shared

_log = logging.getLogger("ctrlrl")

Layout = Literal["auto", "packed", "padded"]
_ATTENTIONS = {"shared": (SEGMENTS,), "packed": (SEGMENTS,), "padded": ("sdpa", "eager")}  # in the order of their speed
_DECLARED = {"shared": why_not_shared, "packed": why_not_packed, "padded": lambda model: None}
_LENGTHS = (23, 9, 2, 31, 17, 20)  # the fifth repeats the start of the longest: what comes later must not matter
_SHARED = 16  # tokens with which the last three begin
# What a forward that was never meant for a layout may raise.
_FAULTS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError, AssertionError, ImportError)
_FLOAT32, _BFLOAT16 = 1e-3, 0.15  # nats: the largest difference in float32, the mean one in bfloat16 (noise: 0.03 to 0.05)


def settle(module: nn.Module, name: str, wanted: str, device: torch.device) -> str:
    """Put the model `name` inside `module` into its fastest exact layout of those `wanted`; returns "shared", "packed" or "padded".

    Also decides whether a policy's logprobs may be computed from its last hidden state, chunk by chunk. All ranks do the same forwards.
    ModelError where no layout is exact.
    """
    batch = _batch(module.causal.config)
    with _undisturbed(module):
        alone, plain_head = _one_at_a_time(module, name, batch, device)
        faults = {}
        for layout in (wanted,) if wanted in ("packed", "padded") else _ATTENTIONS:
            for attention in _ATTENTIONS[layout]:
                fault = _fault(module, batch, layout, attention, alone)
                if fault is None:
                    break
                faults[layout] = fault
            else:
                continue
            if plain_head:
                module.full_logits = False
            _tell(module, name, layout, faults)
            return layout
    if wanted == "packed":
        raise ModelError(f'{name!r} cannot be packed ({faults["packed"]}): set layout = "auto" or layout = "padded"')
    reasons = "; ".join(f"{layout}: {fault}" for layout, fault in faults.items() if layout != "shared")
    raise ModelError(f"{name!r} cannot be trained: no layout gives what one sequence at a time gives ({reasons}); give another model")


def _tell(module: nn.Module, name: str, layout: str, faults: dict[str, str]) -> None:
    """Of faster layouts that the model does not rule out itself, that they failed: it is trained as rightly, but takes longer."""
    for faster, fault in faults.items():
        if faster != layout and not _DECLARED[faster](module.causal):
            _log.warning("%r runs in the layout %s: %s cannot be used here (%s)", name, layout, faster, fault)


def _one_at_a_time(module: nn.Module, name: str, batch: TokenBatch, device: torch.device) -> tuple[list[Tensor], bool]:
    """Outputs of each sequence by the model's own plain forward, and whether its logits are its head's outputs and nothing more."""
    policy = isinstance(module, PolicyModule)
    if policy:
        module.full_logits = True
    try:
        _attend_by(module.causal, "eager")
        with _watched_head(module.causal) if policy else nullcontext({}) as seen:
            alone = [_outputs(module, _alone(batch.select(np.array([row])), device)) for row in range(len(batch))]
    except torch.OutOfMemoryError:
        raise
    except _FAULTS as error:
        raise ModelError(f"{name!r} cannot be run on tokens alone: {_first_line(error)}; give a causal language model of text") from error
    longest, repeated = alone[_LENGTHS.index(max(_LENGTHS))], alone[-2]
    if _difference(repeated, longest[: len(repeated)], module) is not None:
        raise ModelError(f"{name!r} is not causal: later tokens change what it says of earlier ones; give a causal language model")
    plain = bool(seen) and torch.equal(seen["hidden"], seen["read"]) and torch.equal(seen["written"].float(), seen["logits"].float())
    return alone, plain


def check_layout(name: str, layout: Layout) -> None:
    """Raise ModelError if the model `name` is to be packed and declares that it cannot be; reads its configuration alone."""
    if layout == "packed":
        attention_for(layout, load_config(name))


def _fault(module: nn.Module, batch: TokenBatch, layout: str, attention: str, alone: list[Tensor]) -> str | None:
    """Why this layout is not exact for the model; None if it is."""
    if declared := _DECLARED[layout](module.causal):
        return declared
    if layout == "shared":
        prompts = np.where(np.arange(len(batch)) < len(batch) - 3, 1, _SHARED)
        batch, alone = replace(batch, prompt_lengths=prompts), [found[p - 1 :] for found, p in zip(alone, prompts, strict=True)]
    wanted = torch.cat(alone)
    try:
        if not _attend_by(module.causal, attention):
            return f"its class does not take {attention} attention"
        module.train()  # what is random in training shows as a difference
        found = _outputs(module, lay_out(batch, layout, wanted.device))
    except torch.OutOfMemoryError:
        raise
    except _FAULTS as error:
        return _first_line(error)
    finally:
        module.eval()
    difference = _difference(found, wanted, module)
    return None if difference is None else f"outputs differ by {difference:.2g} from those of one sequence at a time"


def _attend_by(model: PreTrainedModel, attention: str) -> bool:
    """Let the model use an attention of transformers; False where its class takes none from outside, and keeps its own."""
    if model._can_set_attn_implementation():
        model.set_attn_implementation(attention)
    return model.config._attn_implementation == attention


def _outputs(module: nn.Module, inputs: ModelInputs) -> Tensor:
    """What is compared: logprobs [M] of a policy, last hidden states [M, H] of a value model (its head may be zero)."""
    if isinstance(module, PolicyModule):
        return module(inputs)[0][inputs.rows, inputs.columns]
    kept = []
    hook = module.causal.base_model.register_forward_hook(lambda _, __, output: kept.append(output[0]))
    try:
        module(inputs)
    finally:
        hook.remove()
    return kept[-1].flatten(0, 1)[inputs.reads].float()


def _difference(found: Tensor, wanted: Tensor, module: nn.Module) -> float | None:
    """How far the outputs are apart, None if not beyond the noise of their numbers; hidden states in their own unit."""
    unit = 1.0 if isinstance(module, PolicyModule) else float(wanted.abs().max().clamp_min(1e-6))
    apart = (found - wanted).abs().float() / unit
    half = any(p.dtype != torch.float32 for p in module.parameters())
    value, bound = (apart.mean(), _BFLOAT16) if half else (apart.max(), _FLOAT32)
    if torch.distributed.is_initialized():  # one judgement for all ranks
        value = value.to("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
    return None if float(value) <= bound else float(value)


def _batch(config: PretrainedConfig) -> TokenBatch:
    """Fixed ragged tokens, all but the first scored, without the special tokens that the configuration names."""
    special = np.unique([i for part in (config, config.get_text_config()) for i in _special_ids(part)])
    ordinary = np.setdiff1d(np.arange(min(config.get_text_config().vocab_size, 4096)), special)
    rng = np.random.default_rng(0)
    tokens = [ordinary[rng.integers(0, len(ordinary), length)] for length in _LENGTHS]
    longest = tokens[_LENGTHS.index(max(_LENGTHS))]
    tokens[-2] = longest[: _LENGTHS[-2]]
    tokens[-1] = np.concatenate([longest[:_SHARED], tokens[-1][_SHARED:]])
    return TokenBatch(tokens, np.ones(len(tokens), np.int64), {}, {})


def _special_ids(config: PretrainedConfig) -> list[int]:
    named = [value for key, value in config.to_dict().items() if key.endswith(("token_id", "token_index"))]
    return [i for value in named for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]


def _alone(one: TokenBatch, device: torch.device) -> ModelInputs:
    """One sequence as the model takes it by itself: its tokens and nothing else."""
    inputs = lay_out(one, "padded", device)
    return replace(inputs, model={"input_ids": inputs.model["input_ids"]})


@contextmanager
def _watched_head(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """What goes through the model's head in a forward: the base model's last hidden state, what the head reads and writes, the logits.

    Stays empty where the head is no plain matrix: an adapter's weights would be missing from it.
    """
    seen, head = {}, model.get_output_embeddings()
    if type(head) is not nn.Linear:
        yield seen
        return

    def keep(name, output):
        if isinstance(output, Tensor):
            seen[name] = output.detach()

    hooks = [
        model.base_model.register_forward_hook(lambda _, __, output: keep("hidden", getattr(output, "last_hidden_state", None))),
        head.register_forward_hook(lambda _, read, written: (keep("read", read[0]), keep("written", written)) and None),
        model.register_forward_hook(lambda _, __, output: keep("logits", getattr(output, "logits", None))),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
        if len(seen) < 4:
            seen.clear()


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Forwards inside leave the module's mode and the random numbers as they were."""
    training = module.training
    with torch.no_grad(), torch.random.fork_rng():
        module.eval()
        try:
            yield
        finally:
            module.train(training)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
