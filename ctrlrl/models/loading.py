"""Models of each role by local path or hub name: loaded whole or refused, and checked for that before anything is started.

Weights are read from safetensors only.
"""

import re
from pathlib import Path

import torch
import transformers
from transformers import (
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ctrlrl.attributes import PAPER, Attributes
from ctrlrl.chat import check_exportable, literals, own_template
from ctrlrl.errors import ModelError
from ctrlrl.models.exporting import writable_generation_config, write_attributes
from ctrlrl.models.python_scorer import check_python
from ctrlrl.models.reading import existing, has_tokenizer, label_index, load_config, load_tokenizer, reading, reward_kind
from ctrlrl.models.vocabulary import counted_positions, embedding_rows, end_token_ids, tokens_beyond
from ctrlrl.models.weight_files import check_tied, check_weights
from ctrlrl.prompts import control_chat_template

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_policy(name: str, dtype: str, attention: str | None = None) -> PreTrainedModel:
    """A causal language model without dropout; ModelError if its checkpoint lacks weights, which would start at random."""
    config = _without_dropout(load_config(name))
    model, _ = _read_whole(AutoModelForCausalLM, name, "causal language model", config, dtype, attention=attention)
    if generation := writable_generation_config(name):
        model.generation_config = generation
    return model


def load_value_model(name: str, dtype: str, attention: str | None = None) -> PreTrainedModel:
    """A causal backbone with one value per token. A head that the checkpoint lacks starts at zero, so the first values are 0."""
    config = _without_dropout(load_config(name))
    config.num_labels = 1
    model, missing = _read_whole(AutoModelForTokenClassification, name, "value model", config, dtype, attention=attention, new_head=True)
    _zero_new_head(model, missing)
    return model


def load_classifier(name: str, dtype: str, attention: str | None = None) -> PreTrainedModel:
    """A sequence classifier with one output, to be trained: any encoder or causal backbone, or a reward model. Without dropout.

    A head that a backbone lacks is drawn at random (a head of zeros would keep the backbone from learning for long, at the small
    learning rates of fine-tuning). attention: None for the model's own, as in scoring: encoders do not all know the same. ModelError for a
    classifier with another number of labels, or without its head.
    """
    config, new_head = _backbone_config(name)
    config = _without_dropout(config)
    return _read_whole(
        AutoModelForSequenceClassification, name, "sequence classifier", config, dtype, attention=attention, new_head=new_head
    )[0]


def load_reward_model(name: str, dtype: str, label: str = "") -> PreTrainedModel:
    """A sequence classifier, or one of tokens, whole: with one output, or several of which `label` is one; ModelError for any other."""
    config = _reward_config(name, label)
    model, _ = _read_whole(reward_kind(config), name, "reward model", config, dtype)
    return model.eval().requires_grad_(False)


def reads_token_types(name: str) -> bool:
    """Whether the model tells two texts apart by token types, and is given them (not in a chat, which is one text)."""
    tokenizer, kinds = load_tokenizer(name), getattr(load_config(name), "type_vocab_size", None) or 0
    return not tokenizer.chat_template and "token_type_ids" in tokenizer.model_input_names and kinds > 1


def check_backbone(name: str) -> None:
    """Raise ModelError unless a reward model can be trained from `name`: a backbone without a head, or a whole classifier with one
    output. Reads no weights, but their names and shapes."""
    config, new_head = _backbone_config(name)
    _check_trainable(name, config)
    _check_whole(AutoModelForSequenceClassification, name, "sequence classifier", config, new_head=new_head)


def check_reward_model(name: str, label: str = "") -> None:
    """Raise ModelError unless `name` is what load_reward_model loads, or a function; reads no weights."""
    if not check_python(name):
        _check_whole(reward_kind(config := _reward_config(name, label)), name, "reward model", config)


def check_value(name: str) -> None:
    """Raise ModelError unless a value model can be trained from `name`, which may lack the head."""
    config = load_config(name)
    config.num_labels = 1
    if type(config) not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        raise ModelError(
            f"transformers has no token classifier, which a value model is, for {config.model_type} models such as {name!r}: set "
            'algorithm.advantage = "rloo" and algorithm.samples_per_query to 2 or more, or give a value.model of another architecture'
        )
    _check_trainable(name, config)
    _check_whole(AutoModelForTokenClassification, name, "value model", config, new_head=True)


def check_causal(name: str, role: str) -> None:
    """Raise ModelError unless `name`, the run's `role`, is a whole causal language model; reads no weights, but names and shapes."""
    config = load_config(name)
    if not any("CausalLM" in a or "LMHead" in a for a in config.architectures or []):
        raise ModelError(f"{role} {name!r} is a {', '.join(config.architectures or []) or config.model_type}: give a causal language model")
    kind, named = config.model_type, getattr(getattr(transformers, config.architectures[0], None), "config_class", None)
    if named and named.model_type != kind:  # transformers goes by the one, the rollout engine by the other
        what = f"a {config.architectures[0]} and a {kind}"
        raise ModelError(f"{role} {name!r} is {what} by its config.json: correct architectures or model_type")
    _check_whole(AutoModelForCausalLM, name, "causal language model", config)
    if config.get_text_config().tie_word_embeddings:
        check_tied(name)


def check_policy(name: str, trained: bool = False) -> None:
    """Raise ModelError unless `name` is a whole causal language model whose tokenizer has a chat template and an end token; `trained`:
    and can be trained."""
    if trained:
        _check_trainable(name, load_config(name))
    check_causal(name, "policy")
    own_template(load_tokenizer(name))  # refused here if there is none
    end_token_ids(name)  # refused here if there is none


def within_positions(name: str, max_length: int) -> int:
    """`max_length` tokens, or what the model's position embeddings take, if that is less."""
    config = load_config(name)
    places = getattr(config, "max_position_embeddings", None)
    if places is None or places <= 0:
        return max_length  # relative positions, or those of a state
    if any("SequenceClassification" in a or "MaskedLM" in a or a.endswith("Model") for a in config.architectures or []):
        counted = counted_positions(_on_meta(AutoModelForSequenceClassification, name, _settled(name, config))[0])
        places = counted[1] if counted else places
    return min(max_length, places)


def save_control_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path, attributes: Attributes = PAPER) -> None:
    """The tokenizer beside an exported model, with a chat template that takes the control as variables named as the attributes; and these.
    Of named templates the default alone goes with it: nothing is trained under the others."""
    check_exportable(tokenizer)
    template = tokenizer.chat_template
    tokenizer.chat_template = control_chat_template(own_template(tokenizer), literals(tokenizer), attributes)
    tokenizer.save_pretrained(directory)
    tokenizer.chat_template = template
    write_attributes(directory, attributes)


def _backbone_config(name: str) -> tuple[PretrainedConfig, bool]:
    """The configuration of a classifier to be trained, and whether its head is new."""
    config = load_config(name)
    classifier = any("SequenceClassification" in a for a in config.architectures or [])
    if classifier and config.num_labels != 1:
        raise ModelError(
            f"{name!r} is a classifier with {config.num_labels} labels; a reward model has exactly 1 output: "
            "give a backbone, or a classifier with num_labels = 1"
        )
    config.num_labels = 1
    return _settled(name, config), not classifier


def _reward_config(name: str, label: str = "") -> PretrainedConfig:
    """The configuration of a reward model as it is; ModelError for anything else."""
    config = load_config(name)
    architectures = config.architectures or []
    if not any("SequenceClassification" in a or "TokenClassification" in a for a in architectures):
        raise ModelError(
            f"reward model {name!r} is a {', '.join(architectures) or config.model_type}: give a sequence classifier with one output"
        )
    if label:
        label_index(name, label)
    elif config.num_labels != 1:
        raise ModelError(
            f"reward model {name!r} has {config.num_labels} labels; a reward model has exactly 1 output: train it with num_labels = 1, "
            f"or name one of {', '.join(map(str, config.id2label.values()))} as its label"
        )
    return _settled(name, config)


def _settled(name: str, config: PretrainedConfig) -> PretrainedConfig:
    """`config` with a padding token of the embedding: its own, else the tokenizer's padding or end token, else token 0.

    Scores do not depend on it (see models.pooling) but where positions are counted from it.
    """
    text = config.get_text_config()
    for part in {id(c): c for c in (config, text)}.values():
        tokenizer = None if _is_token(part.pad_token_id, text) else load_tokenizer(name)
        given = [tokenizer.pad_token_id, tokenizer.eos_token_id] if tokenizer else [part.pad_token_id]
        part.pad_token_id = next((i for i in given if _is_token(i, text)), 0)
    return config


def _is_token(i: int | None, config: PretrainedConfig) -> bool:
    return isinstance(i, int) and 0 <= i < (getattr(config, "vocab_size", None) or 0)


def _zero_new_head(model: PreTrainedModel, missing: list[str]) -> None:
    """Set the last layer, of one output, to 0 where the checkpoint lacks it; under ZeRO-3 a parameter's data is in its shard."""
    for key in missing:
        parameter = model.get_parameter(key)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if not key.startswith(f"{model.base_model_prefix}.") and shape[0] == 1:
            getattr(parameter, "ds_tensor", parameter).data.zero_()


def _read_whole(
    kind: type, name: str, what: str, config: PretrainedConfig, dtype: str, *, attention: str | None = None, new_head: bool = False
) -> tuple[PreTrainedModel, list[str]]:
    """A model, and the names of the weights that its checkpoint lacks: none, but those of a head that is new."""
    check_weights(name, config)
    with reading(name, what):
        model, info = kind.from_pretrained(
            existing(name),
            config=config,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are told by name below
            output_loading_info=True,
        )
    return model, _missing(model, info, name, what, new_head)


def _on_meta(kind: type, name: str, config: PretrainedConfig) -> tuple[PreTrainedModel, dict]:
    """The model without its weights, and what its checkpoint lacks: only headers are read."""
    with reading(name, "model"):
        return kind.from_pretrained(
            existing(name),
            config=config,
            device_map={"": "meta"},
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )


def _check_whole(kind: type, name: str, what: str, config: PretrainedConfig, new_head: bool = False) -> None:
    """Raise ModelError if the checkpoint lacks weights of the model, or the tokenizer has tokens that the model cannot read."""
    check_weights(name, config)
    if getattr(config, "quantization_config", None):
        return  # names and shapes are the quantiser's
    model, info = _on_meta(kind, name, config)
    _missing(model, info, name, what, new_head)
    beyond = tokens_beyond(load_tokenizer(name), embedding_rows(model)) if has_tokenizer(name) else []
    if beyond:
        raise ModelError(
            f"the tokenizer of {name!r} has {len(beyond)} tokens beyond the {embedding_rows(model)} rows of the model's embedding, "
            f"such as {beyond[0]!r}: resize the model's embedding, or give the tokenizer that belongs to it"
        )


def _check_trainable(name: str, config: PretrainedConfig) -> None:
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{name!r} is quantised, and quantised weights cannot be trained: give the model in full precision")


def _missing(model: PreTrainedModel, info: dict, name: str, what: str, new_head: bool) -> list[str]:
    """Names of the head's weights that are new; ModelError if other weights are missing, or have another shape, or layers are left."""
    unexpected = sorted(info["unexpected_keys"])
    wrong = [f"{key} is {list(given)} in place of {list(due)}" for key, given, due in sorted(info["mismatched_keys"])]
    if wrong:
        raise ModelError(f"{name!r} has weights of other shapes than its config.json says: {_some(wrong)}: give a config.json that fits")
    missing = sorted(info["missing_keys"])
    lacking = [key for key in missing if not (new_head and _of_head(key, model))]
    if lacking:
        others = f"; its checkpoint has {_some(unexpected)} instead" if unexpected else ""
        raise ModelError(f"{name!r} lacks {len(lacking)} weights of a {what}, such as {_some(lacking)}{others}: give a whole one")
    known = {_DIGITS.sub("*", key) for key in model.state_dict()}
    left = [key for key in unexpected if _DIGITS.search(key) and _DIGITS.sub("*", key) in known]
    if left:
        raise ModelError(f"{name!r} has more layers than its config.json says, such as {_some(left)}: give a config.json that fits")
    return missing


_DIGITS = re.compile(r"(?<=\.)\d+(?=\.)")  # the number of a layer, or of an expert


def _of_head(key: str, model: PreTrainedModel) -> bool:
    """Whether a weight is of what comes after the backbone; some backbones hold the pooling layer of classifiers."""
    return not key.startswith(f"{model.base_model_prefix}.") or "pooler" in key.split(".")


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (" …" if len(names) > 3 else "")


def _without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Dropout would make policy and reference differ at step 0; every field for it is set to 0, and those of dropped layers and noise."""
    config.classifier_dropout = 0.0  # absent means 0.1 to token classifiers
    # A switch, such as ESM's token_dropout, is no rate: it scales embeddings of its models.
    rates = {name: rate for name, rate in vars(config).items() if not isinstance(rate, bool)}
    for field in [f for f in rates if f.endswith(("dropout", "drop", "_pdrop", "dropout_prob", "jitter_noise", "jitter_eps"))]:
        setattr(config, field, 0.0)
    return config
