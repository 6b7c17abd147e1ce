"""What a reward model reads: a conversation and its last answer as token ids, the same in training and in scoring."""

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from ctrlrl.chat import Messages, chat_ids
from ctrlrl.control import neutralise
from ctrlrl.errors import DataError
from ctrlrl.inert import broken, special_texts
from ctrlrl.models.loading import load_tokenizer, within_positions
from ctrlrl.models.scorer_names import is_classifier


def longest_input(model: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """`max_length`, or what the model and its tokenizer can take, if that is less."""
    return min(tokenizer.model_max_length, within_positions(model, max_length))


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, response: str, limit: int, *, source: str = ""
) -> dict[str, list[int]]:
    """input_ids, attention_mask, and token_type_ids where the tokenizer makes them, of at most `limit` tokens.

    With a chat template the answer is the assistant's last message; other classifiers take (conversation, answer) as two texts. What
    is too long loses its beginning, since the answer is what is judged; a special token that opens the input stays. Controls in the prompt,
    and special tokens that a user or a policy spells, stay text.
    source: where the prompt stands, for errors.
    """
    messages = [{**m, "content": neutralise(m["content"])} for m in messages]
    if tokenizer.chat_template:
        ids = chat_ids(tokenizer, [*messages, {"role": "assistant", "content": response}], prompt=False, source=source)
        encoded = {"input_ids": ids, "attention_mask": [1] * len(ids)}
    else:
        prompt = messages[0]["content"] if len(messages) == 1 else "\n\n".join(f"{m['role'].title()}: {m['content']}" for m in messages)
        special = special_texts(tokenizer)
        encoded = dict(tokenizer(broken(prompt, special), broken(response, special), verbose=False))
    if len(encoded["input_ids"]) <= limit:
        return encoded
    kept = int(encoded["input_ids"][0] in tokenizer.all_special_ids and limit > 1)
    return {name: [*values[:kept], *values[kept - limit :]] for name, values in encoded.items()}


def reader_of(model: str) -> Callable[[Messages, str], None]:
    """A function of a prompt and of where it stands, which raises DataError if the reward model's chat template does not take it.

    It tries the first prompt of each sequence of roles; the others are as that one.
    """
    if not is_classifier(model):
        return lambda messages, source: None
    tokenizer, refusals = load_tokenizer(model), {}

    def read(messages: Messages, source: str) -> None:
        roles = tuple(m["role"] for m in messages)
        if roles not in refusals:
            refusals[roles] = ""
            try:
                encode_conversation(tokenizer, messages, "An answer.", tokenizer.model_max_length)
            except DataError as error:
                refusals[roles] = str(error)
        if refusals[roles]:
            raise DataError(f"{source}: the reward model cannot read it: {refusals[roles]}")

    return read
