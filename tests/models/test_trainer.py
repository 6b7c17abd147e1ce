"""DeepSpeed training through the policy's actors equals a plain PyTorch loop at every ZeRO stage, layout, cutting and number of ranks."""

import subprocess
from functools import partial

import numpy as np
import peft
import pytest
import torch

from actors.placement import Resources, reserve
from actors.policy import Policy, PolicyConfig
from actors.value import Value, ValueConfig
from ctrlrl.data.atomic import write_directory
from ctrlrl.data.batches import TokenBatch, TokenOutputs
from ctrlrl.errors import RecipeError, RunError, StorageError
from ctrlrl.models.broadcast import Meeting
from ctrlrl.models.forward import PolicyModule, lay_out, micro_batch
from ctrlrl.models.handover import taken
from ctrlrl.models.loading import load_policy
from ctrlrl.models.trainer import TrainerConfig, combine_shares, learning_rate_at
from ctrlrl.objectives.likelihood import likelihood
from ctrlrl.ppo.loss import policy_loss, policy_value_loss, value_loss

# Twenty optimiser steps of ragged batches, one sequence for two ranks among them; ranks and stages must agree after all of them.
HALF = 17  # steps before the checkpoint
STEPS = [np.arange(0, 5), np.arange(5, 11), np.array([2, 3, 5, 7, 8, 10]), np.array([9]), np.arange(11)] * 4
LOSS = likelihood


def ppo_batch(seed=0):
    rng = np.random.default_rng(seed)
    lengths, prompts = rng.integers(6, 40, size=11), rng.integers(1, 5, size=11)
    tokens = [rng.integers(3, 384, size=n) for n in lengths]
    columns = {
        name: [(scale * rng.normal(size=n - p) + shift).astype(np.float32) for n, p in zip(lengths, prompts, strict=True)]
        for name, scale, shift in (("old_logprobs", 0.1, -6.0), ("advantages", 1, 0), ("returns", 1, 0), ("old_values", 1, 0))
    }
    return TokenBatch(tokens, prompts, columns, {})


def plain_loop(model_name, batch):
    """The same steps with nothing but PyTorch: one micro-batch a step, padded."""
    module = PolicyModule(load_policy(model_name, "float32"), 1.0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    losses, norms = [], []
    for rows in STEPS:
        part = batch.select(rows)
        inputs = lay_out(part, "padded", torch.device("cpu"))
        loss, _ = LOSS(TokenOutputs(*module(inputs)), micro_batch(part, inputs, int(part.scored_lengths.sum()), len(part)))
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {name: p.detach().clone() for name, p in module.model.named_parameters()}


@pytest.fixture(scope="module")
def reference(models):
    return plain_loop(models["policy"], ppo_batch())


def start_policy(model, cluster_config, ranks=1, *, value_head=False, resources=None, temperature=1.0, **train):
    train = TrainerConfig(**{"learning_rate": 1e-3, "dtype": "float32", **train})
    config = PolicyConfig(model=model, ranks=ranks, resources=resources or Resources(), train=train)
    place = reserve({"policy": [config.resources.bundle] * ranks}, cluster_config)
    policy = Policy(config, place, cluster_config, temperature=temperature, seed=0, value_head=value_head)
    policy.wait_ready()
    return policy, place


TWO_HEADS = partial(policy_value_loss, policy=partial(policy_loss, clip=0.2), value=partial(value_loss, clip=0.3, factor=0.5))


def plain_two_heads(name, batch, steps):
    """Two heads on one trunk by hand: the model's own logits and last hidden state, one sequence at a time, the two losses added up."""
    model = load_policy(name, "float32", "eager")
    head = torch.nn.Linear(model.config.hidden_size, 1)
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)

    def outputs(row):
        tokens, first = torch.as_tensor(batch.tokens[row]), batch.prompt_lengths[row]
        found = model(input_ids=tokens[None], output_hidden_states=True, use_cache=False)
        logprobs = found.logits[0, first - 1 : -1].float().log_softmax(-1).gather(1, tokens[first:, None])[:, 0]
        return logprobs, head(found.hidden_states[-1][0, first - 1 : -1])[:, 0]

    for rows in steps:
        optimizer.zero_grad()
        tokens = int(batch.select(rows).scored_lengths.sum())
        for row in rows:
            logprobs, values = outputs(row)
            old, advantages, returns, before = (torch.as_tensor(batch.per_token[name][row]) for name in (
                "old_logprobs", "advantages", "returns", "old_values"))  # fmt: skip
            ratio = (logprobs - old).exp()
            gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
            near = before + (values - before).clamp(-0.3, 0.3)
            error = torch.maximum((values - returns) ** 2, (near - returns) ** 2)
            ((0.5 * error - gain).sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    with torch.no_grad():
        return [np.stack([part.numpy() for part in outputs(row)], 1) for row in range(len(batch))]


@pytest.mark.parametrize("train", [{"zero_stage": 0}, {"zero_stage": 3, "layout": "padded"}], ids=["stage 0", "stage 3"])
def test_a_policy_with_a_value_head_trains_both_as_a_plain_loop_does(ray_cluster, models, cluster_config, tmp_path, train):
    batch, steps = ppo_batch(), [np.arange(6), np.arange(5, 11), np.arange(11)]
    policy, place = start_policy(models["policy"], cluster_config, value_head=True, **train)
    try:
        before, values = policy.logprobs_and_values(batch)
        assert not np.concatenate(values).any()  # a new head
        assert np.concatenate(before) == pytest.approx(np.concatenate(policy.logprobs(batch)), abs=1e-6)
        policy.train(batch, TWO_HEADS, steps)
        logprobs, values = policy.logprobs_and_values(batch)
        wanted = np.concatenate(plain_two_heads(models["policy"], batch, steps))
        assert np.concatenate(values) == pytest.approx(wanted[:, 1], abs=2e-4) and np.abs(wanted[:, 1]).max() > 1e-2
        assert np.concatenate(logprobs) == pytest.approx(wanted[:, 0], abs=2e-4)
        policy.save(tmp_path / "state")
        policy.train(batch, TWO_HEADS, steps)
        policy.load(tmp_path / "state")  # the head is in it
        assert np.array_equal(np.concatenate(policy.logprobs_and_values(batch)[1]), np.concatenate(values))
        policy.export(tmp_path / "model")
    finally:
        policy.close()
        place.release()
    exported, began = (load_policy(str(name), "float32").state_dict() for name in (tmp_path / "model", models["policy"]))
    assert exported.keys() == began.keys()  # an ordinary model, without the second head


def test_a_checkpoint_of_a_worker_on_a_full_disk_is_told_and_the_one_before_stays(ray_cluster, models, cluster_config, tmp_path):
    policy, place = start_policy(models["policy"], cluster_config)
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True)
    try:
        if mount.returncode:
            pytest.skip(f"NO TMPFS CAN BE MOUNTED HERE, a full disk is not tried: {mount.stderr.strip()}")
        (folder / "step-000001").mkdir()
        (folder / "step-000001" / "state").write_text("whole")
        (folder / "filler").write_bytes(b"x" * 900_000)
        file = r"small/\.step-000001\.partial/policy/rank-00000\.safetensors"
        with pytest.raises(StorageError, match=f"{file} cannot be written: No space left .* of 1.0 MiB free on {folder}"):
            write_directory(folder / "step-000001", lambda aside: policy.save(aside / "policy"))
        assert sorted(path.name for path in folder.rglob("*")) == ["filler", "state", "step-000001"]
    finally:
        policy.close()
        place.release()
        if not mount.returncode:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def weights_of(policy, ray):
    """By name; those that a broadcast sends, here to nobody, are the same to the bit."""
    message = ray.get(policy.weights("float32", 1))
    assert policy.broadcast("float32", 2, Meeting("127.0.0.1", 0, "", 1, 60)) == ""
    sent = ray.get(policy.kept(2)())
    assert sent.names == message.names and all(np.array_equal(a, b) for a, b in zip(sent.arrays, message.arrays, strict=True))
    return {name: tensor.clone() for name, tensor in message.tensors()}


CASES = [
    (1, {"zero_stage": 0, "micro_batch_tokens": 10_000}),
    (2, {"zero_stage": 0, "micro_batch_tokens": 10_000}),
    (1, {"zero_stage": 1, "layout": "padded", "micro_batch_tokens": 60}),
    (2, {"zero_stage": 2, "micro_batch_tokens": 45}),
    (2, {"zero_stage": 3, "micro_batch_tokens": 70, "gradient_checkpointing": True}),
]


def handed_over(policy, size=20_000):
    """From each rank its weights as they go to a process on its device, in buckets of this many bytes."""
    buckets, found = policy.give("float32", 1, size, begin=True), [{} for _ in policy.devices()]
    policy.give("float32", 1, size, begin=False), policy.give("float32", 1, size, begin=True)  # given up in the middle, and begun anew
    for number in range(1000):
        for rank, bucket in zip(found, buckets, strict=True):
            assert bucket.first == (number == 0)
            rank |= dict(taken(bucket).tensors())
        if buckets[0].last:
            break
        buckets = policy.give("float32", 1, size, begin=False)
    assert number > 5
    policy.gave()
    return found


def same(found, wanted):
    """Whether tensors of the same names are equal to the bit."""
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def checkpoints():
    """What each case leaves for the next one, which has another number of ranks or another stage: a checkpoint and the final weights."""
    return []


@pytest.mark.parametrize(("ranks", "train"), CASES, ids=["z0", "z0-two-ranks", "z1-padded", "z2-two-ranks", "z3-two-ranks"])
def test_training_equals_a_plain_loop(ray_cluster, cluster_config, models, reference, checkpoints, ranks, train, tmp_path):
    losses, norms, weights = reference
    policy, place = start_policy(models["policy"], cluster_config, ranks, **train)
    try:
        stats = policy.train(ppo_batch(), LOSS, STEPS[:HALF])
        policy.save(tmp_path / "checkpoint")
        stats += policy.train(ppo_batch(), LOSS, STEPS[HALF:])
        assert [s["loss"] for s in stats] == pytest.approx(losses, abs=1e-5)
        assert [s["grad_norm_max"] for s in stats] == pytest.approx(norms, rel=1e-3)
        trained = weights_of(policy, ray_cluster)
        assert trained.keys() == weights.keys()
        assert max((trained[name] - weights[name]).abs().max().item() for name in weights) < 1e-4
        assert all(same(rank, trained) for rank in handed_over(policy))
        shares = policy._group.call(lambda trainer, batch: sum(len(t) for part in trainer._mine(batch) for t in part.tokens), ppo_batch())
        assert len(shares) == ranks and max(shares) - min(shares) < sum(shares) / 4, shares  # no rank idles while another trains
        policy.export(tmp_path / "model")
        exported = load_policy(str(tmp_path / "model"), "float32").state_dict()
        assert all(torch.equal(exported[name], trained[name]) for name in weights)
        batch = ppo_batch(1)
        module = PolicyModule(load_policy(str(tmp_path / "model"), "float32"), 1.0)
        wanted = module(lay_out(batch, "padded", torch.device("cpu")))[0]
        for row, scored in enumerate(policy.logprobs(batch)):
            assert scored == pytest.approx(wanted[row, : len(scored)].detach().numpy(), abs=2e-5)
        checkpoints.append((tmp_path / "checkpoint", trained))
        for (checkpoint, undisturbed), tolerance in zip(checkpoints[-1:-3:-1], (0.0, 1e-6), strict=False):
            policy.load(checkpoint)
            policy.train(ppo_batch(), LOSS, STEPS[HALF:-1])
            moved, whole = policy.rest(), sum(p.numel() for p in weights.values())
            # Weights and both moments in float32, but for weights that lie where their file was read to, as at stage 0 on processors.
            assert moved >= (12 if train["zero_stage"] else 8) * whole and policy.rest() == 0  # and then no more
            policy.train(ppo_batch(), LOSS, STEPS[-1:])  # wakes by itself
            resumed = weights_of(policy, ray_cluster)
            assert max((resumed[name] - undisturbed[name]).abs().max().item() for name in weights) <= tolerance
    finally:
        policy.close()
        place.release()


def test_lora_trains_adapters_publishes_merged_weights_and_resumes_bit_equal(ray_cluster, cluster_config, models, tmp_path):
    train = {"zero_stage": 3, "lora": {"rank": 4}}
    policy, place = start_policy(models["policy"], cluster_config, **train)
    base = dict(load_policy(models["policy"], "float32").named_parameters())
    batch = ppo_batch()
    try:
        policy.train(batch, LOSS, STEPS[:1])
        policy.save(tmp_path / "checkpoint")
        changed = {n for n, t in weights_of(policy, ray_cluster).items() if not torch.equal(t, base[n])}
        assert changed == {n for n in base if "proj" in n}
        without, trained = policy.base_logprobs(batch), policy.logprobs(batch)  # which leave training as it is: see `resumed`
        policy.train(batch, LOSS, STEPS[1:])
        wanted, logprobs = weights_of(policy, ray_cluster), policy.logprobs(batch)
        assert same(handed_over(policy)[0], wanted)
        policy.export(tmp_path / "model")
    finally:
        policy.close()
    plain = PolicyModule(load_policy(models["policy"], "float32"), 1.0)(lay_out(batch, "padded", torch.device("cpu")))[0].detach().numpy()
    for row, (found, moved) in enumerate(zip(without, trained, strict=True)):
        assert found == pytest.approx(plain[row, : len(found)], abs=1e-5) and np.abs(moved - found).max() > 1e-4
    module = PolicyModule(load_policy(str(tmp_path / "model"), "float32"), 1.0)
    merged = module(lay_out(batch, "padded", torch.device("cpu")))[0]
    assert merged[0, : len(logprobs[0])].detach().numpy() == pytest.approx(logprobs[0], abs=2e-5)

    again, place_again = start_policy(models["policy"], cluster_config, zero_stage=3, lora={"rank": 4, "export": "adapter"})
    try:
        again.load(tmp_path / "checkpoint")
        again.train(batch, LOSS, STEPS[1:])
        resumed = weights_of(again, ray_cluster)
        assert all(torch.equal(resumed[name], wanted[name]) for name in wanted)
        again.export(tmp_path / "adapter")
        with pytest.raises(RunError, match="no checkpoint"):
            again.load(tmp_path / "nowhere")
    finally:
        again.close()
        place.release()
        place_again.release()
    assert sorted(path.suffix for path in (tmp_path / "adapter").iterdir() if path.name != "README.md") == [".json", ".safetensors"]
    adapted = peft.PeftModel.from_pretrained(load_policy(models["policy"], "float32"), tmp_path / "adapter")
    alone = PolicyModule(adapted, 1.0)(lay_out(batch, "padded", torch.device("cpu")))[0]
    assert torch.allclose(alone, merged, atol=2e-5)


def test_bf16_follows_fp32_and_value_model_learns(ray_cluster, cluster_config, models, reference, tmp_path):
    losses, norms, _ = reference
    policy, place = start_policy(models["policy"], cluster_config, zero_stage=1, dtype="bfloat16")
    try:
        stats = policy.train(ppo_batch(), LOSS, STEPS[:HALF])
        policy.save(tmp_path)
        stats += policy.train(ppo_batch(), LOSS, STEPS[HALF:])
        assert [s["loss"] for s in stats] == pytest.approx(losses, abs=3e-2)
        assert [s["grad_norm_max"] for s in stats] == pytest.approx(norms, rel=0.1)
        assert policy._group.call(lambda trainer: {b.dtype for b in trainer.module.buffers()}) == [{torch.float32}]  # rotary frequencies
        policy.load(tmp_path)  # the fp32 weights behind those in bf16
        assert policy.train(ppo_batch(), LOSS, STEPS[HALF:]) == stats[HALF:]
    finally:
        policy.close()
        place.release()
    config = ValueConfig(train=TrainerConfig(learning_rate=1e-2, dtype="float32", zero_stage=0))
    place = reserve({"value": [config.resources.bundle]}, cluster_config)
    value = Value(config, place, cluster_config, model=models["policy"], seed=0)
    try:
        value.wait_ready()
        batch = ppo_batch()
        assert not np.concatenate(value.values(batch)).any()  # a new head
        stats = value.train(batch, partial(value_loss, clip=10.0, factor=0.5), [np.arange(11)] * 30)
        assert stats[-1]["value_error_sq"] < 0.6 * stats[0]["value_error_sq"]
    finally:
        value.close()
        place.release()


def test_learning_rate_schedules():
    linear = TrainerConfig(learning_rate=1.0, schedule="linear", warmup_steps=2, total_steps=6)
    assert [learning_rate_at(s, linear) for s in range(7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    cosine = TrainerConfig(learning_rate=2.0, schedule="cosine", total_steps=4)
    assert [learning_rate_at(s, cosine) for s in (0, 2, 4, 9)] == pytest.approx([2.0, 1.0, 0.0, 0.0])
    assert learning_rate_at(99, TrainerConfig(learning_rate=3e-4)) == 3e-4
    for schedule in ("linear", "cosine"):
        with pytest.raises(RecipeError, match=f"schedule = '{schedule}' ends at total_steps, which is 0: set total_steps"):
            learning_rate_at(0, TrainerConfig(schedule=schedule, warmup_steps=2))


def test_shares_add_up_and_maxima_do_not():
    assert combine_shares([{"a": 1.0, "b_max": 3.0}, {"a": 0.5, "b_max": 2.0}]) == {"a": 1.5, "b_max": 3.0}
