"""Packed and padded layouts give the same outputs and gradients as one sequence at a time; positions are scored by the state before."""

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from ctrlrl.data.batches import TokenBatch, TokenOutputs
from ctrlrl.errors import ModelError
from ctrlrl.models import segments
from ctrlrl.models.forward import PolicyModule, ValueModule, lay_out, micro_batch
from ctrlrl.models.layout import settle
from ctrlrl.models.loading import load_config, load_policy, load_value_model

CPU = torch.device("cpu")


def batch_of(lengths, prompts, seed=0):
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(3, 384, size=n) for n in lengths]
    prompt_lengths = np.array(prompts)
    weights = [rng.normal(size=n - p).astype(np.float32) for n, p in zip(lengths, prompts, strict=True)]
    return TokenBatch(tokens, prompt_lengths, {"weights": weights}, {})


BATCH = batch_of([9, 30, 5, 17], [4, 3, 1, 16])
# Rows 1, 3 and 4 have a prompt of 18 tokens in common, and 4 has nothing after it; 0 and 2 a short one, which is not worth sharing.
COMMON = batch_of([9, 30, 5, 21, 18], [4, 18, 4, 18, 18])
for row in (3, 4):
    COMMON.tokens[row][:18] = COMMON.tokens[1][:18]
COMMON.tokens[2][:4] = COMMON.tokens[0][:4]


def slow_logprobs(model, tokens, prompt, temperature):
    """One sequence, full logits: the token at p is scored by the logits at p - 1."""
    logits = model(input_ids=torch.as_tensor(tokens)[None]).logits[0].double() / temperature
    return torch.stack([logits[p - 1].log_softmax(-1)[tokens[p]] for p in range(prompt, len(tokens))])


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("kind", ["policy", "tied"])
def test_logprobs_and_gradients_equal_one_sequence_at_a_time(models, layout, kind):
    slow_model = load_policy(models[kind], "float32")
    expected = [slow_logprobs(slow_model, t, int(p), 0.7) for t, p in zip(BATCH.tokens, BATCH.prompt_lengths, strict=True)]
    sum((torch.as_tensor(w) * e).sum() for w, e in zip(BATCH.per_token["weights"], expected, strict=True)).backward()

    module = PolicyModule(load_policy(models[kind], "float32"), 0.7)
    assert settle(module, kind, layout, CPU) == layout and not module.full_logits
    inputs = lay_out(BATCH, layout, CPU)
    outputs, micro = TokenOutputs(*module(inputs)), micro_batch(BATCH, inputs, 26, 4)
    assert outputs.logprobs_BT.shape == (4, 27)
    for row, wanted in enumerate(expected):
        assert torch.allclose(outputs.logprobs_BT[row, : len(wanted)].double(), wanted, atol=3e-6)
        assert not outputs.logprobs_BT[row, len(wanted) :].any()
        assert micro.mask_BT[row].sum() == len(wanted)
    (micro.columns["weights"] * outputs.logprobs_BT).sum().backward()
    grads = dict(module.model.named_parameters())
    for name, parameter in slow_model.named_parameters():
        assert torch.allclose(grads[name].grad, parameter.grad, atol=2e-5), name


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_values_read_the_state_before_each_token(models, layout):
    model = load_value_model(models["helpful"], "float32", "sdpa")
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    module = ValueModule(load_value_model(models["helpful"], "float32"))
    assert settle(module, "helpful", layout, CPU) == layout
    module.model.load_state_dict(model.state_dict())
    values_BT = module(lay_out(BATCH, layout, CPU))[0]
    for row, (tokens, prompt) in enumerate(zip(BATCH.tokens, BATCH.prompt_lengths, strict=True)):
        alone = model(input_ids=torch.as_tensor(tokens)[None]).logits[0, :, 0]
        wanted = alone[prompt - 1 : len(tokens) - 1].detach()
        assert torch.allclose(values_BT[row, : len(wanted)], wanted, atol=1e-5)


def test_a_new_value_head_starts_at_zero(models):
    module = ValueModule(load_value_model(models["policy"], "float32", "sdpa"))
    assert not module(lay_out(BATCH, "padded", CPU))[0].any()


def test_later_tokens_and_neighbours_do_not_matter(models):
    module = PolicyModule(load_policy(models["policy"], "float32", segments.SEGMENTS), 1.0)
    alone = module(lay_out(BATCH.select(np.array([1])), "packed", CPU))[0][0, :27]
    among = module(lay_out(BATCH, "packed", CPU))[0][1, :27]
    cut = TokenBatch([BATCH.tokens[1][:20]], np.array([3]), {}, {})
    assert torch.allclose(alone, among, atol=2e-6)
    assert torch.allclose(module(lay_out(cut, "packed", CPU))[0][0], alone[:17], atol=2e-6)


@pytest.mark.parametrize("kind", ["policy", "tied"])
def test_a_shared_prompt_is_computed_once_with_the_same_logprobs_and_gradients(models, kind):
    module = PolicyModule(load_policy(models[kind], "float32"), 0.7)
    assert settle(module, kind, "auto", CPU) == "shared" and not module.full_logits
    found = {}
    for layout in ("packed", "shared"):
        module.zero_grad()
        inputs = lay_out(COMMON, layout, CPU)
        logprobs_BT, entropy_BT = module(inputs)
        (micro_batch(COMMON, inputs, 21, 5).columns["weights"] * logprobs_BT).sum().backward()
        grads = {name: p.grad.clone() for name, p in module.named_parameters()}
        found[layout] = logprobs_BT, entropy_BT, grads, inputs.model["input_ids"].numel()
    assert torch.allclose(found["shared"][0], found["packed"][0], atol=3e-6)
    assert torch.allclose(found["shared"][1], found["packed"][1], atol=3e-6)
    assert all(torch.allclose(grad, found["shared"][2][name], atol=2e-5) for name, grad in found["packed"][2].items())
    assert found["packed"][3] == 83 and found["shared"][3] == 83 - 2 * 18
    inputs = lay_out(COMMON, "shared", CPU)
    assert inputs.segments.lengths == [9, 18, 12, 5, 3] and inputs.segments.prompts == (-1, -1, 1, -1, 1)
    assert inputs.segments.longest == 30


def test_without_a_common_prompt_the_layouts_are_one():
    packed, shared = (lay_out(BATCH, layout, CPU) for layout in ("packed", "shared"))
    assert shared.segments.prompts == () and packed.segments.lengths == shared.segments.lengths
    for name in ("input_ids", "position_ids"):
        assert torch.equal(packed.model[name], shared.model[name])
    assert torch.equal(packed.reads, shared.reads)


@pytest.mark.parametrize("shape", [{"sliding_window": 4}, {"sliding_window": 20}, {"sliding_window": 200}])
def test_a_window_reaches_back_into_a_shared_prompt_by_its_width_alone(shape):
    config = MistralConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **shape
    )
    torch.manual_seed(0)
    module = PolicyModule(MistralForCausalLM(config).float(), 1.0)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    assert settle(module, "mistral", "auto", CPU) == "shared"
    with torch.no_grad():
        found = module(lay_out(COMMON, "shared", CPU))[0]
        module.causal.set_attn_implementation("eager")
        wanted = module(lay_out(COMMON, "padded", CPU))[0]
    assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("batch", [BATCH, COMMON], ids=["apart", "common"])
@pytest.mark.parametrize("window", [None, 7])
def test_the_flash_kernel_of_cuda_is_asked_for_the_same_attention(monkeypatch, window, batch):
    """Its place is taken by what its documentation says, since it runs on a GPU only."""

    def documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
        assert window_size == ((-1, 0) if window is None else (window - 1, 0)) and enable_gqa
        out = torch.empty_like(query)
        for start, end, first, last in zip(cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], cu_seq_k[1:], strict=True):
            q, k, v = query[start:end], key.repeat_interleave(2, 1)[first:last], value.repeat_interleave(2, 1)[first:last]
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            before = (last - first) - (end - start)  # aligned at the end
            hidden = torch.ones(end - start, last - first).triu(1 + int(before)).bool()
            if window_size[0] >= 0:  # so many tokens before a token, and itself
                hidden |= torch.ones_like(hidden).tril(int(before) - window_size[0] - 1)
            out[start:end] = ((q @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)
        return out

    monkeypatch.setattr(segments, "varlen_attn", documented)
    row = lay_out(batch, "shared", CPU).segments
    pattern, generator = segments.Pattern(row, window=window), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, sum(row.lengths), 8, generator=generator) for heads in (4, 2, 2))
    wanted, _ = segments._segment_attention(None, q, k, v, pattern, scaling=0.3)
    assert torch.allclose(segments._flash_attention(q, k, v, 0.3, pattern), wanted, atol=1e-6)


def test_a_kernel_that_fails_costs_speed_and_is_told(models, monkeypatch, caplog):
    def older(*given, **named):  # as with torch 2.11 on a GPU
        raise TypeError("varlen_attn() got an unexpected keyword argument 'enable_gqa'")

    def settled(layout):
        caplog.clear()
        module = PolicyModule(load_policy(models["policy"], "float32"), 1.0)
        return settle(module, "mine", layout, CPU), [record.message for record in caplog.records if record.name == "ctrlrl"]

    assert settled("auto") == ("shared", [])
    monkeypatch.setattr(segments, "_attend", older)
    layout, told = settled("auto")
    assert layout == "padded" and len(told) == 2
    assert all("'mine' runs in the layout padded: " in line and "argument 'enable_gqa'" in line for line in told)
    assert settled("padded") == ("padded", [])
    with pytest.raises(ModelError, match="'mine' cannot be packed .varlen_attn.*enable_gqa"):
        settled("packed")


def test_attention_that_asks_for_more_than_packing_knows_is_refused():
    pattern = segments.Pattern(lay_out(BATCH, "packed", CPU).segments)
    q = torch.ones(1, 2, 61, 8)
    for name, value in (("position_bias", q), ("dropout", 0.1), ("sliding_window", 8)):
        with pytest.raises(ModelError, match=name):
            segments._segment_attention(None, q, q, q, pattern, **{name: value})
    with pytest.raises(ModelError, match="masks in a way of its own"):
        segments._segment_attention(None, q, q, q, None)


@pytest.mark.parametrize("load", [load_policy, load_value_model])
def test_nothing_drops_out_in_training(models, load):
    model = load(models["policy"], "float32").train()
    torch.nn.init.normal_(model.get_parameter("score.weight" if load is load_value_model else "lm_head.weight"))
    ids = torch.arange(3, 40)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("rope", [{"rope_type": "longrope", "original_max_position_embeddings": 17}, {"rope_type": "dynamic"}])
def test_sequences_whose_positions_would_depend_on_the_longest_are_refused(models, rope):
    config = load_config(models["policy"])
    config.max_position_embeddings = 512 if rope["rope_type"] == "longrope" else 17
    config.rope_parameters = {"rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 16, "long_factor": [4.0] * 16, **rope}
    module = PolicyModule(LlamaForCausalLM(config), 1.0)
    for layout in ("packed", "padded"):
        with pytest.raises(ModelError, match="30 tokens.* within 17 tokens"):
            module(lay_out(BATCH, layout, CPU))
    module(lay_out(BATCH.select(np.array([0, 2, 3])), "padded", CPU))
