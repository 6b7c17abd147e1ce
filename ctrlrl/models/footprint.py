"""Memory of one process by phase, in bytes on its device: of a rank that trains, of a frozen model, of a rollout engine.

Parameters are counted on transformers' own models on the meta device, activations and logits by meter.py on the modules that train there;
what DeepSpeed keeps beside them follows its code for our settings (trainer.py) by ZeRO stage. Of an engine the working memory is an
estimate: vLLM's is known on the device alone.

Legend: P parameters, T those of them that are trained, N ranks, w bytes of the dtype.
"""

from dataclasses import dataclass
from functools import cache

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)

from ctrlrl.models.broadcast import BUCKET as HANDED_OVER
from ctrlrl.models.forward import PolicyModule, PolicyValueModule, ValueModule
from ctrlrl.models.loading import DTYPES
from ctrlrl.models.lora import LoraConfig, with_adapters
from ctrlrl.models.meter import COUNTED, forward_peak, row_of, training_peak
from ctrlrl.models.sampler import EngineConfig
from ctrlrl.models.trainer import BUCKET, TrainerConfig
from ctrlrl.models.weights import cast_parameters

Phases = dict[str, dict[str, int]]  # phase -> part -> bytes

_REDUCED_AT_ONCE = 500_000_000  # elements, of DeepSpeed's reduction at stage 0
_GATHERED = 1_000_000_000  # elements that DeepSpeed keeps whole at stage 3 before it frees them (stage3_max_live_parameters)
_GROUP = 1_000_000_000  # elements of a group of parameters at stage 3 (sub_group_size)
_PREFILL = 8192  # tokens of one forward of vLLM's engine (16,384 on GPUs with 70 GiB and more but the A100)
_LOGITS = 4  # fp32 copies of a step's logits in vLLM's sampler: themselves, their logprobs, the tempered ones, the probabilities
_GRAPHS = 2**30  # of CUDA graphs, where the engine is not eager


@dataclass(frozen=True)
class Shape:
    """What is counted of one model: parameters, those that are trained, and bytes of activations with logits by phase."""

    parameters: int
    trained: int
    backward: int
    forward: int


def trained(config: PretrainedConfig, kind: str, train: TrainerConfig, ranks: int) -> Phases:
    """A rank of a model that is trained. kind: "policy", "policy_value" or "value"."""
    tokens, lora = train.micro_batch_tokens, train.lora if train.lora.rank else None
    shape = _shape(config.to_json_string(), type(config), kind, train.dtype, tokens, train.gradient_checkpointing, lora and _frozen(lora))
    w, stage = DTYPES[train.dtype].itemsize, train.zero_stage
    part = 1 / ranks if stage else 1
    half = w < 4
    master = 0 if not half and stage in (0, 3) else int(4 * shape.trained * part)
    kept = {
        "weights": int(w * shape.parameters * (part if stage == 3 else 1)),
        "optimiser": master + int(8 * shape.trained * part),
        "gradients": int(w * shape.trained * (part if stage >= 2 else 1)),
    }
    gathered = w * min(shape.parameters, _GATHERED) if stage == 3 and ranks > 1 else 0
    bucket = w * BUCKET if stage else 0
    scoring = {**kept, "gradients": kept["gradients"] if stage == 3 else 0, "activations": shape.forward, "buffers": gathered}
    backward = {**kept, "activations": shape.backward, "buffers": gathered + bucket}
    copied = _copied(w, stage, shape.trained * part)
    flat = w * min(shape.trained, _REDUCED_AT_ONCE) if not stage else 0
    step = {**kept, "gradients": kept["gradients"] + copied, "buffers": flat + (bucket if stage == 3 else 0)}
    return {"score": scoring, "backward": backward, "step": step}


def _copied(w: int, stage: int, elements: float) -> int:
    """Bytes of the gradients that DeepSpeed copies for the optimiser's step: in fp32 where they are not, flat from stage 1 on, and at stage
    3 one group of parameters after the other."""
    if stage == 3:
        elements = min(elements, _GROUP)
    flat = w * elements if stage else 0
    return int(flat + (4 * elements if w < 4 else 0))


def frozen(config: PretrainedConfig, kind: str, dtype: str, tokens: int) -> Phases:
    """A model that only scores. kind: "reference" or "reward"; tokens: of one forward."""
    shape = _shape(config.to_json_string(), type(config), kind, dtype, tokens, False, None)
    return {"score": {"weights": DTYPES[dtype].itemsize * shape.parameters, "activations": shape.forward}}


def rollout(config: PretrainedConfig, engine: EngineConfig) -> Phases:
    """A rollout engine, on each of its devices; all of it is kept from its start on. Activations and logits are not less with several."""
    parts = engine.tensor_parallel
    w = DTYPES[engine.dtype].itemsize
    shape = _shape(config.to_json_string(), type(config), "engine", engine.dtype, _PREFILL, False, None)
    logits = _LOGITS * 4 * engine.max_concurrent * config.get_text_config().vocab_size
    return {
        "generate": {
            "weights": w * shape.parameters // parts,
            "cache": int(engine.kv_cache_gib * 2**30 / parts),
            "activations": shape.forward + logits,
            "buffers": 0 if engine.eager else _GRAPHS,
        }
    }


def with_handover(policy: Phases, config: PretrainedConfig, engine: EngineConfig) -> Phases:
    """A rank of the policy that also gives its weights to the engine on its device: that one's weights lie there meanwhile, and four
    buckets: the one that the rank fills, the engine's copy, and tensors made whole, or in another dtype, for this one and the next."""
    own, w = next(iter(policy.values())), DTYPES[engine.dtype].itemsize
    kept = {part: own[part] for part in ("weights", "gradients", "optimiser")}
    sizes = _sizes(config)
    return {**policy, "publish": {**kept, "buffers": w * sum(sizes) + 4 * max(HANDED_OVER, w * max(sizes))}}


def cache_bytes_a_token(config: PretrainedConfig, engine: EngineConfig) -> int:
    """Of the key-value cache, on all devices: layers x 2 x key-value heads x head size x bytes. Each device has one such head at least."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return text.num_hidden_layers * 2 * max(heads, engine.tensor_parallel) * size * DTYPES[engine.dtype].itemsize


def parameters_of(config: PretrainedConfig) -> int:
    """Parameters of a causal language model of this configuration, tied ones once."""
    return sum(_sizes(config))


def _sizes(config: PretrainedConfig) -> list[int]:
    with torch.device("meta"):
        return [p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()]


def total(parts: dict[str, int]) -> int:
    """Bytes of a phase."""
    return sum(parts.values())


def peak(phases: Phases) -> int:
    """The most bytes that a process has at once."""
    return max(map(total, phases.values()))


def _frozen(lora: LoraConfig) -> tuple:
    return lora.rank, lora.targets if isinstance(lora.targets, str) else tuple(lora.targets)


@cache
def _shape(
    dumped: str, kind_of_config: type, kind: str, dtype: str, tokens: int, checkpointing: bool, lora: tuple | None
) -> Shape:
    """The module of `kind` as trainer.py and scorer.py make it, on the meta device, and what the meter says of it."""
    import json

    config = kind_of_config.from_dict(json.loads(dumped))
    config.num_labels = 1
    head = {"value": AutoModelForTokenClassification, "reward": AutoModelForSequenceClassification}.get(kind, AutoModelForCausalLM)
    with torch.device("meta"):
        model = head.from_config(config, attn_implementation=COUNTED)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora:
            if checkpointing:
                model.enable_input_require_grads()
            rank, targets = lora
            model = with_adapters(model, LoraConfig(rank=rank, targets=targets if isinstance(targets, str) else list(targets)))
        module = _module(kind, model, config)
    cast_parameters(module, dtype)
    counted = [(p.numel(), p.requires_grad) for p in module.parameters()]
    learns = kind in ("policy", "policy_value", "value")
    return Shape(
        sum(size for size, _ in counted),
        sum(size for size, trained in counted if trained),
        training_peak(module, row_of(tokens)) if learns else 0,
        forward_peak(module, row_of(tokens)),
    )


def _module(kind: str, model, config: PretrainedConfig):
    if kind == "reward":
        return _OfTokens(model)
    if kind == "engine":
        return _OfTokens(model.base_model, model)
    if kind == "value":
        return ValueModule(model)
    module = (PolicyValueModule if kind == "policy_value" else PolicyModule)(model, 1.0)
    module.full_logits = _changes_logits(config)
    return module


class _OfTokens(torch.nn.Module):
    """A model that reads tokens and needs nothing else. owner: whose parameters are counted."""

    def __init__(self, model, owner=None):
        super().__init__()
        self.model, self.owner = model, owner

    def forward(self, inputs):
        return self.model(**inputs.model, use_cache=False)


def _changes_logits(config: PretrainedConfig) -> bool:
    """Whether a model does more to its logits than its head, so that they are made whole, not in chunks (layout.settle finds it)."""
    text = config.get_text_config()
    return any(getattr(text, key, None) not in (None, 1, 1.0) for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"))
