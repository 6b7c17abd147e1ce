"""Tokens of a model and their places: which end a response, which lie beyond its embedding, how many positions it has."""

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctrlrl.chat import refusals_told
from ctrlrl.errors import DataError, ModelError
from ctrlrl.models.reading import has_tokenizer, load_config, load_generation_config, load_tokenizer

_ANSWER = "ctrlrl answer"


def end_token_ids(name: str) -> list[int]:
    """Every token that ends a response: the tokenizer's, the chat template's after an answer, those of the generation configuration
    (without one: of the configuration). Some models spell them as text, or have nulls among them."""
    tokenizer, generation = load_tokenizer(name), load_generation_config(name)
    listed = (generation or load_config(name)).eos_token_id
    ends = {tokenizer.eos_token_id, template_end(tokenizer)} | {
        _token_id(tokenizer, end, name) for end in (listed if isinstance(listed, (list, tuple)) else [listed])
    }
    ends.discard(None)
    rows = getattr(load_config(name).get_text_config(), "vocab_size", None)
    if wrong := [end for end in ends if end < 0 or (rows and end >= rows)]:
        raise ModelError(f"{name!r} lists the end token {wrong[0]}, and its embedding has {rows} rows: correct eos_token_id")
    if not ends:
        raise ModelError(f"{name!r} names no end token: set eos_token in its tokenizer or generation_config.json")
    return sorted(ends)


def final_token_id(name: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a response in training: the one that the chat template writes after an answer (`<end_of_turn>` of Gemma,
    whose end token is `<eos>`); without one the tokenizer's end token, else the generation configuration's first."""
    ends = (template_end(tokenizer), tokenizer.eos_token_id)
    return next((end for end in ends if end is not None), None) or end_token_ids(name)[0]


def template_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first special token that the chat template writes after an answer; None if there is none, or no chat template."""
    if not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _ANSWER}]
    try:
        with refusals_told(tokenizer, chat):
            after = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(_ANSWER)[2]
    except DataError:
        return None  # the same refusal is told, with its place, when data are rendered
    special = set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((i for i in tokenizer(after, add_special_tokens=False)["input_ids"] if i in special), None)


def _token_id(tokenizer: PreTrainedTokenizerBase, end: int | str | None, name: str) -> int | None:
    """The id of an end token that is given by number or as text."""
    if end is None or (isinstance(end, int) and not isinstance(end, bool)):
        return end
    known = tokenizer.get_vocab().get(end) if isinstance(end, str) else None
    if known is None:
        raise ModelError(f"{name!r} lists the end token {end!r}, which its tokenizer does not have: correct eos_token_id")
    return known


def tokens_beyond(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[str]:
    """Tokens that a model with an embedding of `rows` cannot read, in order of their ids; not those that no text has.

    The padding token and the mask have no part in text, and padding is done with tokens of the embedding.
    """
    unused = {tokenizer.pad_token, getattr(tokenizer, "mask_token", None)} - {tokenizer.eos_token, tokenizer.bos_token}
    found = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows and token not in unused)
    return [token for _, token in found]


def check_same_vocabulary(policy: str, other: str, role: str) -> None:
    """Raise ModelError unless the tokens of `policy` mean the same to `other`, which reads them as the run's `role`.

    A directory without a tokenizer is taken to share the policy's.
    """
    if other == policy or not has_tokenizer(other):
        return
    tokenizer = load_tokenizer(policy)
    ours, theirs = tokenizer.get_vocab(), load_tokenizer(other).get_vocab()
    differ = sorted((i, token) for token, i in ours.items() if theirs.get(token) != i and token != tokenizer.pad_token)
    if differ:
        i, token = differ[0]
        there = f"is {theirs[token]}" if token in theirs else "is missing"
        raise ModelError(
            f"{role} {other!r} has another vocabulary than the policy {policy!r}: {len(differ)} tokens differ, {token!r} is {i} in the "
            f"policy's tokenizer and {there} in the other: give a {role} that descends from the same model"
        )


def embedding_rows(model: PreTrainedModel) -> int:
    """How many tokens the model can read; ModelError for one that reads something else."""
    try:
        weight = model.get_input_embeddings().weight
    except NotImplementedError:
        raise ModelError(f"a {type(model).__name__} has no table of tokens: give a model that reads tokens") from None
    return getattr(weight, "ds_shape", weight.shape)[0]  # under ZeRO-3 the parameter itself is empty


def counted_positions(model: nn.Module) -> tuple[int, int] | None:
    """The padding token from whose id on the model counts positions, and the tokens that its table then holds (RoBERTa and its kin:
    514 rows hold 512 tokens); None for a model that counts from 0, or without a table."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2] and module.padding_idx is not None:
            return module.padding_idx, module.num_embeddings - module.padding_idx - 1
    return None
