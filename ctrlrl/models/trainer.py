"""Training with DeepSpeed: any model of forward.py, any objective, ZeRO 0-3.

A global batch is cut into micro-batches by a token budget and dealt to the ranks; losses are shares of the global loss, so the
result does not depend on the cutting, the layout or the number of ranks.
"""

import math
import os
import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from ctrlrl.config import Section
from ctrlrl.data.batches import Loss, TokenBatch, masked, plan_batch
from ctrlrl.errors import RecipeError, RunError
from ctrlrl.models.broadcast import Meeting, Sender
from ctrlrl.models.earlier_state import is_earlier, load_earlier
from ctrlrl.models.forward import PolicyModule, PolicyValueModule, RewardModule, ValueModule, lay_out, micro_batch
from ctrlrl.models.handover import Giver
from ctrlrl.models.layout import Layout, settle
from ctrlrl.models.loading import DTYPES, load_classifier, load_policy, load_value_model, reads_token_types, within_positions
from ctrlrl.models.lora import LoraConfig, save_adapter, with_adapters, without_adapters
from ctrlrl.models.pooling import Encoded, check_scores_alone, conversation_batch
from ctrlrl.models.state import INDEX, load_state, save_state
from ctrlrl.models.weights import WeightMessage, cast_parameters, message_of, model_weights, precise_buffers, weights_of

# glibc keeps freed pages instead of returning them: +31 % tokens/s measured on CPU. Must be set before the process starts.
CPU_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "67108864",
}
BUCKET = 50_000_000  # elements that the ranks exchange at once
Kind = Literal["policy", "policy_value", "value", "reward"]


class TrainerConfig(Section):
    """One model's optimiser and engine. micro_batch_tokens: memory bound of one forward-backward, in tokens."""

    learning_rate: float = Field(2e-5, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    total_steps: int = Field(0, ge=0, description="optimiser steps of the whole run; 0: as many as the job has")
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    zero_stage: Literal[0, 1, 2, 3] = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    layout: Layout = "auto"
    micro_batch_tokens: int = Field(8192, gt=0)
    gradient_checkpointing: bool = False
    lora: LoraConfig = LoraConfig()


class ClassifierTrainerConfig(TrainerConfig):
    """Of a sequence classifier, which pools each row by itself (encoders look both ways): its micro-batches are padded."""

    layout: Literal["padded"] = "padded"


def learning_rate_at(step: int, config: TrainerConfig) -> float:
    """Learning rate of optimiser step `step` (from 0): linear warm-up, then constant, or down to 0 at total_steps."""
    if config.schedule != "constant" and not config.total_steps:
        raise RecipeError(f"schedule = {config.schedule!r} ends at total_steps, which is 0: set total_steps, or schedule = 'constant'")
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = min(1.0, (step - config.warmup_steps) / max(1, config.total_steps - config.warmup_steps))
    return config.learning_rate * (1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def join_world(rank: int, world: int, address: str, port: int, timeout_s: float) -> None:
    """Enter the process group of all ranks (gloo on CPU, NCCL on CUDA)."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", LOCAL_SIZE="1", MASTER_ADDR=address, MASTER_PORT=str(port))
    import deepspeed
    from torch.distributed import distributed_c10d

    # The CPU shared-memory op needs a compiler, leaks 66 MiB of /dev/shm a rank and hangs on regrouping; training does not use it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed's collectives run on a copy of the group that ignores the timeout given at init.
    distributed_c10d.default_pg_timeout = timedelta(seconds=timeout_s)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(seconds=timeout_s), verbose=False)


class Trainer:
    """One rank of one trained model. Call join_world first; every method but `weights` of a non-partitioned model is collective."""

    def __init__(self, kind: Kind, model: str, config: TrainerConfig, temperature: float = 1.0, seed: int = 0):
        import deepspeed

        warnings.filterwarnings("ignore", message=".*lr_scheduler.*")
        torch.manual_seed(seed)
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        settings = _engine_settings(config)
        places = within_positions(model, 64) if kind == "reward" else 0  # before ZeRO-3's own way of loading is set up
        if config.zero_stage == 3:
            from transformers.integrations import HfDeepSpeedConfig

            self._zero3 = HfDeepSpeedConfig(settings)  # must stay alive: makes from_pretrained load shards
        module, self.layout = _module(kind, model, config, temperature), config.layout
        precise = precise_buffers(module)
        if config.zero_stage < 3:
            if kind != "reward":  # in float32, where differences are not noise
                self.layout = settle(module, model, self.layout, torch.device("cpu"))
            cast_parameters(module, config.dtype)
        trainable = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, dist_init_required=False
        )
        for owner, name, buffer in precise:
            owner._buffers[name] = buffer.to(self.device)  # this module's and DeepSpeed's cast took them along
        if self._norm_is_ours:
            self.engine.enable_backward_allreduce = False  # else backward() or step() reduces as well as _gradient_norm
        self.module = module
        if config.zero_stage == 3 and isinstance(module, PolicyModule):  # before the first forward, whose order of gathering is kept
            for weight in module.head_weights():
                deepspeed.zero.register_external_parameter(module, weight)
        if kind != "reward" and (config.zero_stage == 3 or self.device.type == "cuda"):  # with the engine's own weights and kernels
            self.layout = settle(module, model, self.layout, self.device)
        self.rank, self.world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
        self.steps, self.sender, self.giver = 0, Sender(), Giver()
        if kind == "reward":
            check_scores_alone(model, module.causal, self._scores_of, places)

    @torch.no_grad()
    def _scores_of(self, encoded: list[Encoded]) -> list[float]:
        """Scores of conversations, in one micro-batch; collective, and the same on every rank."""
        self.engine.eval()
        return self.engine(lay_out(conversation_batch(encoded, self.module.token_types), "padded", self.device))[0].tolist()

    def train(self, batch: TokenBatch, loss: Loss, steps: list[np.ndarray]) -> list[dict[str, float]]:
        """One optimiser step for each row selection of `steps`. Returns this rank's shares of the stats, a dictionary a step."""
        self.engine.train()
        return [self._step(batch.select(rows), loss) for rows in steps]

    def _step(self, batch: TokenBatch, loss: Loss) -> dict[str, float]:
        tokens, sequences = int(batch.scored_lengths.sum()), len(batch)
        shares = []
        for part in self._mine(batch):
            inputs = lay_out(part, self.layout, self.device)
            value, stats = loss(self.module.outputs_type(*self.engine(inputs)), micro_batch(part, inputs, tokens, sequences))
            self.engine.backward(value * self.world)  # DeepSpeed averages gradients over ranks; shares have to be summed
            shares.append({"loss": float(value.detach()), **{name: float(stat) for name, stat in stats.items()}})
        rate = learning_rate_at(self.steps, self.config)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        norm = self._gradient_norm()
        self.engine.step()
        self.steps += 1
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        return {**combine_shares(shares), "grad_norm_max": float(norm), "learning_rate_max": rate}

    @property
    def _norm_is_ours(self) -> bool:
        """Whether the engine does not tell the gradient's norm: at stage 0 in fp32."""
        return self.config.zero_stage == 0 and self.config.dtype == "float32"

    def _gradient_norm(self) -> float | None:
        """Global norm before clipping where the engine does not tell it; reduces the gradients over the ranks."""
        if not self._norm_is_ours:
            return None
        self.engine.buffered_allreduce_fallback()  # allreduce_gradients() does nothing outside step()
        return float(torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None]))

    def _mine(self, batch: TokenBatch) -> list[TokenBatch]:
        """This rank's micro-batches. All ranks get the same number, if need be a masked one: ZeRO 2 and 3 communicate in each."""
        plan = plan_batch(batch, self.config.micro_batch_tokens, self.layout, self.world)
        parts = [batch.select(rows) for rows in plan[self.rank :: self.world]]
        if len(parts) < math.ceil(len(plan) / self.world):
            parts.append(masked(batch.select(np.arange(batch.group))))
        return parts

    def score(self, batch: TokenBatch) -> tuple[np.ndarray, list[np.ndarray]]:
        """Rows that this rank scored, and logprobs, values (one for each scored token) or a score, one fp32 array a row."""
        return self._score(batch, lambda outputs: outputs[0].view(len(outputs[0]), -1))  # a reward model's are [B]

    def score_both(self, batch: TokenBatch) -> tuple[np.ndarray, list[np.ndarray]]:
        """`score` of a policy with a value head: (logprob, value) of each scored token, one fp32 array [T, 2] a row."""
        return self._score(batch, lambda outputs: torch.stack([outputs[0], outputs[2]], -1))

    @torch.no_grad()
    def _score(self, batch: TokenBatch, of):
        self.engine.eval()
        given = batch, self.layout, self.config.micro_batch_tokens, self.device, self.rank, self.world
        return score_rows(lambda inputs: of(self.engine(inputs)), *given)

    def probe(self, batch: TokenBatch) -> tuple[np.ndarray, list[np.ndarray]]:
        """`score` of a policy at temperature 1, which is what an engine says of tokens that it did not draw."""
        temperature, self.module.temperature = self.module.temperature, 1.0
        try:
            return self.score(batch)
        finally:
            self.module.temperature = temperature

    def base(self, batch: TokenBatch) -> tuple[np.ndarray, list[np.ndarray]]:
        """`score` of the model that the adapters were put on."""
        with without_adapters(self.module):
            return self.score(batch)

    def weights(self, dtype: str, version: int) -> WeightMessage | None:
        """All weights as one message on rank 0 (None on the others); LoRA is merged."""
        return self._by_rank_0(lambda model, gather: message_of(model, dtype, version, gather))

    def broadcast(self, dtype: str, version: int, meeting: Meeting) -> str | None:
        """The same sent to a group by rank 0, which says why not all got it, if so."""
        return self._by_rank_0(lambda model, gather: self.sender.send(weights_of(model, dtype, gather), dtype, version, meeting))

    def _by_rank_0(self, take):
        if self.rank == 0:
            return take(self.module.model, self.gatherer())
        for _ in model_weights(self.module.model, self.gatherer()):
            pass  # the gathers of ZeRO-3 are collective

    def export(self, directory: Path) -> None:
        """Write the model as an ordinary transformers directory (safetensors; LoRA merged, or the adapter alone as its config says)."""
        if self.config.lora.rank and self.config.lora.export == "adapter":
            return save_adapter(self.module.model, directory, self.rank == 0, self.gatherer())
        named = model_weights(self.module.model, self.gatherer(), DTYPES[self.config.dtype])
        state = {name: tensor.to("cpu", copy=True) for name, tensor in named if self.rank == 0}
        if self.rank == 0:
            self.module.causal.save_pretrained(directory, state_dict=state)

    def save(self, directory: Path) -> None:
        """Write weights, optimiser and step count for `load`."""
        save_state(self.engine, directory, self.steps)

    def load(self, directory: Path) -> None:
        """Continue from `save`, by any number of ranks; RunError for a missing or damaged checkpoint, or one of another training."""
        if not (directory / INDEX).is_file():
            raise RunError(f"no checkpoint in {str(directory)!r}: resume from a folder that holds one, or start without --resume")
        if is_earlier(directory):
            self.steps = load_earlier(self.engine, directory, partial=self.config.lora.rank > 0)
        else:
            self.steps = load_state(self.engine, directory)

    def gatherer(self):
        """What makes partitioned parameters whole; None where none are partitioned."""
        import deepspeed

        return deepspeed.zero.GatheredParameters if self.config.zero_stage == 3 else None


def combine_shares(shares: list[dict[str, float]]) -> dict[str, float]:
    """Add shares of stats up; stats whose name ends in `_max` are combined by maximum."""
    names = {name: None for share in shares for name in share}
    return {name: (max if name.endswith("_max") else sum)(share[name] for share in shares if name in share) for name in names}


def score_rows(
    forward, batch: TokenBatch, layout: str, budget: int, device, rank: int = 0, world: int = 1
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Run `forward` (inputs -> [B, T, …]) over this rank's micro-batches; returns row indices and one fp32 array of scored tokens a row."""
    plan = plan_batch(replace(batch, group=1), budget, layout, world)
    turns, rows, results = math.ceil(len(plan) / world), [], []
    for turn in range(turns):
        mine = turn * world + rank
        part = batch.select(plan[mine] if mine < len(plan) else plan[0])  # all ranks forward equally often: ZeRO-3 communicates
        grid = forward(lay_out(part, layout, device)).float().cpu().numpy()
        if mine < len(plan):
            rows.append(plan[mine])
            results += [grid[i, :n].copy() for i, n in enumerate(part.scored_lengths)]
    return (np.concatenate(rows) if rows else np.zeros(0, np.int64)), results


def _module(kind: Kind, name: str, config: TrainerConfig, temperature: float):
    """The model `name` as a module of forward.py, in float32 where a copy in another dtype is made later."""
    load = {"value": load_value_model, "reward": load_classifier}.get(kind, load_policy)
    model = load(name, "float32" if config.zero_stage < 3 else config.dtype)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.lora.rank:
        if config.gradient_checkpointing:
            model.enable_input_require_grads()
        model = with_adapters(model, config.lora)
    if kind == "reward":
        return RewardModule(model, reads_token_types(name))
    return ValueModule(model) if kind == "value" else (PolicyValueModule if kind == "policy_value" else PolicyModule)(model, temperature)


def _engine_settings(config: TrainerConfig) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # any number of backwards, then one step: micro-batches vary in PPO
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "zero_optimization": {"stage": config.zero_stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET},
        "steps_per_print": 10**9,
    }
