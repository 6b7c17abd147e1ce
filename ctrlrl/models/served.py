"""Answers over HTTP with vLLM: its asynchronous engine and its chat completions, given prompts of token ids that are rendered elsewhere.

vLLM never sees a message and renders no template: its serving class is handed a renderer that returns the ids that came with the
request. Everything behind the prompt (drawing, text, streaming, logprobs, usage) is vLLM's own.
"""

import asyncio
import gc
import os
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from ctrlrl.errors import ModelError
from ctrlrl.models.architectures import carries_state
from ctrlrl.models.loading import end_token_ids, existing
from ctrlrl.models.proof import proof_of
from ctrlrl.models.sampler import ENGINE_ERRORS, EngineConfig, environment, leave_imports_alone, reason_of

# Text that stands where vLLM's schema wants messages; the prompt is the ids.
_NO_MESSAGES = [{"role": "user", "content": ""}]


@dataclass
class Drawn:
    """What became of a request. prompt_ids: those that the engine says it read."""

    prompt_ids: list[int] = field(default_factory=list)
    completion_tokens: int = 0
    texts: dict[int, str] = field(default_factory=dict)  # by the answer's number
    finish: dict[int, str] = field(default_factory=dict)

    def note(self, output) -> None:
        """Count one of the engine's outputs, whole or the next piece."""
        self.prompt_ids = list(output.prompt_token_ids or self.prompt_ids)
        for answer in output.outputs:
            self.completion_tokens += len(answer.token_ids)
            self.texts[answer.index] = self.texts.get(answer.index, "") + answer.text
            if answer.finish_reason:
                self.finish[answer.index] = answer.finish_reason


class BadField(ValueError):
    """A field whose value vLLM refuses; `param` is its name where vLLM tells it."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class EngineFailed(RuntimeError):
    """The engine has ended, or cannot answer this request."""


class ServedModel:
    """A model that answers many requests at a time; `start`ed and used inside one running event loop. `name`: as clients ask for it."""

    @classmethod
    async def start(cls, model: str, engine: EngineConfig, name: str) -> "ServedModel":
        """An engine that has shown that it answers, and as transformers does; ModelError if it cannot."""
        with _one_thread():
            proof, served = proof_of(model, engine), cls(model, engine, name)
        try:
            given = await served._outcome(proof.probe)
            proof.check(lambda _: given())
        except BaseException:
            served.close()
            raise
        return served

    def __init__(self, model: str, engine: EngineConfig, name: str):
        os.environ.update(environment(engine) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "CTRLRL_SERVER_PID": str(os.getpid())})
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.executor.uniproc_executor import UniProcExecutor

        leave_imports_alone()
        self.name, self.max_model_tokens = name, engine.max_model_tokens
        settings = dict(
            model=existing(model),
            served_model_name=[name],
            load_format="safetensors",
            dtype=engine.dtype,
            max_model_len=engine.max_model_tokens,
            kv_cache_memory_bytes=int(engine.kv_cache_gib * 2**30),
            max_num_seqs=engine.max_concurrent,
            enforce_eager=engine.eager,
            block_size=32,
            enable_prefix_caching=not carries_state(model),
            # A prompt read in parts would draw and discard tokens: a seed must repeat.
            enable_chunked_prefill=torch.cuda.is_available(),
            enable_log_requests=False,
            use_tqdm_on_load=False,
            worker_extension_cls="ctrlrl.models.engine_process.InWorker",
            # By its name ("uni") vLLM refuses it on a CPU and gives the model a third process, which takes turns with the engine's.
            distributed_executor_backend=UniProcExecutor,
        )
        try:
            config = AsyncEngineArgs(**settings).create_engine_config()
            if _may_fork():
                os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # "spawn", which vLLM has just set for CPUs, imports all again
            self._engine = AsyncLLM.from_vllm_config(config)
        except ENGINE_ERRORS as error:
            raise ModelError(f"the serving engine cannot start with {model!r}: {reason_of(error)}") from None
        self._chat, self._request = _chat(self._engine, name, end_token_ids(model))

    async def _outcome(self, probe: Sequence[Sequence[int]]) -> Callable[[], list[np.ndarray]]:
        """A function that returns the logprobs of a probe, or raises RuntimeError where the engine did."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            found = list(await asyncio.gather(*(self._logprobs(i, ids) for i, ids in enumerate(probe))))
            await self._engine.reset_prefix_cache()
        except (*ENGINE_ERRORS, EngineDeadError) as error:
            failed = RuntimeError("it ends at the first request; what it said is above" if self._engine.errored else reason_of(error))
            return partial(_raise, failed)
        return lambda: found

    async def _logprobs(self, number: int, ids: Sequence[int]) -> np.ndarray:
        """As Sampler.logprobs, of one sequence. Where there is room a second token is drawn, since that runs other code than a prompt."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=min(2, self.max_model_tokens - len(ids)), ignore_eos=True, prompt_logprobs=0, detokenize=False)
        async for output in self._engine.generate({"prompt_token_ids": list(ids)}, params, f"proof-{number}"):
            steps = output.prompt_logprobs
        return np.array([step[token].logprob for step, token in zip(steps[1:], ids[1:], strict=True)], np.float32)

    async def answer(self, fields: dict, prompt_ids: Sequence[int], salt: str) -> tuple[dict | AsyncIterator[str], Drawn]:
        """A chat completion as OpenAI's schema has it, or with `stream` its server-sent events, and what is counted meanwhile.

        fields: of the request, without messages and model. salt: only requests with the same one share what is kept of prompts, so that
        the time of an answer tells nothing of others'. BadField for values that vLLM refuses; EngineFailed if the engine does.
        """
        from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMServerError

        try:
            request = self._request(**fields, messages=_NO_MESSAGES, model=self.name)
            request._prompt_ids, request._salt, request._drawn = list(prompt_ids), salt, Drawn()
            found = await self._chat.create_chat_completion(request)
        except (VLLMClientError, ValueError, TypeError, OverflowError) as error:
            raise _refusal(error) from None
        except (VLLMServerError, GracefulHTTPError) as error:
            raise EngineFailed(str(error)[:300]) from error
        if hasattr(found, "error"):
            if found.error.code >= 500:
                raise EngineFailed(found.error.message)
            raise BadField(found.error.message, found.error.param)
        return (found.model_dump(exclude_none=True) if hasattr(found, "model_dump") else found), request._drawn

    @property
    def healthy(self) -> bool:
        """Whether the engine runs."""
        return not self._engine.errored

    def metrics(self) -> bytes:
        """vLLM's gauges and counters in Prometheus' text format."""
        from prometheus_client import generate_latest
        from vllm.v1.metrics.prometheus import get_prometheus_registry

        return generate_latest(get_prometheus_registry())

    def close(self) -> None:
        """End the engine and its process."""
        self._engine.shutdown(timeout=5)
        del self._chat, self._request, self._engine
        gc.collect()  # else vLLM ends it once more when half of Python is gone


def schema_fields() -> frozenset[str]:
    """Every field that vLLM's own server takes in a chat request."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    return frozenset(ChatCompletionRequest.model_fields)


@contextmanager
def _one_thread():
    """torch's threads must not be there when the engine's process is forked: it would wait for them for ever."""
    if hasattr(torch._C, "_cpu") and hasattr(torch._C._cpu, "_init_amx"):
        torch._C._cpu._init_amx()  # else small bf16 matrices die with SIGILL on CPUs with AMX
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _may_fork() -> bool:
    """Whether an engine on a CPU may be a fork of this process: it has no other thread but pyarrow's, which is ready for forks."""
    tasks = Path("/proc/self/task")
    if torch.cuda.is_available() or not tasks.exists():
        return False
    names = [(task / "comm").read_text().strip() for task in tasks.iterdir()]
    return len(names) - names.count("jemalloc_bg_thd") == 1


def _raise(error: Exception):
    raise error


def _refusal(error: Exception) -> BadField:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = first["loc"][0] if first["loc"] else None
        return BadField(f"{place or 'request'}: {first['msg']}", place if isinstance(place, str) else None)
    named = re.match(r"`?([a-z_]+)`?\b", str(error))  # vLLM's messages begin with the field where they do not name it otherwise
    return BadField(str(error)[:300], getattr(error, "parameter", None) or (named[1] if named and "_" in named[1] else None))


def _chat(engine, name: str, ends: Sequence[int]):
    """vLLM's chat completions over prompts of ids, and the type of its requests."""
    from pydantic import PrivateAttr
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.inputs.engine import tokens_input

    class Request(ChatCompletionRequest):
        _prompt_ids: list = PrivateAttr(default_factory=list)
        _salt: str = PrivateAttr(default="")
        _drawn: Drawn = PrivateAttr(default_factory=Drawn)

    class Rendered:
        """In the place of vLLM's renderer of messages."""

        async def render_chat(self, request):
            return [], [tokens_input(request._prompt_ids, cache_salt=request._salt)]

    async def noted(outputs, drawn: Drawn):
        async for output in outputs:
            drawn.note(output)
            yield output

    class Chat(OpenAIServingChat):
        def chat_completion_stream_generator(self, request, result_generator, *rest, **options):
            return super().chat_completion_stream_generator(request, noted(result_generator, request._drawn), *rest, **options)

        async def chat_completion_full_generator(self, request, result_generator, *rest, **options):
            outputs = noted(result_generator, request._drawn)
            return await super().chat_completion_full_generator(request, outputs, *rest, **options)

    models = OpenAIServingModels(engine_client=engine, base_model_paths=[BaseModelPath(name=name, model_path=name)])
    chat = Chat(
        engine, models, "assistant", online_renderer=Rendered(), request_logger=None, chat_template=None,
        chat_template_content_format="auto",
    )  # fmt: skip
    stops = list(dict.fromkeys([*(chat.default_sampling_params.get("stop_token_ids") or []), *ends]))
    chat.default_sampling_params["stop_token_ids"] = stops
    return chat, Request
