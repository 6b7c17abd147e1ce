"""Packed rows on a GPU: PyTorch's variable-length flash attention against attention written out, and against padded rows with sdpa."""

import numpy as np
import pytest
import torch

from ctrlrl.models import segments
from ctrlrl.models.forward import lay_out
from ctrlrl.models.scorer import ReferenceConfig, ReferenceModel
from tests.models.test_forward import BATCH, COMMON

pytestmark = pytest.mark.cuda
CPU = torch.device("cpu")


@pytest.fixture
def flashes(device, monkeypatch):
    """How often the flash kernel was taken; at the end it must have been, on a GPU."""
    calls, kernel = [], segments._flash_attention
    monkeypatch.setattr(segments, "_flash_attention", lambda *given: calls.append(1) or kernel(*given))
    yield calls
    assert bool(calls) == (device.type == "cuda")


@pytest.mark.parametrize("batch", [BATCH, COMMON], ids=["apart", "common"])
@pytest.mark.parametrize("window", [None, 7])
def test_packed_attention_is_that_in_float64_forward_and_backward(device, flashes, window, batch):
    def attention(place, dtype):
        row = lay_out(batch, "shared", place).segments
        generator = torch.Generator().manual_seed(0)
        given = [torch.randn(1, heads, sum(row.lengths), 32, generator=generator) for heads in (4, 2, 2)]
        q, k, v = (x.to(place, dtype).requires_grad_() for x in given)
        out = segments._segment_attention(None, q, k, v, segments.Pattern(row, window=window), scaling=0.3)[0]
        weights = torch.randn(out.shape, generator=generator)
        (out * weights.to(place, dtype)).sum().backward()
        return [x.detach().to(CPU, torch.float64) for x in (out, q.grad, k.grad, v.grad)]

    for found, wanted in zip(attention(device, torch.bfloat16), attention(CPU, torch.float64), strict=True):
        assert (found - wanted).abs().mean() < 0.02 * wanted.abs().mean()  # one rounding of bfloat16 is .004
        assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["policy", "tied"])
def test_packed_and_padded_rows_are_equally_near_to_float32(device, flashes, models, kind):
    def logprobs(layout, dtype="bfloat16"):
        model = ReferenceModel(models[kind], ReferenceConfig(layout=layout, dtype=dtype), 0.7)
        assert model.device.type == device.type
        return np.concatenate([row for batch in (BATCH, COMMON) for row in model.logprobs(batch)])

    exact = logprobs("padded", "float32")
    errors = {layout: np.abs(logprobs(layout) - exact).mean() for layout in ("auto", "packed", "padded")}
    assert 0 < errors["padded"] < 0.035 * np.abs(exact).mean()
    assert max(errors["auto"], errors["packed"]) < 1.5 * errors["padded"], errors
