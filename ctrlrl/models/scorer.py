"""Frozen models: reward models (text in, score out) and the reference model (tokens in, logprobs out)."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from ctrlrl.config import Section
from ctrlrl.data.batches import TokenBatch, plan_micro_batches
from ctrlrl.data.calibration import Calibration, load_calibration
from ctrlrl.errors import DataError
from ctrlrl.models.conversations import encode_conversation, longest_input
from ctrlrl.models.engine_judge import EngineJudge
from ctrlrl.models.fingerprint import model_fingerprint
from ctrlrl.models.forward import PolicyModule
from ctrlrl.models.http_scorer import HttpConfig, HttpScorer
from ctrlrl.models.judge import EndpointJudge, JudgeConfig
from ctrlrl.models.layout import Layout, settle
from ctrlrl.models.loading import check_reward_model, load_policy, load_reward_model, load_tokenizer, reads_token_types
from ctrlrl.models.pooling import check_scores_alone, raw_scores
from ctrlrl.models.python_scorer import PythonScorer, named
from ctrlrl.models.reading import label_index
from ctrlrl.models.sampler import EngineConfig
from ctrlrl.models.scorer_names import JUDGE, is_classifier, is_python, is_service
from ctrlrl.models.service import Service
from ctrlrl.models.trainer import score_rows
from ctrlrl.models.vocabulary import embedding_rows
from ctrlrl.models.weights import cast_parameters
from ctrlrl.prompts import Messages
from ctrlrl.tensors import pad_rows


class ScorerConfig(Section):
    """What scores answers: a reward model. calibration: how its raw output becomes a score in [0, 1]; `quantile` reads it from
    calibration_file.

    In the place of model: python = "file.py:function", a function (see models.python_scorer); http = "https://…", or a section of that
    name, a service (see models.http_scorer); or a section judge, an LLM (see models.judge). What these give are scores already.
    label: of a classifier of several labels (`toxic`, `REJECTION`), the one whose probability is the score. inverted: the score is 1 minus
    that, as of a model of harm where harmlessness is asked for.
    """

    model: str
    label: str = Field("", exclude_if=lambda label: not label)  # not in the recipes of models with one output
    inverted: bool = Field(False, exclude_if=lambda inverted: not inverted)
    http: HttpConfig | None = Field(None, exclude_if=lambda http: http is None)
    judge: JudgeConfig | None = Field(None, exclude_if=lambda judge: judge is None)
    dtype: Literal["float32", "bfloat16"] = "float32"
    calibration: Literal["sigmoid", "identity", "quantile"] = "sigmoid"
    calibration_file: str = ""
    max_length: int = Field(1024, gt=0)
    batch_tokens: int = Field(16384, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _other_kinds(cls, given):
        """What scores in the place of a model; its numbers are scores already."""
        kinds = [kind for kind in ("python", "http", "judge") if given.get(kind) is not None] if isinstance(given, dict) else []
        if not kinds:
            return given
        if len(kinds) > 1:
            raise ValueError(f"give one of {' and '.join(kinds)}")
        rest, kind = dict(given), kinds[0]
        if kind == "python":
            if "model" in rest:
                raise ValueError("give model or python, one of both")
            rest["model"] = named(str(rest.pop("python")))
        elif kind == "http" and isinstance(given["http"], str):
            rest["http"] = {"url": given["http"]}
        return {"calibration": "identity", "model": "", **rest}

    @model_validator(mode="after")
    def _is_of_one_kind(self):
        if self.service:
            if self.model not in ("", self.service.name):  # as a stored recipe has it
                raise ValueError(f"give model or {'http' if self.http else 'judge'}, one of both")
            object.__setattr__(self, "model", self.service.name)
        elif is_service(self.model) or self.model.startswith(JUDGE):
            raise ValueError(f"{self.model!r} is no reward model: give an address as http, an LLM as judge.model")
        if self.label and not is_classifier(self.model):
            raise ValueError("label is of a classifier of several labels: leave it out")
        if self.inverted and not is_classifier(self.model):
            raise ValueError("inverted is of a reward model: have a function, a service or a judge score the other way round")
        return self

    @property
    def service(self) -> HttpConfig | JudgeConfig | None:
        """The section of what scores, where that is neither a reward model nor a function."""
        return self.http or self.judge

    @property
    def engine(self) -> EngineConfig | None:
        """That of a judge which runs here; None for all else."""
        return self.judge.engine if self.judge and not self.judge.url else None

    @model_validator(mode="after")
    def _quantile_is_stored(self):
        if bool(self.calibration_file) != (self.calibration == "quantile"):
            raise ValueError("calibration = \"quantile\" and calibration_file (of `ctrlrl calibrate`) go together: give both or neither")
        return self

    def load_calibration(self) -> Calibration:
        """The map from raw outputs to scores; raises DataError if a stored one is missing, was changed, or is another model's."""
        calibration = load_calibration(self.calibration_file) if self.calibration_file else Calibration(self.calibration)
        if calibration.model and calibration.model != self.content_sha256():
            raise DataError(
                f"{self.calibration_file} was fitted on the outputs of another reward model than {self.model!r}: score answers with this "
                "one (ctrlrl score), and calibrate anew"
            )
        return calibration

    def check(self) -> None:
        """ModelError or DataError if this cannot be what scores answers. Reads no weights; a function or a service is tried on two
        conversations."""
        if self.engine:
            EngineJudge(self.judge, self.load_calibration()).check()
        elif self.service:
            make_scorer(self).check()
        else:
            check_reward_model(self.model, self.label)
        self.load_calibration()

    def secret(self) -> str:
        """The key of a service, from the environment; it never becomes part of the configuration. ModelError if it is not there."""
        return self.service.secret() if self.service else ""

    def content_sha256(self) -> str:
        """SHA-256 of what scores the answers: a model's files, a function's source, a service's address and version, a judge's rubric."""
        return self.service.content_sha256() if self.service else model_fingerprint(self.model)

    def fingerprint(self) -> dict:
        """All that the scores depend on, by content."""
        read = {} if self.service else self.model_dump(include={"dtype", "max_length", "label", "inverted"})
        return {"sha256": self.content_sha256(), **read, "calibration": self.load_calibration().content_hash}


def make_scorer(config: ScorerConfig, secret: str | None = None) -> "Scorer | PythonScorer | HttpScorer | EndpointJudge | EngineJudge":
    """What a configuration describes, ready to score. secret: a service's key; None: as this process' environment says."""
    calibration = config.load_calibration()
    if config.engine:
        return EngineJudge(config.judge, calibration).start()
    if config.service:
        service = Service(config.service, config.secret() if secret is None else secret)
        return HttpScorer(config.http, calibration, service) if config.http else EndpointJudge(config.judge, calibration, service)
    return PythonScorer(config.model, calibration) if is_python(config.model) else Scorer(config)


class Scorer:
    """A reward model with its own tokenizer and chat template. It gets text and never sees control tokens."""

    def __init__(self, config: ScorerConfig):
        self.config = config
        self.calibration = config.load_calibration()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = load_tokenizer(config.model)
        self.model = load_reward_model(config.model, config.dtype, config.label).to(self.device)
        self._label = label_index(config.model, config.label) if config.label else None
        self._limit = longest_input(config.model, self.tokenizer, config.max_length)
        self._typed = reads_token_types(config.model)
        self._rows = embedding_rows(self.model)
        check_scores_alone(config.model, self.model, self._scores, min(self._limit, 64))

    def score(self, conversations: Sequence[tuple[Messages, str]]) -> np.ndarray:
        """Scores in [0, 1], fp32 [B], of (prompt messages, response text) pairs; independent of batching and padding."""
        return self.calibration(self.raw(conversations)).astype(np.float32)

    def raw(self, conversations: Sequence[tuple[Messages, str]]) -> np.ndarray:
        """The model's own outputs, fp32 [B], before calibration, turned round where they are inverted; DataError for NaN."""
        encoded = [self._encode(messages, response) for messages, response in conversations]
        raw = np.zeros(len(encoded), np.float32)
        lengths = np.array([len(e["input_ids"]) for e in encoded])
        for rows in plan_micro_batches(lengths, self.config.batch_tokens, padded=True):
            raw[rows] = self._scores([encoded[i] for i in rows])
        if np.isnan(raw).any():
            broken = f"{int(np.isnan(raw).sum())} of {raw.size} outputs of the reward model {self.config.model!r}"
            raise DataError(f"{broken} are NaN: its weights are broken, or its dtype overflows")
        if not self.config.inverted:
            return raw
        return 1 - raw if self.calibration.kind == "identity" else -raw  # as log odds are: σ(-x) = 1 - σ(x)

    @torch.no_grad()
    def _scores(self, encoded: list[dict]) -> np.ndarray:
        """The outputs of one micro-batch; token types where a row has them and the model reads them."""
        columns = {name: [np.asarray(row[name], np.int64) for row in encoded] for name in encoded[0]}
        ids, mask = pad_rows(columns["input_ids"]), pad_rows([np.ones(len(row), np.int64) for row in columns["input_ids"]])
        if int(ids.max()) >= self._rows:
            raise DataError(
                f"a conversation holds {self.tokenizer.convert_ids_to_tokens(int(ids.max()))!r}, which {self.config.model!r} cannot read: "
                "its tokenizer has more tokens than its embedding"
            )
        typed = self._typed and "token_type_ids" in columns
        inputs = (ids, mask, pad_rows(columns["token_type_ids"]) if typed else None)
        on_device = (x if x is None else x.to(self.device) for x in inputs)
        return raw_scores(self.model, *on_device, self.model, self._label).cpu().numpy()

    def _encode(self, messages: Messages, response: str) -> dict[str, list[int]]:
        return encode_conversation(self.tokenizer, messages, response, self._limit)


class ReferenceConfig(Section):
    """The frozen reference model of PPO; `model` empty means the policy's own starting weights."""

    model: str = ""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    layout: Layout = "auto"
    batch_tokens: int = Field(16384, gt=0)


class ReferenceModel:
    """A causal LM that never changes: logprobs of scored tokens at the policy's temperature."""

    def __init__(self, model: str, config: ReferenceConfig, temperature: float):
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        module = PolicyModule(load_policy(model, "float32"), temperature).eval().requires_grad_(False)
        self.layout = settle(module, model, config.layout, torch.device("cpu"))  # in float32, where differences are not noise
        cast_parameters(module, config.dtype)
        self.module = module.to(self.device)
        if self.device.type == "cuda":  # with the kernels that it takes there
            self.layout = settle(module, model, self.layout, self.device)

    @torch.no_grad()
    def logprobs(self, batch: TokenBatch) -> list[np.ndarray]:
        """Logprobs of the scored tokens, one fp32 array a row, in the batch's order."""
        rows, results = score_rows(
            lambda inputs: self.module(inputs)[0], batch, self.layout, self.config.batch_tokens, self.device
        )
        return in_order(rows, results)


def in_order(rows: np.ndarray, results: list[np.ndarray]) -> list[np.ndarray]:
    """Results that belong to `rows`, sorted by row."""
    return [results[i] for i in np.argsort(rows, kind="stable")]
