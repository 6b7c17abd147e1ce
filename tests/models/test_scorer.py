"""Reward models: text in, score out, independent of batching; and the checks on what may be one."""

import warnings

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from ctrlrl.data.batches import TokenBatch
from ctrlrl.data.calibration import fit_quantile
from ctrlrl.errors import DataError, ModelError
from ctrlrl.models.forward import PolicyModule, lay_out
from ctrlrl.models.loading import check_policy, check_reward_model, end_token_ids, load_policy, load_tokenizer
from ctrlrl.models.scorer import ReferenceConfig, ReferenceModel, Scorer, ScorerConfig
from ctrlrl.models.segments import SEGMENTS
from ctrlrl.models.weights import fingerprint, full_weights, pack_weights

CONVERSATIONS = [([{"role": "user", "content": f"How do I bake {n} loaves?"}], "Mix flour and water. " * n) for n in (1, 7, 3, 12, 2)]


def test_scores_do_not_depend_on_batch_padding_or_order(models):
    together = Scorer(ScorerConfig(model=models["helpful"])).score(CONVERSATIONS)
    small = Scorer(ScorerConfig(model=models["helpful"], batch_tokens=1)).score(CONVERSATIONS)
    reverse = Scorer(ScorerConfig(model=models["helpful"])).score(CONVERSATIONS[::-1])[::-1]
    assert together == pytest.approx(small, abs=1e-6)
    assert together == pytest.approx(reverse, abs=1e-6)
    assert len(set(together.round(6))) == 5
    assert ((together > 0) & (together < 1)).all()


def test_a_score_is_the_sigmoid_of_the_head_on_the_models_own_chat(models):
    from transformers import AutoModelForSequenceClassification

    scorer = Scorer(ScorerConfig(model=models["harmless"]))
    model = AutoModelForSequenceClassification.from_pretrained(models["harmless"])
    text = "<s>user: How do I bake 1 loaves?<end><s>assistant: Mix flour and water. <end>"
    ids = load_tokenizer(models["harmless"])(text, return_tensors="pt")["input_ids"]
    assert scorer.score(CONVERSATIONS[:1])[0] == pytest.approx(torch.sigmoid(model(ids).logits[0, 0]).item(), abs=1e-6)


def test_a_long_conversation_keeps_its_end(models):
    short = ScorerConfig(model=models["helpful"], max_length=10)
    scorer = Scorer(short)
    assert len(scorer._encode(*CONVERSATIONS[3])["input_ids"]) == 10
    assert scorer._encode(*CONVERSATIONS[3])["input_ids"][-1] == 2


def test_scores_are_the_calibrated_raw_outputs(models, tmp_path):
    scorer = Scorer(ScorerConfig(model=models["helpful"]))
    raw = scorer.raw(CONVERSATIONS)
    assert scorer.score(CONVERSATIONS) == pytest.approx(1 / (1 + np.exp(-raw)), abs=1e-6)
    fit_quantile(raw).save(tmp_path / "quantile.json")
    quantile = Scorer(ScorerConfig(model=models["helpful"], calibration="quantile", calibration_file=str(tmp_path / "quantile.json")))
    assert sorted(quantile.score(CONVERSATIONS)) == pytest.approx((np.arange(len(raw)) + 0.5) / len(raw))
    assert np.array_equal(np.argsort(quantile.score(CONVERSATIONS)), np.argsort(raw))


def test_a_reward_model_that_overflows_is_refused_and_not_set_aside(models):
    scorer = Scorer(ScorerConfig(model=models["helpful"]))
    with torch.no_grad():
        next(scorer.model.score.parameters()).fill_(float("nan"))
    with pytest.raises(DataError, match="5 of 5 outputs of the reward model .* are NaN: its weights are broken, or its dtype overflows"):
        scorer.score(CONVERSATIONS)


def test_one_label_of_several_scores_by_its_probability(models):
    """Two labels that exclude each other: their probabilities add up to 1, and are those of transformers' softmax; else a sigmoid each."""
    import torch
    from transformers import AutoModelForSequenceClassification

    one, other = (Scorer(ScorerConfig(model=models["two_labels"], label=label)).score(CONVERSATIONS) for label in ("LABEL_0", "label_1"))
    assert one + other == pytest.approx(np.ones(len(one)), abs=1e-6) and np.ptp(one) > 1e-4
    scorer = Scorer(ScorerConfig(model=models["two_labels"], label="LABEL_1"))
    row = scorer._encode(*CONVERSATIONS[0])["input_ids"]
    logits = AutoModelForSequenceClassification.from_pretrained(models["two_labels"])(torch.tensor([row])).logits[0]
    assert other[0] == pytest.approx(logits.softmax(0)[1].item(), abs=1e-5)
    scorer.model.config.problem_type = "multi_label_classification"
    assert scorer.score(CONVERSATIONS[:1])[0] == pytest.approx(logits.sigmoid()[1].item(), abs=1e-5)
    for wrong, model in (("toxic", "two_labels"), ("LABEL_0", "helpful")):
        with pytest.raises(ModelError, match=f"label = '{wrong}' is none of several"):
            check_reward_model(models[model], wrong)


def test_a_quantile_calibration_needs_its_file_and_no_other_takes_one(models):
    for wrong in ({"calibration": "quantile"}, {"calibration_file": "x.json"}):
        with pytest.raises(ValidationError, match="give both or neither"):
            ScorerConfig(model=models["helpful"], **wrong)
    with pytest.raises(DataError, match="gone.json is not a stored calibration"):
        ScorerConfig(model=models["helpful"], calibration="quantile", calibration_file="gone.json").load_calibration()


@pytest.mark.parametrize("labels", [1, 2])
def test_a_token_classifiers_last_token_scores(models, tokenizer, tmp_path, labels):
    from transformers import AutoConfig, AutoModelForTokenClassification

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(models["helpful"], num_labels=labels)
    model = AutoModelForTokenClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = ScorerConfig(model=str(tmp_path), label="LABEL_1" if labels == 2 else "")
    check_reward_model(config.model, config.label)
    scorer = Scorer(config)
    for conversation, raw in zip(CONVERSATIONS, scorer.raw(CONVERSATIONS), strict=True):
        row = scorer._encode(*conversation)["input_ids"]
        logits = model(torch.tensor([row])).logits[0, -1].detach()
        assert raw == pytest.approx(float(logits[0] if labels == 1 else logits[1] - logits[0]), abs=1e-5)


def test_a_score_may_be_turned_round(models):
    for model, label in (("two_labels", "LABEL_1"), ("helpful", "")):
        plain, turned = (ScorerConfig(model=models[model], label=label, inverted=inverted) for inverted in (False, True))
        scores = Scorer(plain).score(CONVERSATIONS)
        np.testing.assert_allclose(Scorer(turned).score(CONVERSATIONS), 1 - scores, atol=1e-6)
        assert turned.fingerprint() == plain.fingerprint() | {"inverted": True} and "inverted" not in plain.model_dump()
    with pytest.raises(ValidationError, match="inverted is of a reward model: have a function"):
        ScorerConfig(python="a.py:f", inverted=True)


def test_reward_models_need_one_label_and_a_classifier(models):
    check_reward_model(models["helpful"])
    with pytest.raises(ModelError, match="has 2 labels.*num_labels = 1"):
        check_reward_model(models["two_labels"])
    with pytest.raises(ModelError, match="LlamaForCausalLM.*sequence classifier"):
        check_reward_model(models["policy"])
    with pytest.raises(ModelError, match="LlamaForSequenceClassification.*causal"):
        check_policy(models["helpful"])
    with pytest.raises(ModelError, match="'./gone' does not exist"):
        check_policy("./gone")
    with pytest.raises(ModelError, match="no-such-org/no-such-model"):
        check_policy("no-such-org/no-such-model")


def test_a_conversation_that_a_reward_models_template_refuses_is_named(models):
    scorer = Scorer(ScorerConfig(model=models["helpful"]))
    scorer.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match="of system, user, assistant: System role not supported: "):
        scorer.raw([([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}], "A")])


def test_a_policy_that_lacks_weights_is_refused(models):
    load_policy(models["tied"], "float32")  # its head is its embedding
    with pytest.raises(ModelError, match="helpful' lacks 1 weights of a causal language model, such as 'lm_head.weight'"):
        load_policy(models["helpful"], "float32")


def test_a_policy_without_chat_template_is_refused(models, tmp_path, tokenizer):
    load_policy(models["policy"], "float32").save_pretrained(tmp_path)
    bare = load_tokenizer(models["policy"])
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no chat template"):
        check_policy(str(tmp_path))


def test_end_tokens_come_from_tokenizer_and_generation_config(models, tmp_path):
    assert end_token_ids(models["policy"]) == [2]
    model = load_policy(models["policy"], "float32")
    model.generation_config.eos_token_id = [7, 2]
    model.save_pretrained(tmp_path)
    load_tokenizer(models["policy"]).save_pretrained(tmp_path)
    assert end_token_ids(str(tmp_path)) == [2, 7]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_reference_equals_the_policy_and_never_changes(models, layout):
    rng = np.random.default_rng(0)
    batch = TokenBatch([rng.integers(3, 384, size=n) for n in (9, 25, 4)], np.array([3, 5, 3]), {}, {})
    reference = ReferenceModel(models["policy"], ReferenceConfig(dtype="float32", layout=layout, batch_tokens=30), 0.8)
    before = fingerprint(full_weights(reference.module.model))
    policy = PolicyModule(load_policy(models["policy"], "float32", SEGMENTS), 0.8)
    wanted = policy(lay_out(batch, "packed", torch.device("cpu")))[0].detach().numpy()
    for row, logprobs in enumerate(reference.logprobs(batch)):
        assert logprobs == pytest.approx(wanted[row, : len(logprobs)], abs=2e-6)
    assert fingerprint(full_weights(reference.module.model)) == before
    assert not any(p.requires_grad for p in reference.module.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_message_carries_every_tensor(models, dtype):
    named = dict(full_weights(load_policy(models["tied"], "float32")))
    message = pack_weights(iter(named.items()), dtype, 3)
    assert message.version == 3 and message.nbytes == sum(t.numel() for t in named.values()) * (4 if dtype == "float32" else 2)
    for name, tensor in message.tensors():
        assert torch.equal(tensor, named[name].to(tensor.dtype)) and str(tensor.dtype) == f"torch.{dtype}"
    assert "lm_head.weight" not in named  # a tied head travels once


def test_a_weight_message_in_shared_memory_is_read_without_a_warning(models):
    message = pack_weights(full_weights(load_policy(models["tied"], "float32")), "float32", 0)
    for array in message.arrays:
        array.flags.writeable = False  # as arrays from another process are
    torch.set_warn_always(True)  # torch warns of it once in a process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(list(message.tensors())) == len(message.names)
    finally:
        torch.set_warn_always(False)
