"""Models and tokenizers by local path or hub name, checked before anything is started. Weights are read from safetensors only."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from ctrlrl.errors import ModelError
from ctrlrl.prompts import control_chat_template

# Their bars about loading and writing shards would tear up the jobs' own progress.
disable_progress_bar()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_config(name: str) -> PretrainedConfig:
    """The configuration of a model; raises ModelError if there is no such directory or hub name."""
    return _read(name, "model", lambda: AutoConfig.from_pretrained(existing(name)))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; raises ModelError if it is missing."""
    return _read(name, "tokenizer", lambda: AutoTokenizer.from_pretrained(existing(name)))


def load_policy(name: str, dtype: str, attention: str = "sdpa") -> PreTrainedModel:
    """A causal language model without dropout; ModelError if its checkpoint lacks weights, which would start at random."""
    config = _without_dropout(load_config(name))
    model, missing = _read_trained(AutoModelForCausalLM, name, "causal language model", config, dtype, attention)
    if missing:
        raise ModelError(f"{name!r} lacks {len(missing)} weights of a causal language model, such as {missing[0]!r}: give a whole one")
    return model


def load_value_model(name: str, dtype: str, attention: str = "sdpa") -> PreTrainedModel:
    """A causal backbone with one value per token. A head that the checkpoint lacks starts at zero, so the first values are 0."""
    config = _without_dropout(load_config(name))
    config.num_labels = 1
    model, missing = _read_trained(AutoModelForTokenClassification, name, "value model", config, dtype, attention)
    _zero_new_head(model, missing)
    return model


def load_classifier(name: str, dtype: str, attention: str = "sdpa") -> PreTrainedModel:
    """A sequence classifier with one output, to be trained: any encoder or causal backbone, or a reward model. Without dropout.

    A head that the checkpoint lacks is drawn at random (a head of zeros would keep the backbone from learning for long, at the small
    learning rates of fine-tuning). ModelError for a classifier with another number of labels.
    """
    check_backbone(name)
    config = _without_dropout(load_config(name))
    config.num_labels = 1
    if config.pad_token_id is None:
        tokenizer = load_tokenizer(name)
        config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return _read_trained(AutoModelForSequenceClassification, name, "sequence classifier", config, dtype, attention)[0]


def reads_token_types(name: str) -> bool:
    """Whether the model tells two texts apart by token types, and is given them (not in a chat, which is one text)."""
    tokenizer = load_tokenizer(name)
    return not tokenizer.chat_template and "token_type_ids" in tokenizer.model_input_names


def check_backbone(name: str) -> None:
    """Raise ModelError if `name` is a classifier with another number of labels than 1; a backbone without a head is fine."""
    config = load_config(name)
    classifier = any("SequenceClassification" in a for a in config.architectures or [])
    if classifier and config.num_labels != 1:
        raise ModelError(
            f"{name!r} is a classifier with {config.num_labels} labels; a reward model has exactly 1 output: "
            "give a backbone, or a classifier with num_labels = 1"
        )


def load_reward_model(name: str, dtype: str) -> PreTrainedModel:
    """A sequence classifier with one output; raises ModelError for any other number of labels."""
    check_reward_model(name)
    model = _read(
        name,
        "sequence classifier",
        lambda: AutoModelForSequenceClassification.from_pretrained(existing(name), dtype=DTYPES[dtype], use_safetensors=True),
    )
    return model.eval().requires_grad_(False)


def check_reward_model(name: str) -> None:
    """Raise ModelError unless `name` is a sequence classifier with one label; reads the configuration only."""
    config = load_config(name)
    architectures = config.architectures or []
    if not any("SequenceClassification" in a for a in architectures):
        raise ModelError(
            f"reward model {name!r} is a {', '.join(architectures) or config.model_type}: give a sequence classifier with one output"
        )
    if config.num_labels != 1:
        raise ModelError(
            f"reward model {name!r} has {config.num_labels} labels; a reward model has exactly 1 output: train it with num_labels = 1"
        )


def check_causal(name: str, role: str) -> None:
    """Raise ModelError unless `name`, the run's `role`, is a causal language model; reads the configuration only."""
    config = load_config(name)
    if not any("CausalLM" in a or "LMHead" in a for a in config.architectures or []):
        raise ModelError(f"{role} {name!r} is a {', '.join(config.architectures or []) or config.model_type}: give a causal language model")


def check_policy(name: str) -> None:
    """Raise ModelError unless `name` is a causal language model whose tokenizer has a chat template."""
    check_causal(name, "policy")
    if not load_tokenizer(name).chat_template:
        raise ModelError(f"the tokenizer of {name!r} has no chat template: give a chat model, or set tokenizer.chat_template and save it")


def within_positions(name: str, max_length: int) -> int:
    """`max_length` tokens, or what the model's position embeddings take, if that is less."""
    return min(max_length, getattr(load_config(name), "max_position_embeddings", None) or max_length)


def end_token_ids(name: str) -> list[int]:
    """Every token that ends a response: the tokenizer's end token and those of the generation configuration."""
    tokenizer = load_tokenizer(name)
    ends = {tokenizer.eos_token_id}
    try:
        listed = GenerationConfig.from_pretrained(existing(name)).eos_token_id
        ends |= set(listed if isinstance(listed, list) else [listed])
    except OSError:
        pass  # a model may come without a generation configuration
    ends.discard(None)
    if not ends:
        raise ModelError(f"{name!r} names no end token: set eos_token in its tokenizer or generation_config.json")
    return sorted(ends)


def final_token_id(name: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a response in training: the tokenizer's end token, else the generation configuration's first."""
    return end_token_ids(name)[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def save_control_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """The tokenizer beside an exported model, with a chat template that takes the control as `helpful` and `harmless`."""
    template = tokenizer.chat_template
    tokenizer.chat_template = control_chat_template(template)
    tokenizer.save_pretrained(directory)
    tokenizer.chat_template = template


def _zero_new_head(model: PreTrainedModel, missing: list[str]) -> None:
    """Set the last layer, of one output, to 0 where the checkpoint lacks it; under ZeRO-3 a parameter's data is in its shard."""
    for key in missing:
        parameter = model.get_parameter(key)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if not key.startswith(f"{model.base_model_prefix}.") and shape[0] == 1:
            getattr(parameter, "ds_tensor", parameter).data.zero_()


def _read_trained(
    kind: type, name: str, what: str, config: PretrainedConfig, dtype: str, attention: str
) -> tuple[PreTrainedModel, list[str]]:
    """A model to be trained, and the names of the weights that its checkpoint lacks."""
    model, info = _read(
        name,
        what,
        lambda: kind.from_pretrained(
            existing(name),
            config=config,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
        ),
    )
    return model, sorted(info["missing_keys"])


def existing(name: str) -> str:
    """`name`, with `~` of a path expanded; a path that does not exist is refused before the hub is asked for it."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    path = Path(name).expanduser()
    if looks_local and not path.is_dir():
        raise ModelError(f"model directory {name!r} does not exist: give a directory that save_pretrained wrote, or a hub name")
    return str(path) if path.is_dir() else name


def _read(name: str, what: str, load):
    try:
        return load()
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ModelError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot load the {what} {name!r}: {reason} (give a local directory with safetensors weights, or a hub name)"
        ) from error


def _without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Dropout would make policy and reference differ at step 0; every dropout field of the configuration is set to 0."""
    config.classifier_dropout = 0.0  # absent means 0.1 to token classifiers
    for field in [f for f in vars(config) if f.endswith(("dropout", "_pdrop", "dropout_prob"))]:
        setattr(config, field, 0.0)
    return config
