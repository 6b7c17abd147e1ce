"""The clipped losses against hand-worked numbers, loops and their limits, however the batch is cut."""
import math

import pytest
import torch

from ctrlrl.data.batches import MicroBatch, TokenOutputs, ValueOutputs
from ctrlrl.errors import RecipeError
from ctrlrl.ppo.loss import explained_variance, importance_weights, policy_loss, value_loss

NAN = float("nan")


def padded(rows, width, fill=0.0):
    return torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=fill) for row in rows])


def cut(loss, kind, rows, size, extra=0, garbage=0.0, **options):
    """Sum the shares over micro-batches of `size` rows; the gradient ends in the rows' first tensors.

    A row is a list of 1-D tensors: the model's first, then (for a policy) the entropy, then the columns.
    """
    names, outputs = (["old_logprobs", "advantages"], 2) if kind is TokenOutputs else (["old_values", "returns"], 1)
    names = [*names, "weights", "ref_logprobs"][: len(rows[0]) - outputs]
    tokens, total, stats = sum(len(row[0]) for row in rows), 0.0, {}
    for row in rows:
        row[0].grad = None
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        width = max(len(row[0]) for row in chunk) + extra
        columns = [padded(column, width, garbage) for column in zip(*chunk, strict=True)]
        mask = padded([torch.ones(len(row[0])) for row in chunk], width).bool()
        batch = MicroBatch(mask, dict(zip(names, columns[outputs:], strict=True)), tokens, len(rows))
        share, share_stats = loss(kind(*columns[:outputs]), batch, **options)
        share.backward()
        total += share.item()
        for name, value in share_stats.items():
            assert not value.requires_grad
            stats[name] = max(stats.get(name, 0.0), value.item()) if name.endswith("_max") else stats.get(name, 0.0) + value.item()
    return total, stats, [row[0].grad.clone() for row in rows]


def random_rows(lengths, columns, spread=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [[spread * torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(columns)] for n in lengths]
    for row in rows:
        row[0].requires_grad_()
    return rows


def policy_row(new, old, advantages, entropy=None):
    row = [torch.tensor(column, dtype=torch.float64) for column in (new, entropy or [0.0] * len(new), old, advantages)]
    return [row[0].requires_grad_(), *row[1:]]


def value_row(values, old, returns):
    row = [torch.tensor(column, dtype=torch.float64) for column in (values, old, returns)]
    return [row[0].requires_grad_(), *row[1:]]


def test_policy_loss_by_hand():
    # Ratios 1.5, 1.5, 0.5, 0.5, 1.1 with ε = 0.2. min(ρA, clip(ρ)A): 1.2, -1.5, 0.5, -0.8, 2.2; their sum is 1.6.
    row = policy_row([math.log(r) for r in (1.5, 1.5, 0.5, 0.5, 1.1)], [0.0] * 5, [1.0, -1.0, 1.0, -1.0, 2.0], [0.1, 0.2, 0.3, 0.4, 0.5])
    loss, stats, (grad,) = cut(policy_loss, TokenOutputs, [row], 1)
    assert loss == pytest.approx(-1.6 / 5)
    # d(ρA)/d log π = ρA where the clip does not act, else 0.
    assert grad.tolist() == pytest.approx([0, 1.5 / 5, -0.5 / 5, 0, -2.2 / 5])
    log_ratios = [math.log(r) for r in (1.5, 1.5, 0.5, 0.5, 1.1)]
    assert stats == pytest.approx({
        "ratio_mean": 5.1 / 5, "ratio_max": 1.5, "clip_fraction": 4 / 5, "entropy": 0.3,
        "approx_kl_k1": -sum(log_ratios) / 5, "approx_kl_k3": (5.1 - 5 - sum(log_ratios)) / 5,
    })


@pytest.mark.parametrize("clip", [0.1, 0.2, 0.5])
def test_policy_loss_equals_a_loop(clip):
    rows = random_rows([4, 1, 6], 4)
    loss, stats, _ = cut(policy_loss, TokenOutputs, rows, 3, clip=clip)
    terms, clipped = [], 0
    for new, _, old, advantages in rows:
        for n, o, a in zip(new.tolist(), old.tolist(), advantages.tolist(), strict=True):
            ratio = math.exp(n - o)
            terms.append(min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a))
            clipped += abs(ratio - 1) > clip
    assert loss == pytest.approx(-sum(terms) / 11) and stats["clip_fraction"] == pytest.approx(clipped / 11)
    assert 0 < clipped < 11


def test_first_minibatch_is_the_plain_policy_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, generator=generator, dtype=torch.float64).requires_grad_()
    actions, advantages = torch.tensor([5, 0, 2, 2]), torch.randn(4, generator=generator, dtype=torch.float64)
    logprobs = logits.log_softmax(-1)[torch.arange(4), actions]
    batch = MicroBatch(torch.ones(1, 4, dtype=torch.bool), {"old_logprobs": logprobs.detach()[None], "advantages": advantages[None]}, 4, 1)
    loss, stats = policy_loss(TokenOutputs(logprobs[None], torch.zeros(1, 4, dtype=torch.float64)), batch)
    assert stats["ratio_mean"] == stats["ratio_max"] == 1 and stats["clip_fraction"] == 0
    assert stats["approx_kl_k1"] == stats["approx_kl_k3"] == 0
    # ∇ -(1/4) Σ A log π with the softmax's gradient written out: -(A/4) (onehot - p).
    expected = -(advantages / 4)[:, None] * (torch.nn.functional.one_hot(actions, 6) - logits.detach().softmax(-1))
    assert torch.allclose(torch.autograd.grad(loss, logits)[0], expected, atol=1e-12)


def test_a_wide_clip_range_leaves_the_unclipped_objective():
    rows = random_rows([3, 2], 4, spread=2.0)
    loss, stats, _ = cut(policy_loss, TokenOutputs, rows, 2, clip=1e6)
    assert loss == pytest.approx(-sum(((new - old).exp() * a).sum().item() for new, _, old, a in rows) / 5)
    assert stats["clip_fraction"] == 0


def test_approximate_kl_is_of_the_old_policy_from_the_new():
    old, new = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    exact = sum(p * math.log(p / q) for p, q in zip(old.tolist(), new.tolist(), strict=True))
    # Ten tokens in the proportions of the old policy: the sample mean is the expectation.
    tokens = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    row = policy_row(new.log()[tokens].tolist(), old.log()[tokens].tolist(), [0.0] * 10)
    _, stats, _ = cut(policy_loss, TokenOutputs, [row], 1)
    assert stats["approx_kl_k1"] == pytest.approx(exact, rel=1e-5) and stats["approx_kl_k3"] == pytest.approx(exact, rel=1e-5)


def test_a_ratio_beyond_float32_gives_no_nan():
    row = [torch.tensor(x) for x in ([0.0, 0.0, -200.0], [0.0] * 3, [-200.0, -200.0, 0.0], [0.0, 1.0, 1.0])]
    row[0].requires_grad_()
    loss, stats, (grad,) = cut(policy_loss, TokenOutputs, [row], 1)
    assert loss == pytest.approx(-1.2 / 3) and grad.isfinite().all() and stats["ratio_max"] == pytest.approx(math.exp(20), rel=1e-5)
    assert all(math.isfinite(value) for value in stats.values())


def test_ordinary_ratios_are_not_cut():
    row = policy_row([19.0], [0.0], [-1.0])
    loss, _, (grad,) = cut(policy_loss, TokenOutputs, [row], 1)
    assert loss == pytest.approx(math.exp(19)) and grad.item() == pytest.approx(math.exp(19))


def slowly(rows, low, high, ratio, mean, length, beta):
    """The policy loss by loops over sequences and tokens."""
    of_sequences, tokens = [], 0
    for new, _, old, advantages, weights, reference in rows:
        terms, logs = [], [n - o for n, o in zip(new.tolist(), old.tolist(), strict=True)]
        for log, n, a, w, r in zip(logs, new.tolist(), advantages.tolist(), weights.tolist(), reference.tolist(), strict=True):
            rho = math.exp(sum(logs) / len(logs) if ratio == "sequence" else log)
            k3 = math.exp(r - n) - 1 - (r - n)
            terms.append(-w * min(rho * a, min(max(rho, 1 - low), 1 + high) * a) + beta * k3)
        of_sequences.append(terms)
        tokens += len(terms)
    total = sum(sum(terms) for terms in of_sequences)
    return {
        "token": total / tokens,
        "sequence": sum(sum(terms) / len(terms) for terms in of_sequences) / len(rows),
        "fixed": total / (len(rows) * length),
    }[mean]


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("mean", ["token", "sequence", "fixed"])
@pytest.mark.parametrize(("clip", "beta"), [((0.1, 0.3), 0.0), ((0.2, 0.2), 0.5)])
def test_every_form_of_the_policy_loss_equals_a_loop_however_it_is_cut(ratio, mean, clip, beta):
    rows = random_rows([4, 1, 6], 6)
    for row in rows:
        row[4] = row[4].exp()  # weights are not negative
    expected = slowly(rows, *clip, ratio, mean, 8, beta)
    options = {"clip": clip, "ratio": ratio, "mean": mean, "length": 8, "beta": beta}
    whole, stats, grads = cut(policy_loss, TokenOutputs, rows, 3, **options)
    assert whole == pytest.approx(expected, rel=1e-12) and ("kl_loss" in stats) == bool(beta)
    for size, extra, garbage in [(1, 0, 0.0), (2, 3, NAN)]:
        found, _, found_grads = cut(policy_loss, TokenOutputs, rows, size, extra, garbage, **options)
        assert found == pytest.approx(expected, rel=1e-12)
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(grads, found_grads, strict=True))


def test_two_clip_bounds_by_hand():
    # Ratios 1.25 and 0.85 within [0.8, 1.3], where A = 1 and A = -1 earn them whole; with high = 0.2 the first earns 1.2.
    row = policy_row([math.log(1.25), math.log(0.85)], [0.0, 0.0], [1.0, -1.0])
    loss, stats, _ = cut(policy_loss, TokenOutputs, [row], 1, clip=(0.2, 0.3))
    assert loss == pytest.approx(-(1.25 - 0.85) / 2) and stats["clip_fraction"] == 0
    loss, stats, _ = cut(policy_loss, TokenOutputs, [row], 1, clip=(0.1, 0.2))
    assert loss == pytest.approx(-(1.2 - 0.9) / 2) and stats["clip_fraction"] == 1


def test_the_sequences_ratio_is_the_geometric_mean_and_its_gradient_that_of_every_token():
    # Ratios 4 and 1: their geometric mean is 2, within no clip. -(1/2) Σ s A with A = 1 and 3 is -4; d s / d log π_t = s / 2.
    row = policy_row([math.log(4), 0.0], [0.0, 0.0], [1.0, 3.0])
    loss, stats, (grad,) = cut(policy_loss, TokenOutputs, [row], 1, clip=9.0, ratio="sequence")
    assert loss == pytest.approx(-4) and stats["ratio_mean"] == pytest.approx(2)
    assert grad.tolist() == pytest.approx([-2.0, -2.0])


@pytest.mark.parametrize("wrong", [{"ratio": "word"}, {"mean": "median"}, {"mean": "fixed"}])
def test_a_form_of_the_loss_that_is_not_known_is_refused(wrong):
    with pytest.raises(RecipeError, match="is not known: give"):
        cut(policy_loss, TokenOutputs, random_rows([2], 4), 1, **wrong)


def test_importance_weights_by_hand():
    # π₀ / β = 0.5, 4 and 1; capped at 2 they are 0.5, 2 and 1: sum 3.5, squares 5.25.
    behaviour, mask = torch.zeros(2, 2, dtype=torch.float64), torch.tensor([[True, True], [True, False]])
    proximal = torch.tensor([[math.log(0.5), math.log(4)], [0.0, NAN]], dtype=torch.float64)
    weights, stats = importance_weights(proximal, behaviour, mask, cap=2.0)
    assert weights[mask].tolist() == pytest.approx([0.5, 2.0, 1.0])
    assert stats == pytest.approx({
        "correction/mean": 3.5 / 3, "correction/max": 4.0, "correction/capped": 1 / 3, "correction/ess": 3.5**2 / 5.25 / 3,
    })
    same, stats = importance_weights(proximal, proximal, mask, cap=2.0)
    assert same[mask].tolist() == [1, 1, 1] and stats["correction/ess"] == stats["correction/mean"] == 1


def test_policy_gradcheck():
    rows = random_rows([5], 4)
    mask = torch.tensor([[True] * 4 + [False]])
    batch = MicroBatch(mask, {"old_logprobs": rows[0][2][None], "advantages": rows[0][3][None]}, 4, 1)
    x = rows[0][0].detach()[None].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: policy_loss(TokenOutputs(x, torch.zeros_like(x)), batch)[0], (x,))


def test_value_loss_by_hand():
    # Clipped to 0.7, 0.7, 0.1 and -0.2 (ε = 0.2): max(1, 0.49), max(0, 0.09), 0.81 in range, max(0.25, 0.09).
    row = value_row([1.0, 1.0, 0.1, -1.0], [0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 1.0, -0.5])
    loss, stats, (grad,) = cut(value_loss, ValueOutputs, [row], 1)
    assert loss == pytest.approx(0.5 * (1 + 0.09 + 0.81 + 0.25) / 4)
    # factor 2 (v - G) / 4 where the plain error counts; 0 where the clipped one does, since it does not move with v.
    assert grad.tolist() == pytest.approx([0.25, 0, -0.225, -0.125])
    expected = {"value_loss": loss, "value_clip_fraction": 3 / 4, "value_mean": 1.1 / 4, "value_error_sq": (1 + 0 + 0.81 + 0.25) / 4}
    assert stats == pytest.approx(expected)


@pytest.mark.parametrize(("clip", "factor"), [(0.2, 0.5), (0.1, 1.0), (0.5, 0.25)])
def test_value_loss_equals_a_loop(clip, factor):
    rows = random_rows([4, 1, 6], 3)
    loss, stats, _ = cut(value_loss, ValueOutputs, rows, 3, clip=clip, factor=factor)
    terms, clipped = [], 0
    for values, old, returns in rows:
        for v, o, g in zip(values.tolist(), old.tolist(), returns.tolist(), strict=True):
            near = min(max(v, o - clip), o + clip)
            terms.append(max((v - g) ** 2, (near - g) ** 2))
            clipped += abs(v - o) > clip
    assert loss == pytest.approx(factor * sum(terms) / 11) and stats["value_clip_fraction"] == pytest.approx(clipped / 11)


def test_one_token_at_the_edge_of_the_range():
    # A move of exactly ε is not clipped.
    loss, stats, (grad,) = cut(value_loss, ValueOutputs, [value_row([1.25], [1.0], [0.25])], 1, clip=0.25, factor=1.0)
    assert loss == 1 and grad.item() == 2 and stats["value_clip_fraction"] == 0


def test_value_loss_at_the_old_values_is_the_mean_squared_error():
    rows = random_rows([3, 5], 3)
    for row in rows:
        row[1] = row[0].detach().clone()
    loss, stats, grads = cut(value_loss, ValueOutputs, rows, 2, factor=0.5)
    assert loss == pytest.approx(0.5 * stats["value_error_sq"]) and stats["value_clip_fraction"] == 0
    for (values, _, returns), grad in zip(rows, grads, strict=True):
        assert torch.allclose(grad, (values.detach() - returns) / 8)


def test_value_gradcheck():
    rows = random_rows([5], 3)
    batch = MicroBatch(torch.tensor([[True] * 4 + [False]]), {"old_values": rows[0][1][None], "returns": rows[0][2][None]}, 4, 1)
    x = rows[0][0].detach()[None].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: value_loss(ValueOutputs(x), batch)[0], (x,))


@pytest.mark.parametrize(("loss", "kind", "columns"), [(policy_loss, TokenOutputs, 4), (value_loss, ValueOutputs, 3)])
def test_the_cut_the_padding_and_the_order_do_not_matter(loss, kind, columns):
    rows = random_rows([3, 1, 4, 1, 5, 9, 2, 6], columns)
    total, stats, grads = cut(loss, kind, rows, 8)
    order = [6, 2, 7, 0, 4, 1, 5, 3]
    for size, extra, garbage in [(1, 0, 0.0), (3, 0, 0.0), (8, 4, 0.0), (3, 2, NAN), (8, 1, 1e4)]:
        for chosen in (list(range(8)), order):
            found, found_stats, found_grads = cut(loss, kind, [rows[i] for i in chosen], size, extra, garbage)
            assert found == pytest.approx(total, rel=1e-12) and found_stats == pytest.approx(stats, rel=1e-12)
            for i, grad in zip(chosen, found_grads, strict=True):
                assert torch.allclose(grad, grads[i], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("tokens", [0, 10])
@pytest.mark.parametrize("shape", [(2, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("garbage", [NAN, 0.0])
def test_all_masked_is_zero_and_still_differentiable(shape, tokens, garbage):
    mask = torch.zeros(shape, dtype=torch.bool)
    columns = {name: torch.full(shape, NAN) for name in ("advantages", "old_values", "returns")}
    columns["old_logprobs"] = torch.full(shape, garbage)
    batch = MicroBatch(mask, columns, tokens, 2)
    for loss, kind in ((policy_loss, lambda x: TokenOutputs(x, x.detach())), (value_loss, ValueOutputs)):
        x = torch.full(shape, garbage).requires_grad_()
        share, stats = loss(kind(x), batch)
        share.backward()
        assert share.item() == 0 and all(value.item() == 0 for value in stats.values())
        assert torch.equal(x.grad, torch.zeros(shape))


def test_explained_variance():
    mask = torch.tensor([[True, True], [True, False]])
    returns = torch.tensor([[1.0, 2.0], [6.0, NAN]])  # variance 14/3
    assert explained_variance(returns.clone(), returns, mask).item() == explained_variance(returns / 10, returns / 10, mask).item() == 1
    assert explained_variance(torch.full((2, 2), 3.0), returns, mask).item() == pytest.approx(0)
    # A constant offset explains as much: errors 1, 1, 4 have variance 2.
    assert explained_variance(torch.tensor([[0.0, 1.0], [2.0, NAN]]), returns, mask).item() == pytest.approx(1 - 2 / (14 / 3))
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(-3)
    for constant in (returns * 0 + 0.1, returns * NAN):
        found = explained_variance(returns, constant, mask if constant[0, 0] == constant[0, 0] else mask & False)
        assert found.item() == 0
