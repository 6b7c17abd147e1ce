"""Every sequence classifier of transformers as a reward model: its score depends on the conversation alone, in training and in scoring.

Equality or refusal, never a third thing. README_ROWS are what jobs/README.md says of them.
"""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from ctrlrl.data.batches import plan_micro_batches
from ctrlrl.errors import ModelError
from ctrlrl.models.forward import RewardModule, lay_out
from ctrlrl.models.loading import check_reward_model, load_classifier, load_reward_model
from ctrlrl.models.pooling import conversation_batch
from ctrlrl.models.scorer import Scorer, ScorerConfig
from tests.models.tiny import LARGEST, tiny_config

BATCH_MATES = "differently beside others"
REFUSED = {
    **dict.fromkeys("convbert fnet funnel mobilebert nystromformer xlnet yoso".split(), BATCH_MATES),
    **dict.fromkeys("bart bigbird_pegasus mbart mt5 mvp plbart umt5".split(), "same number of <eos> tokens"),
    "canine": "has no table of tokens",
    "xmod": "Input language unknown",
}
# Of images and text or of several models, or not made tiny by the sizes of tiny.py, or of packages that may be absent.
NOT_BUILT = set(
    "cohere_compass_text gemma3 layoutlmv2 layoutlmv3 lilt markuplm modernvbert perceiver qwen3_5 reformer roc_bert t5 t5gemma "
    "t5gemma2 zamba2".split()
)
KINDS = [kind for kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES if kind not in NOT_BUILT]
README_ROWS = [
    f"| right, proven when loaded | {', '.join(sorted(set(KINDS) - set(REFUSED)))} |",
    f"| refused: batch-mates or padding change the score | {', '.join(kind for kind, why in REFUSED.items() if why == BATCH_MATES)} |",
    f"| refused: other reasons | {', '.join(kind for kind, why in REFUSED.items() if why != BATCH_MATES)} |",
]
CONVERSATIONS = [([{"role": "user", "content": f"How do I bake {n} loaves?"}], "Mix flour. " * n) for n in (1, 5, 3, 8)]


def tiny_classifier(kind, folder, tokenizer):
    """A random classifier in a directory of its own, with heads and embeddings that tell texts apart."""
    torch.manual_seed(0)
    config = tiny_config(kind)
    with torch.device("meta"):
        assert AutoModelForSequenceClassification.from_config(config).num_parameters() < LARGEST
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def trained_scores(name, scorer):
    """What the trainer's module says of the conversations, in micro-batches of its own."""
    module = RewardModule(load_classifier(name, "float32").eval(), token_types=False)
    batch = conversation_batch([scorer._encode(*conversation) for conversation in CONVERSATIONS], typed=False)
    scores = np.zeros(len(batch))
    for rows in plan_micro_batches(np.array([len(t) for t in batch.tokens]), 300, padded=True):
        with torch.no_grad():
            scores[rows] = module(lay_out(batch.select(rows), "padded", torch.device("cpu")))[0]
    return scores


def own_score(name, scorer, conversation):
    """The model's output on the conversation alone, with a padding token that is not its last."""
    model = load_reward_model(name, "float32")
    ids = torch.tensor([scorer._encode(*conversation)["input_ids"]])
    assert model.config.pad_token_id != ids[0, -1]
    model.config.use_cache = False
    with torch.no_grad():
        return model(ids).logits[0, 0].item()


def test_the_table_of_the_docs_is_this_list():
    text = (Path(__file__).parents[2] / "jobs" / "README.md").read_text()
    assert [row for row in README_ROWS if row not in text] == []
    assert set(REFUSED) <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_depends_on_its_conversation_alone_or_the_model_is_refused(kind, tmp_path, tokenizer):
    warnings.filterwarnings("ignore")
    name = tiny_classifier(kind, tmp_path, tokenizer)
    if kind in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[kind]):
            Scorer(ScorerConfig(model=name))
        return
    check_reward_model(name)
    scorer = Scorer(ScorerConfig(model=name))
    together = scorer.raw(CONVERSATIONS)
    assert together == pytest.approx([scorer.raw([c])[0] for c in CONVERSATIONS], abs=2e-5)
    assert together == pytest.approx(trained_scores(name, scorer), abs=2e-5)
    assert together[0] == pytest.approx(own_score(name, scorer, CONVERSATIONS[0]), abs=2e-5)
    assert kind == "mra" or len(set(together.round(6))) == len(CONVERSATIONS)
