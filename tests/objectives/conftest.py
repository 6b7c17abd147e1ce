"""Cutting a batch of ragged rows into micro-batches, and adding up what a loss returns for them."""
import pytest
import torch

from ctrlrl.data.batches import MicroBatch, TokenOutputs


def padded(rows, width, fill):
    return torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=fill) for row in rows])


@pytest.fixture
def cut():
    """cut(loss, rows, size): total loss, total stats and the gradient of every row, `size` rows a micro-batch.

    A row is (logprobs: 1-D leaf tensor, columns: dict of numbers). extra: additional padding; garbage: what lies in it.
    """

    def run(loss, rows, size, extra=0, garbage=0.0):
        tokens, total, stats = sum(len(logprobs) for logprobs, _ in rows), 0.0, {}
        for logprobs, _ in rows:
            logprobs.grad = None
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            width = max(len(logprobs) for logprobs, _ in chunk) + extra
            outputs = padded([logprobs for logprobs, _ in chunk], width, garbage)
            mask = padded([torch.ones(len(logprobs)) for logprobs, _ in chunk], width, 0.0).bool()
            columns = {name: torch.tensor([row[name] for _, row in chunk], dtype=outputs.dtype) for name in rows[0][1]}
            share, share_stats = loss(TokenOutputs(outputs, -outputs.detach()), MicroBatch(mask, columns, tokens, len(rows)))
            share.backward()
            total += share.item()
            for name, value in share_stats.items():
                assert not value.requires_grad, name
                stats[name] = stats.get(name, 0.0) + value.item()
        return total, stats, [logprobs.grad.clone() for logprobs, _ in rows]

    return run


@pytest.fixture
def rows():
    """rows(lengths, **columns): random logprobs of the given lengths; a column is a list with a number for each row."""

    def make(lengths, seed=0, **columns):
        generator = torch.Generator().manual_seed(seed)
        logprobs = [-3 * torch.rand(n, generator=generator, dtype=torch.float64) for n in lengths]
        return [(row.requires_grad_(), {name: column[i] for name, column in columns.items()}) for i, row in enumerate(logprobs)]

    return make


@pytest.fixture
def same_however_cut(cut):
    """Assert that cut, padding and order of groups change neither loss nor stats nor gradients."""

    def check(loss, rows, sizes, group=1):
        total, stats, grads = cut(loss, rows, len(rows))
        groups = [list(range(i, i + group)) for i in range(0, len(rows), group)]
        shuffled = [i for g in torch.randperm(len(groups), generator=torch.Generator().manual_seed(1)).tolist() for i in groups[g]]
        for size in sizes:
            for extra, garbage in [(0, 0.0), (3, 0.0), (2, float("nan")), (1, 1e4)]:
                for order in (list(range(len(rows))), shuffled):
                    found, found_stats, found_grads = cut(loss, [rows[i] for i in order], size, extra, garbage)
                    assert found == pytest.approx(total, rel=1e-12)
                    assert found_stats == pytest.approx(stats, rel=1e-12, abs=1e-15)
                    for i, grad in zip(order, found_grads, strict=True):
                        assert torch.allclose(grad, grads[i], rtol=1e-12, atol=1e-15)

    return check
