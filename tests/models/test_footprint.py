"""Memory by hand: of tensors as they come and go, of a tiny Llama's weights, gradients and optimiser by ZeRO stage, of its cache."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from ctrlrl.errors import ModelError, RecipeError
from ctrlrl.models.footprint import _LOGITS, cache_bytes_a_token, frozen, parameters_of, peak, rollout, trained
from ctrlrl.models.forward import PolicyModule
from ctrlrl.models.meter import COUNTED, Meter, forward_peak, row_of, training_peak
from ctrlrl.models.sampler import EngineConfig
from ctrlrl.models.sizes import described, shape_of
from ctrlrl.models.trainer import BUCKET, TrainerConfig

TINY = described("hidden=64,layers=2,heads=4,kv_heads=2,vocabulary=100,intermediate=128")
# embedding and head 100 x 64 each; a layer: q and o 64 x 64, k and v 64 x 32, three of 64 x 128, two norms of 64; a last norm
P = 2 * 6400 + 2 * (2 * 4096 + 2 * 2048 + 3 * 8192 + 128) + 64
HEAD = 6400
# rank 4: 4 x (in + out) of q, k, v, o, gate, up, down
LORA = 2 * 4 * (128 + 96 + 96 + 128 + 192 + 192 + 192)


def test_a_meter_counts_what_is_there_at_once():
    first = torch.empty(10, device="meta")
    with Meter() as meter:
        second = first + 1  # 40 bytes
        view = second.view(2, 5)[0]
        second.add_(1)  # no more of it
        third = second.double()  # 80
        assert (meter.live, meter.peak) == (120, 120)
        del third
        fourth = view * 2  # 20
        assert (meter.live, meter.peak) == (60, 120)
        del second
        assert meter.live == 60  # the view holds it
        del view
        assert meter.live == 20
    assert fourth.shape == (5,)


def test_what_is_saved_for_the_backward_counts_until_then():
    weight = torch.empty(8, 4, device="meta", requires_grad=True)
    weight.grad = torch.empty_like(weight)
    given = torch.empty(3, 8, device="meta")
    with Meter() as meter:
        made = (given @ weight).exp()  # 3 x 4 x 4 bytes each: the product ends, what exp made is kept
        assert (meter.live, meter.peak) == (48, 96)
        made.sum().backward()
    # at most: exp's result, the sum and its gradient (4 each), exp's gradient (48; the expanded one is a view), and that of the weight
    assert meter.peak == 48 + 8 + 48 + 8 * 4 * 4


def policy(config, device, checkpointing=False):
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=COUNTED)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        module = PolicyModule(model, 1.0)
    module.full_logits = False
    return module


def test_without_data_a_module_needs_what_it_needs_with():
    inputs = row_of(96)
    real = type(inputs)(
        {"input_ids": torch.ones(1, 96, dtype=torch.long), "attention_mask": torch.ones(1, 96, dtype=torch.long)},
        torch.arange(95), torch.ones(95, dtype=torch.long), torch.zeros(95, dtype=torch.long), torch.arange(95), (1, 95),
    )  # fmt: skip
    for measure in (training_peak, forward_peak):
        with_data = measure(policy(TINY, "cpu"), real)
        # what is looked up in the rotary frequencies may be made on either side
        assert measure(policy(TINY, "meta"), inputs) == pytest.approx(with_data, rel=0.01)


def test_activations_grow_with_tokens_and_checkpointing_keeps_less():
    peaks = [training_peak(policy(TINY, "meta"), row_of(tokens)) for tokens in (2048, 4096)]
    assert peaks[1] == pytest.approx(2 * peaks[0], rel=0.05)  # no attention scores, which would grow fourfold; logits in chunks
    assert training_peak(policy(TINY, "meta", checkpointing=True), row_of(4096)) < 0.75 * peaks[1]


def parts(phase, **settings):
    found = trained(TINY, "policy", TrainerConfig(micro_batch_tokens=64, **settings), ranks=4 if "zero_stage" in settings else 1)[phase]
    return {part: size for part, size in found.items() if part != "activations"}


def test_what_a_rank_keeps_by_zero_stage():
    assert parameters_of(TINY) == P == 86848
    one = trained(TINY, "policy", TrainerConfig(micro_batch_tokens=64, zero_stage=0, dtype="float32"), ranks=1)
    assert {k: v for k, v in one["backward"].items() if k != "activations"} == {
        "weights": 4 * P, "gradients": 4 * P, "optimiser": 8 * P, "buffers": 0
    }  # fmt: skip
    assert one["score"]["gradients"] == 0 and one["step"]["buffers"] == 4 * P  # the gradients flat, for the reduction
    assert peak(one) == sum(one["backward"].values())
    assert parts("backward", zero_stage=1) == {"weights": 2 * P, "gradients": 2 * P, "optimiser": 3 * P, "buffers": 2 * BUCKET}
    assert parts("backward", zero_stage=2) == {"weights": 2 * P, "gradients": P // 2, "optimiser": 3 * P, "buffers": 2 * BUCKET}
    # all in four parts; the whole weights, gathered, are less than what DeepSpeed keeps at most
    assert parts("backward", zero_stage=3) == {
        "weights": P // 2, "gradients": P // 2, "optimiser": 3 * P, "buffers": 2 * P + 2 * BUCKET
    }  # fmt: skip
    assert parts("step", zero_stage=2)["gradients"] == P // 2 + (2 + 4) * P // 4  # flat, then in float32


def test_adapters_alone_have_gradients_and_moments():
    lora = parts("backward", dtype="float32", lora={"rank": 4}, zero_stage=0)
    assert lora == {"weights": 4 * (P + LORA), "gradients": 4 * LORA, "optimiser": 8 * LORA, "buffers": 0}


def test_frozen_models_and_engines():
    reward = frozen(TINY, "reward", "bfloat16", 64)["score"]
    assert reward["weights"] == 2 * (P - HEAD + 64)  # one output in place of the head
    assert frozen(TINY, "reference", "float32", 64)["score"]["weights"] == 4 * P
    assert cache_bytes_a_token(TINY, EngineConfig()) == 2 * 2 * 2 * 16 * 2  # layers, keys and values, heads, size of a head, bytes
    engine = rollout(TINY, EngineConfig(kv_cache_gib=2, max_concurrent=10, eager=False))["generate"]
    assert engine["weights"] == 2 * P and engine["cache"] == 2**31 and engine["buffers"] == 2**30
    assert engine["activations"] > _LOGITS * 4 * 10 * 100
    half = rollout(TINY, EngineConfig(kv_cache_gib=2, max_concurrent=10, tensor_parallel=2))["generate"]
    assert half["weights"] == P and half["cache"] == 2**30 and half["activations"] == engine["activations"]
    assert cache_bytes_a_token(TINY, EngineConfig(tensor_parallel=4)) == 2 * cache_bytes_a_token(TINY, EngineConfig())  # two have each head


def test_a_size_is_described_or_read_or_refused(models):
    config, origin = shape_of(models["policy"])
    assert origin == "its config.json" and parameters_of(config) > 0
    assert parameters_of(shape_of("meta-llama/Llama-3.1-8B-Instruct")[0]) == 8_030_261_248
    assert parameters_of(described("1b")) == 1_235_814_400
    with pytest.raises(ModelError, match=r"'\./gone' does not exist.*--sizes policy.model=8b"):
        shape_of("./gone")
    for text in ("9000b", "hidden=64", "hidden=64,layers=2,heads=4,kv_heads=2,vocabulary=100,intermediate=x", "1b,layers=3"):
        with pytest.raises(RecipeError, match="describes no model: give one of 135m, 1b"):
            described(text)
    with pytest.raises(RecipeError, match="hidden must be a multiple of heads"):
        described("hidden=64,layers=2,heads=5,kv_heads=5,vocabulary=100,intermediate=128")
