"""Frozen models: reward models (text in, score out) and the reference model (tokens in, logprobs out)."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from ctrlrl.config import Section
from ctrlrl.data.batches import TokenBatch, plan_micro_batches
from ctrlrl.data.calibration import Calibration, load_calibration
from ctrlrl.models.conversations import encode_conversation, longest_input
from ctrlrl.models.forward import PolicyModule, attention_for
from ctrlrl.models.loading import load_config, load_policy, load_reward_model, load_tokenizer
from ctrlrl.models.trainer import score_rows
from ctrlrl.prompts import Messages


class ScorerConfig(Section):
    """A reward model. calibration: how its raw output becomes a score in [0, 1]; `quantile` reads it from calibration_file."""

    model: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    calibration: Literal["sigmoid", "identity", "quantile"] = "sigmoid"
    calibration_file: str = ""
    max_length: int = Field(1024, gt=0)
    batch_tokens: int = Field(16384, gt=0)

    @model_validator(mode="after")
    def _quantile_is_stored(self):
        if bool(self.calibration_file) != (self.calibration == "quantile"):
            raise ValueError("calibration = \"quantile\" and calibration_file (of `ctrlrl calibrate`) go together: give both or neither")
        return self

    def load_calibration(self) -> Calibration:
        """The map from raw outputs to scores; raises DataError if a stored one is missing or was changed."""
        return load_calibration(self.calibration_file) if self.calibration_file else Calibration(self.calibration)


class Scorer:
    """A reward model with its own tokenizer and chat template. It gets text and never sees control tokens."""

    def __init__(self, config: ScorerConfig):
        self.config = config
        self.calibration = config.load_calibration()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = load_tokenizer(config.model)
        self.model = load_reward_model(config.model, config.dtype).to(self.device)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        self._limit = longest_input(config.model, self.tokenizer, config.max_length)
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = self.tokenizer.pad_token_id

    def score(self, conversations: Sequence[tuple[Messages, str]]) -> np.ndarray:
        """Scores in [0, 1], fp32 [B], of (prompt messages, response text) pairs; independent of batching and padding."""
        return self.calibration(self.raw(conversations)).astype(np.float32)

    @torch.no_grad()
    def raw(self, conversations: Sequence[tuple[Messages, str]]) -> np.ndarray:
        """The model's own outputs, fp32 [B], before calibration."""
        encoded = [self._encode(messages, response) for messages, response in conversations]
        raw = np.zeros(len(encoded), np.float32)
        lengths = np.array([len(e["input_ids"]) for e in encoded])
        for rows in plan_micro_batches(lengths, self.config.batch_tokens, padded=True):
            inputs = self.tokenizer.pad([encoded[i] for i in rows], return_tensors="pt").to(self.device)
            raw[rows] = self.model(**inputs).logits[:, 0].float().cpu().numpy()
        return raw

    def _encode(self, messages: Messages, response: str) -> dict[str, list[int]]:
        return encode_conversation(self.tokenizer, messages, response, self._limit)


class ReferenceConfig(Section):
    """The frozen reference model of PPO; `model` empty means the policy's own starting weights."""

    model: str = ""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    layout: Literal["packed", "padded"] = "packed"
    batch_tokens: int = Field(16384, gt=0)


class ReferenceModel:
    """A causal LM that never changes: logprobs of scored tokens at the policy's temperature."""

    def __init__(self, model: str, config: ReferenceConfig, temperature: float):
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        inner = load_policy(model, config.dtype, attention_for(config.layout, load_config(model)))
        self.module = PolicyModule(inner, temperature).to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def logprobs(self, batch: TokenBatch) -> list[np.ndarray]:
        """Logprobs of the scored tokens, one fp32 array a row, in the batch's order."""
        rows, results = score_rows(
            lambda inputs: self.module(inputs)[0], batch, self.config.layout, self.config.batch_tokens, self.device
        )
        return in_order(rows, results)


def in_order(rows: np.ndarray, results: list[np.ndarray]) -> list[np.ndarray]:
    """Results that belong to `rows`, sorted by row."""
    return [results[i] for i in np.argsort(rows, kind="stable")]
