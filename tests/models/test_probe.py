"""The weight handshake: which samplers are let in."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig

from ctrlrl.errors import ModelError, VersionMismatch
from ctrlrl.models.loading import load_policy, load_tokenizer
from ctrlrl.models.probe import TOLERANCE, Expectation, mean_difference, probe_batch, probe_of
from ctrlrl.models.proof import Compared, Proof, proof_of
from ctrlrl.models.sampler import EngineConfig

NEW = [np.array([-1.0, -2.0], np.float32), np.array([-3.0], np.float32)]
OLD = [a - 0.3 for a in NEW]
NOISE = np.random.default_rng(0).normal(size=(4, 80))  # of two engines, and where a step moved the policy


PROBE = ((3, 4, 5), (6, 7))


def test_the_probe_is_text_and_scores_all_tokens_but_the_first(models):
    probe = probe_of(models["policy"])
    batch = probe_batch(probe)
    assert len(batch) == len(set(probe)) == 3 and list(batch.scored_lengths) == [len(ids) - 1 for ids in probe]
    tokenizer = load_tokenizer(models["policy"])
    assert tokenizer.decode(probe[0]).startswith("Bread needs flour") and not set(tokenizer.all_special_ids) & set().union(*probe)
    assert probe_of(models["policy"], exact=True) == probe[2:]  # the shortest


def test_a_model_with_experts_is_asked_all_sentences(models, tmp_path):
    shutil.copytree(models["policy"], tmp_path, dirs_exist_ok=True)
    Qwen3MoeConfig().save_pretrained(tmp_path)
    assert len(probe_of(str(tmp_path), exact=True)) == 3


def test_a_sampler_must_agree_with_the_trainer():
    expected = Expectation(PROBE, NEW, OLD, 0.05)  # of a mean |logprob| of 2: 0.1
    assert expected.shift == pytest.approx(0.3, abs=1e-6)
    expected.check([a + 0.09 for a in NEW], 5)
    with pytest.raises(VersionMismatch, match=r"policy version 5 differs .* by 0.3 .*may by 0.1\): it still answers with the weights"):
        expected.check(OLD, 5)
    with pytest.raises(VersionMismatch, match="its weights are wrong"):
        expected.check([a + 0.2 for a in NEW], 5)
    with pytest.raises(VersionMismatch, match="its weights are wrong"):
        expected.check([NEW[0], np.array([np.nan])], 5)
    assert Expectation(PROBE, NEW, None, 0.05).shift == 0
    assert mean_difference(NEW, [NEW[0] + 3, NEW[1]]) == pytest.approx(2)


@pytest.mark.parametrize(("dtype", "noise", "shift"), [("float32", 1e-5, 5e-5), ("bfloat16", 0.05, 0.12)])
def test_a_sampler_that_ignored_a_small_publish_is_refused(dtype, noise, shift):
    """The shift lies within the tolerance, so only the weights before give the sampler away."""
    old = -5 - NOISE[3] / 2
    new, rounding = old + shift * 1.25 * NOISE[0], noise * 1.25 * NOISE[1]  # the mean of |NOISE| is about 0.8
    expected = Expectation(PROBE, [new], [old], TOLERANCE[dtype])
    assert expected.shift < TOLERANCE[dtype] * 4.9
    expected.check([new + rounding], 2)
    with pytest.raises(VersionMismatch, match="still answers with the weights before"):
        expected.check([old + rounding], 2)


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 1e-5), ("bfloat16", 0.07)])
@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0])  # of the noise
def test_a_publish_within_the_noise_is_accepted(dtype, noise, shift):
    old, rounding = -5 - NOISE[3] / 2, noise * 1.25 * NOISE[1]
    expected = Expectation(PROBE, [old + shift * noise * 1.25 * NOISE[0]], [old], TOLERANCE[dtype])
    expected.check([expected.published[0] + rounding], 2)
    expected.check(expected.published, 2)
    Expectation(PROBE, [old], [old + 0.3 * rounding], TOLERANCE[dtype]).check([old + rounding], 2)  # nearer to before, but by chance


def test_unlikely_tokens_may_differ_more_and_a_half_stale_sampler_is_refused():
    text, untrained = np.full(80, -3.4), np.full(80, -21.0)
    Expectation(PROBE, [untrained], None, TOLERANCE["bfloat16"]).check([untrained + 0.35], 2)
    expected = Expectation(PROBE, [text], None, TOLERANCE["bfloat16"])
    expected.check([text + 0.05], 2)
    with pytest.raises(VersionMismatch, match="its weights are wrong"):
        expected.check([text + 0.21], 2)  # measured: a tied head that stayed behind


def test_an_engine_must_compute_what_transformers_does(models, monkeypatch):
    model = load_policy(models["policy"], "float32")

    def fail(_):
        raise AttributeError("no such kernel")

    def short(sequences):
        assert [len(ids) for ids in sequences] == [7, 7, 7]  # of an engine with 8 tokens, one of which is drawn
        return answer(sequences)

    def answer(sequences, shift=0.0):
        logits = [model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1) for ids in sequences]
        return [x[torch.arange(len(ids) - 1), list(ids[1:])].detach().numpy() + shift for x, ids in zip(logits, sequences, strict=True)]

    proof = Proof(models["policy"], EngineConfig(dtype="float32"))
    proof.check(answer)
    with pytest.raises(ModelError, match="differ by 0.01 in the mean from transformers"):
        proof.check(partial(answer, shift=0.01))
    with pytest.raises(ModelError, match="cannot run .*: AttributeError: no such kernel"):
        proof.check(fail)
    Proof(models["policy"], EngineConfig(dtype="bfloat16", max_model_tokens=8)).check(short)
    known = proof_of(models["policy"], EngineConfig(dtype="float32"))  # a llama: only whether its weights are numbers
    known.check(partial(answer, shift=0.01))
    for asked in (known, proof):
        with pytest.raises(ModelError, match="are not finite: its weights are broken"):
            asked.check(partial(answer, shift=float("nan")))
    monkeypatch.setattr("ctrlrl.models.architectures._RIGHT", frozenset())
    with pytest.raises(ModelError, match="cannot run"):
        proof_of(models["policy"], EngineConfig(dtype="float32")).check(fail)


def test_keys_that_transformers_ignores_are_a_reason_to_compare(models, tmp_path):
    """vLLM may obey them: it reads num_key_value_heads of a gpt_neox, which has none in transformers."""
    for name, more in (("text", {"made_by": "hand", "_note": 1}), ("size", {"num_experts_per_head": 2})):
        folder = shutil.copytree(models["policy"], tmp_path / name)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    engine = EngineConfig(dtype="float32")
    assert isinstance(proof_of(str(tmp_path / "text"), engine), Compared)
    assert isinstance(proof_of(str(tmp_path / "size"), engine), Proof)
