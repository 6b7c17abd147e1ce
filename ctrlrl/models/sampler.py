"""Sampling with vLLM: token ids in, token ids out. Only this file, ranks.py, engine_rank.py and reload.py name vLLM.

One engine lives in its own process, without vLLM's second process (VLLM_ENABLE_V1_MULTIPROCESSING=0): the same tokens/s for half
the CPU, and weights can be handed over in memory. New weights go through vLLM's weight-transfer protocol with a backend that reads
a WeightMessage; the same call works on CPU and CUDA. With several devices the model is in a process for each
(ranks.py), and vLLM's scheduler alone in this one.
"""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import BaseContext

import numpy as np
import torch
from pydantic import Field

from ctrlrl.config import Section
from ctrlrl.errors import ModelError, RecipeError, VersionMismatch, WorkerLost
from ctrlrl.models.architectures import carries_state, check_engine_takes, check_split
from ctrlrl.models.broadcast import Meeting, Receiver
from ctrlrl.models.handover import Bucket, taken
from ctrlrl.models.loading import end_token_ids, existing, load_config, within_positions
from ctrlrl.models.ranks import Ranks
from ctrlrl.models.reload import TRANSFER, leave_transformers_usable, register_transfer
from ctrlrl.models.weights import WeightMessage

# What vLLM raises for a model or settings that it cannot take.
IMPORTS = ("ctrlrl.models.proof", "vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker")  # of its process
ENGINE_ERRORS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)


class SamplingConfig(Section):
    """How responses are drawn; the defaults are the paper's for generation ([SH] 2.2)."""

    temperature: float = Field(0.5, gt=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_new_tokens: int = Field(512, gt=0)


class EngineConfig(Section):
    """One vLLM engine. max_model_tokens: prompt and response together. kv_cache_gib: memory of the key-value cache. tensor_parallel: of how
    many devices, with a part of the model and of the cache each."""

    dtype: str = Field("bfloat16", pattern="^(float32|bfloat16)$")
    max_model_tokens: int = Field(2048, gt=0)
    kv_cache_gib: float = Field(0.5, gt=0)
    max_concurrent: int = Field(256, gt=0)
    tensor_parallel: int = Field(1, gt=0)
    eager: bool = True


def prompt_room(model: str, engine: EngineConfig, sampling: SamplingConfig, section: str = "rollout") -> int:
    """Tokens that a prompt may have beside its answer; RecipeError if the engine, of this section of the recipe, has more tokens than
    the model has positions, or no more than an answer, ModelError if it cannot take the model at all."""
    check_engine_takes(model)
    check_split(model, engine.tensor_parallel, f"{section}.engine.tensor_parallel".lstrip("."))
    positions, key = within_positions(model, engine.max_model_tokens), f"{section}.engine.max_model_tokens".lstrip(".")
    rope = getattr(load_config(model), "rope_parameters", None) or {}
    stretched = rope.get("rope_type") in ("linear", "dynamic")  # to more positions than the configuration names; vLLM knows how many
    if positions < engine.max_model_tokens and not stretched:
        raise RecipeError(f"{key} = {engine.max_model_tokens}, but {model!r} has {positions} positions: set {key} = {positions} or less")
    if engine.max_model_tokens <= sampling.max_new_tokens:
        raise RecipeError(f"{key} = {engine.max_model_tokens} has no room beside the {sampling.max_new_tokens} tokens of an answer")
    return engine.max_model_tokens - sampling.max_new_tokens


def environment(engine: EngineConfig) -> dict[str, str]:
    """Environment variables of a process that will hold a Sampler; they must precede the import of vLLM."""
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        # Even an eager engine compiles small functions at its first call: seconds, and a C++ compiler, for nothing.
        "TORCHDYNAMO_DISABLE": "1" if engine.eager else "0",
    }


@dataclass(frozen=True)
class Request:
    """One response to draw: the rendered prompt's token ids and a seed of its own (a replay gives the same response)."""

    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Completions:
    """Drawn responses in the order of their requests. response_ids include the end token where finished; logprobs are the sampler's own,
    after temperature and top-p (empty where they were not asked for); finished is false for responses cut at the length limit."""

    response_ids: list[np.ndarray]
    logprobs: list[np.ndarray]
    finished: np.ndarray
    version: int
    seconds: float
    cached_tokens: int


class Sampler:
    """A vLLM engine with versioned weights (0 = the model directory's own). rests: `rest` will be called. begin: what begins its processes,
    if it has several.

    pids: of these processes; without one of them it is of no use.
    """

    def __init__(self, model: str, engine: EngineConfig, rests: bool = False, begin: BaseContext | None = None):
        if hasattr(torch._C, "_cpu") and hasattr(torch._C._cpu, "_init_amx"):
            torch._C._cpu._init_amx()  # else small bf16 matrices die with SIGILL on CPUs with AMX
        from vllm import LLM
        from vllm.config import WeightTransferConfig
        from vllm.platforms import current_platform

        if not current_platform.is_cpu() and not torch.cuda.is_available():
            raise ModelError(
                "this vLLM is built for GPUs, and its worker has none: give the section's resources gpus (a half, if the GPU is shared), "
                "or install the build for CPUs (pip install '.[cpu]')"
            )
        leave_imports_alone()
        register_transfer()
        self.version, self._receiver, self._bytes = 0, Receiver(), 0
        self._sleeps, self._asleep = rests and not current_platform.is_cpu(), set()  # on processors vLLM has no sleep
        self._ends, self._ranks = end_token_ids(model), Ranks(model, engine.tensor_parallel, begin)
        settings = dict(
            model=existing(model),
            load_format="safetensors",
            skip_tokenizer_init=True,
            dtype=engine.dtype,
            max_model_len=engine.max_model_tokens,
            kv_cache_memory_bytes=int(engine.kv_cache_gib * 2**30 / engine.tensor_parallel),  # on each device
            gpu_memory_utilization=0.01,  # with the cache's size given it decides one thing: whether other workers may be on the GPU before
            max_num_seqs=engine.max_concurrent,
            enforce_eager=engine.eager,
            block_size=32,  # short prompts share prefixes only in whole blocks
            enable_prefix_caching=not carries_state(model),  # what a layer carries along is not in the cache of keys and values
            # A prompt read in parts draws and discards tokens, which vLLM takes back from a seed's generator only on CUDA.
            enable_chunked_prefill=torch.cuda.is_available(),
            logprobs_mode="processed_logprobs",
            weight_transfer_config=WeightTransferConfig(backend=TRANSFER),
            enable_sleep_mode=self._sleeps,
            disable_log_stats=True,
            **self._ranks.settings,
        )
        with self._ranks:
            try:
                self._llm = LLM(**settings)
            except ENGINE_ERRORS as error:
                raise ModelError(f"the rollout engine cannot start with {model!r}: {reason_of(error)}") from error
        self._llm.apply_model(leave_transformers_usable)
        self._llm.init_weight_transfer_engine({"init_info": {}})
        self.pids = self._ranks.ids(self._llm)

    def generate(self, requests: Sequence[Request], sampling: SamplingConfig) -> Completions:
        """Draw one response for each request. Each depends only on its own prompt, seed and the weights (exactly so in fp32)."""
        return self._draw(requests, sampling, logprobs=True)

    def generate_apart(self, requests: Sequence[Request], sampling: SamplingConfig) -> Completions:
        """The same without logprobs, and without prefixes of earlier calls: in bf16, too, the answers depend on this call alone."""
        self._llm.reset_prefix_cache()
        return self._draw(requests, sampling, logprobs=False)

    def rest(self) -> int:
        """Give the device's memory back until the next call: weights to the host, what is cached forgotten (vLLM's sleep level 1).
        On processors nothing happens. Returns 0: vLLM does not say how much it was."""
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = {"weights", "kv_cache"}
        return 0

    def _wake(self, *parts: str) -> None:
        for part in parts:
            if part in self._asleep:
                self._llm.wake_up(tags=[part])
                self._asleep.discard(part)

    def _draw(self, requests: Sequence[Request], sampling: SamplingConfig, *, logprobs: bool) -> Completions:
        from vllm import SamplingParams

        self._wake("weights", "kv_cache")
        began = time.perf_counter()
        params = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                seed=r.seed,
                logprobs=0 if logprobs else None,
                detokenize=False,
                stop_token_ids=self._ends,
            )
            for r in requests
        ]
        with self._ranks.at_work():
            outputs = self._llm.generate([{"prompt_token_ids": list(r.prompt_ids)} for r in requests], params, use_tqdm=False)
        drawn = [o.outputs[0] for o in outputs]
        return Completions(
            [np.array(d.token_ids, dtype=np.int32) for d in drawn],
            [np.array([s[t].logprob for s, t in zip(d.logprobs, d.token_ids, strict=True)] if logprobs else [], np.float32) for d in drawn],
            np.array([d.finish_reason == "stop" for d in drawn]),
            self.version,
            time.perf_counter() - began,
            sum(o.num_cached_tokens or 0 for o in outputs),
        )

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Logprobs, at temperature 1, of all tokens but the first of each sequence, one fp32 array a sequence."""
        from vllm import SamplingParams

        self._wake("weights", "kv_cache")
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        with self._ranks.at_work():
            outputs = self._llm.generate([{"prompt_token_ids": list(ids)} for ids in sequences], params, use_tqdm=False)
        return [
            np.array([step[token].logprob for step, token in zip(o.prompt_logprobs[1:], ids[1:], strict=True)], np.float32)
            for o, ids in zip(outputs, sequences, strict=True)
        ]

    def answer(self, size: int, probe: Sequence[Sequence[int]]) -> tuple[int, list[np.ndarray]]:
        """The size of the weights that it has taken, and the logprobs that prove them; WorkerLost if they have not come whole (0)."""
        if not size:
            raise WorkerLost("new weights have not come whole")
        return size, self.logprobs(probe)

    def load_weights(self, message: WeightMessage) -> None:
        """Replace all weights and forget cached prefixes; raises VersionMismatch if some are missing or the version does not grow."""
        self._await(message.version)
        self._ranks.load(self._llm, message)
        self._loaded(message.version)

    def take(self, bucket: Bucket) -> int:
        """Load a bucket of new weights that lies on this device; the size of all in bytes when they are in use, and 0 before. Also 0 after
        the last one, if all have to come once more."""
        self._await(bucket.version)
        part = taken(bucket)
        self._bytes = part.nbytes + (0 if bucket.first else self._bytes)
        if not self._ranks.load_part(self._llm, part):
            return 0
        self._loaded(bucket.version)
        return self._bytes

    def receive_weights(self, dtype: str, version: int, meeting: Meeting, rank: int) -> int:
        """Load the message that comes next in a group; its size in bytes. WorkerLost if it does not come whole: the old weights stay."""
        message = self._receiver.receive(dtype, version, meeting, rank)
        self.load_weights(message)
        return message.nbytes

    def _await(self, version: int) -> None:
        """Be ready for weights of `version`."""
        if version <= self.version:
            raise VersionMismatch(f"weights of version {version} were published to a sampler that has version {self.version}")
        self._wake("weights")  # the cache when there is something to draw

    def _loaded(self, version: int) -> None:
        self._llm.reset_prefix_cache()
        self.version = version

    def close(self) -> None:
        """End the engine, so that this process can have another."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def leave_imports_alone() -> None:
    """Have garbage collections pass over what is here by now: as it starts, vLLM makes five, and each would look through all imports."""
    if not gc.get_freeze_count():  # vLLM does the same when an engine stands, so that another finds it done
        gc.freeze()


def reason_of(error: BaseException) -> str:
    """The line of an error that says most; pydantic's begin with a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith(("Value error", "Assertion failed"))), lines[0] if lines else "")
    return f"{type(error).__name__}: {told.partition(' [type=')[0][:300]}"
