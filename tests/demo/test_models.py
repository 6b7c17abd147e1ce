"""The demo's tokenizers, formats and cache, on models that are hardly trained; what a full build learns is in its facts."""
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ctrlrl.control import ATTRIBUTES, CORNERS, grid
from ctrlrl.demo import models
from ctrlrl.demo.corpus import Conversation, Draw, Judged, conversations, preferences
from ctrlrl.demo.models import FULL, TINY, WorldSize, build, fingerprint, load
from ctrlrl.demo.training import raw_scores, train_policy, train_reward_model
from ctrlrl.demo.vocabulary import byte_bpe, word_piece
from ctrlrl.demo.world import make_world
from ctrlrl.errors import RunError
from ctrlrl.prompts import render

WORLD = make_world(0)
MICRO = WorldSize(conversations=64, policy_tokens=400, policy_width=64, policy_layers=1, pairs=64, reward_tokens=400, test_pairs=20,
                  samples=1, processes=1)
TEXTS = [row.answer for row in conversations(WORLD, 300, seed=0)] + list(WORLD.train_prompts) + 100 * [c.spell() for c in CORNERS]


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """A world whose models saw a handful of rows."""
    lines = []
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    world = build(tmp_path_factory.mktemp("demo") / "world", 0, lines.append, MICRO)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    assert len(lines) == 7 and lines[0].startswith("demo world: policy in")
    return world


def test_the_policy_reads_any_text_and_every_control():
    tokenizer = byte_bpe(TEXTS, 800)
    for text in [*TEXTS[:50], "Ünïcode 漢字 \n 0.25", *(c.spell() for c in grid((0.0, 0.1, 0.35, 1.0)))]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id != tokenizer.bos_token_id
    spelled = {len(tokenizer(c.spell())["input_ids"]) for c in CORNERS}
    assert max(spelled) <= 13
    ids = render(tokenizer, [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}], CORNERS[0].spell())
    assert tokenizer.decode(ids) == "<|start|><|system|>S<|end|><|user|>U [helpful=0.2][harmless=0.2]<|end|><|assistant|>"


def test_the_encoder_template_marks_the_turns():
    tokenizer = word_piece(TEXTS, 600)
    chat = [{"role": "user", "content": "How do I bake bread?"}, {"role": "assistant", "content": "Sure: for bread, ask."}]
    ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert (ids[0], ids[-1], list(ids).count(tokenizer.sep_token_id)) == (tokenizer.cls_token_id, tokenizer.sep_token_id, 2)
    assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("train", [byte_bpe, word_piece])
def test_the_same_text_gives_the_same_tokenizer(train):
    first, second = (train(TEXTS, 600) for _ in range(2))
    assert len(first) <= 600 and first.get_vocab() == second.get_vocab()


def test_a_world_is_ordinary_model_folders(micro):
    assert load(micro.folder) == micro
    rows = [json.loads(line)["prompt"] for line in micro.train_prompts.read_text().splitlines()]
    assert tuple(rows) == WORLD.train_prompts
    assert len(micro.test_prompts.read_text().splitlines()) == 120
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(micro.policy), AutoTokenizer.from_pretrained(micro.policy)
    assert policy.dtype == torch.float32 and not policy.config.tie_word_embeddings and policy.config.vocab_size % 64 == 0
    assert policy.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")
    assert policy.config.head_dim == 32 and policy.config.max_position_embeddings == 512
    assert len(render(tokenizer, [{"role": "user", "content": "Hi"}])) > 4
    for folder in (*micro.reward.values(), *micro.held_out.values()):
        judge = AutoModelForSequenceClassification.from_pretrained(folder)
        own = AutoTokenizer.from_pretrained(folder)
        assert judge.config.num_labels == 1 and own.chat_template and judge.config.pad_token_id == own.pad_token_id is not None
    kinds = {AutoModelForSequenceClassification.from_pretrained(f[ATTRIBUTES[0]]).config.model_type for f in (micro.reward, micro.held_out)}
    assert kinds == {"llama", "bert"}


@pytest.mark.parametrize("judge", ("reward", "held_out"))
def test_scores_do_not_depend_on_the_batch(micro, judge):
    folder = getattr(micro, judge)["helpful"]
    network, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = [Judged(p, a.text) for p in WORLD.test_prompts[:6] for a in WORLD.answers(p)[:2]]
    np.testing.assert_allclose(raw_scores(network, tokenizer, rows), raw_scores(network, tokenizer, rows, batch=1), atol=1e-5)


def test_a_world_is_reused_until_something_changes(micro, monkeypatch):
    lines = []
    assert build(micro.folder, 0, lines.append, MICRO) == micro
    assert lines == [f"demo world: reused from {micro.folder}"]
    assert len({fingerprint(0, MICRO), fingerprint(1, MICRO), fingerprint(0, TINY), fingerprint(0, FULL)}) == 4

    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_build_parts", broken)
    with pytest.raises(KeyboardInterrupt):
        build(micro.folder, 1, lines.append, MICRO)
    assert load(micro.folder) == micro and [p.name for p in micro.folder.parent.iterdir()] == [micro.folder.name]
    monkeypatch.setattr(models, "_build_parts", lambda *_: {"seconds": {}})
    assert set(build(micro.folder.parent / "other", 1, lines.append, MICRO).facts) == {"seconds"}
    assert build(micro.folder.parent / "other", 2, lines.append, MICRO) and "built" in lines[-1]


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not a demo world"):
        build(tmp_path, 0, print, MICRO)
    with pytest.raises(RunError, match="no finished demo world"):
        load(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_same_seed_gives_the_same_policy(tmp_path):
    rows = conversations(WORLD, 48, seed=5)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_policy(tmp_path / name, rows, 400, 64, 1, batch=16, seed=seed)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a) and not torch.equal(a["lm_head.weight"], c["lm_head.weight"])


def test_training_learns(tmp_path):
    row = Conversation(({"role": "user", "content": "How?"},), "Sure:", "Sure: like this.", 1.0)
    figures = train_policy(tmp_path / "policy", [row] * 640, 300, 64, 1, batch=16, seed=0)
    assert figures["loss"] < 0.5
    pairs = preferences(WORLD, WORLD.train_prompts, "harmless", False, 640, seed=0)
    train_reward_model(tmp_path / "judge", pairs, False, 500, 64, 16, seed=0)
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "judge")
    draw = Draw(WORLD, np.random.default_rng(1))  # whole answers: annotators err, and what they say is noisy
    safe, unsafe = ([Judged(p, draw.answer(p, (True, good), partial=False).text) for p in WORLD.test_prompts] for good in (True, False))
    assert (raw_scores(network, tokenizer, safe) > raw_scores(network, tokenizer, unsafe)).mean() > 0.9
