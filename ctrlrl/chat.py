"""Chat templates as functions of the conversation: which template is used, its date, and that it keeps every message's text.

A template may drop a system turn, reorder turns, cut contents or print the day's date, and then a control or a system prompt is silently
gone. Here such a template is refused by name, and a date in it is always DATE.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from functools import lru_cache
from typing import Annotated

from jinja2 import TemplateError
from pydantic import Field

from ctrlrl.errors import CtrlrlError, DataError, ModelError, RecipeError
from ctrlrl.inert import broken, markers, respelled, special_texts

Messages = Sequence[dict[str, str]]
DATE = date(2026, 1, 1)  # what a template that prints today's date prints on every day
# Ends what control_chat_template puts before a model's own template, so that plain_chat_template finds it again.
OWN_TEMPLATE = "{#- ctrlrl: the model's own chat template #}"
# Variables of the chat template by recipe, such as { enable_thinking = false }. An empty one is no part of a dumped recipe.
ChatVariables = Annotated[dict[str, bool | int | float | str], Field(exclude_if=lambda variables: not variables)]
_OURS = ("helpful", "harmless", "messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception", "ctrlrl")
# What a template may raise: it is a program.
_RAISED = (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError)
_HARMLESS = re.compile(r"\{#.*?#\}|strftime_now\s+is\s+(not\s+)?defined", re.DOTALL)  # comments, and whether there is a date
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\s*\(")
_TODAY = re.compile(r"""strftime_now\(\s*(["'])((?:(?!\1).)*)\1\s*\)""")


def plain_chat_template(template: str) -> str:
    """The inverse of control_chat_template; any other template as it is."""
    before, marker, own = template.partition(OWN_TEMPLATE)
    return own.removeprefix("\n") if marker else before


def own_template(tokenizer) -> str:
    """The model's own chat template (of named ones: "default"), its date fixed; ModelError if there is none."""
    template = tokenizer.chat_template
    name = tokenizer.name_or_path
    if isinstance(template, dict):
        if "default" not in template:
            raise ModelError(f'the chat templates of {name!r} are named {", ".join(sorted(template))}: name the one to be used "default"')
        template = template["default"]
    if not template:
        raise ModelError(f"the tokenizer of {name!r} has no chat template: give a chat model, or set tokenizer.chat_template and save it")
    return dated(plain_chat_template(template), name)


def with_variables(tokenizer, variables: ChatVariables):
    """`tokenizer`, its chat template with `variables` as defaults, so that they hold wherever it goes, in an export too.

    RecipeError for a variable that the template does not read, or that is not the recipe's to set.
    """
    if not variables:
        return tokenizer
    template, settings = own_template(tokenizer), ""
    for name, value in variables.items():
        if name in (*_OURS, *tokenizer.special_tokens_map) or not name.isidentifier():
            raise RecipeError(f"chat.{name} is not for a recipe to set: leave it out")
        if not re.search(rf"\b{name}\b", template):
            raise RecipeError(f"chat.{name}: the chat template of {_name(tokenizer)} has no such variable: leave it out")
        written = str(value).lower() if isinstance(value, bool) else json.dumps(value, ensure_ascii=False)
        settings += f"{{%- if {name} is not defined -%}}{{%- set {name} = {written} -%}}{{%- endif -%}}"
    newline = "\n" if template[:1].isspace() else ""
    tokenizer.chat_template = f"{settings}{{#- ctrlrl: variables of the recipe #}}{newline}{template}"
    return tokenizer


def dated(template: str, name: str = "") -> str:
    """`template` with DATE where it asks for the day's date; ModelError if it asks in another way than by a written format, or draws
    at random: then the same conversation would not always be the same prompt."""
    fixed = _TODAY.sub(lambda found: repr(DATE.strftime(found[2])), template)
    plain = _HARMLESS.sub("", fixed)
    if drawn := _RANDOM.search(plain):
        raise ModelError(f"the chat template of {name!r} draws at random ({drawn[0]!r}): write a text in its place")
    if "strftime_now" in plain:
        raise ModelError(f"the chat template of {name!r} prints the day's date by a format of its own making: write the date into it")
    return fixed


def literals(tokenizer) -> list[str]:
    """What must stay text in contents: special tokens, and the bracketed words that the template writes around messages."""
    template = own_template(tokenizer)
    return list(_literals(tokenizer, template, len(tokenizer)))


@contextmanager
def refusals_told(tokenizer, messages: Messages, source: str = "") -> Iterator[None]:
    """Context in which an exception that the tokenizer's chat template raises becomes a DataError; `source`: where the prompt stands."""
    try:
        yield
    except _RAISED as error:
        if isinstance(error, CtrlrlError):
            raise
        raise DataError(
            f"{source and f'{source}: '}the chat template of {tokenizer.name_or_path!r} refuses a conversation of "
            f"{', '.join(m['role'] for m in messages)}: {error}: {_remedy(messages)}"
        ) from None


def chat_ids(tokenizer, messages: Messages, *, prompt: bool, source: str = "") -> list[int]:
    """Token ids of a conversation whose contents stay text. prompt: whether the response's first token comes next.

    DataError, which names `source`, if the template refuses it, or if a message's text is not in what it writes, in order.
    """
    template = own_template(tokenizer)
    inert = [{**m, "content": broken(m["content"], literals(tokenizer))} for m in messages]
    with refusals_told(tokenizer, messages, source):
        specials = _probe(tokenizer, template, tuple(m["role"] for m in messages), prompt)
        text = _written(tokenizer, template, inert, prompt)
    missing = _first_missing(text, inert)
    if missing is None and specials is not None:
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if _count_special(tokenizer, ids) > specials:
            raise DataError(f"{source and f'{source}: '}the text of a message has special tokens in the tokenizer of {_name(tokenizer)}")
        return ids
    dropped = messages[missing or 0]["role"] if missing is not None else "a"
    raise DataError(
        f"{source and f'{source}: '}the chat template of {_name(tokenizer)} does not keep the text of {dropped} message in a conversation "
        f"of {', '.join(m['role'] for m in messages)}: {_remedy(messages)}"
    )


def _remedy(messages: Messages) -> str:
    moved = " (the system text at the head of the user's message)" if any(m["role"] == "system" for m in messages) else ""
    return f"give prompts that it takes{moved}, or a tokenizer with another chat_template"


def text_ids(tokenizer, texts: Sequence[str], sources: Sequence[str]) -> list[list[int]]:
    """Token ids of answers that are given as text, as they stand behind a prompt; the text stays text as a message's does.

    `sources`: where each answer stands, for errors.
    """
    inert, before = [broken(text, literals(tokenizer)) for text in texts], _before_answers(tokenizer, own_template(tokenizer))
    found = [_ids_after(tokenizer, before, text) for text in inert] if before else _plain_ids(tokenizer, inert)
    for ids, source in zip(found, sources, strict=True):
        if _count_special(tokenizer, ids):
            raise DataError(f"{source}: the answer has special tokens in the tokenizer of {_name(tokenizer)}")
    return found


@lru_cache(maxsize=64)
def _before_answers(tokenizer, template: str) -> str:
    """The last character of a rendered prompt if an answer's tokens depend on it (tokenizers that put a space before a text that
    stands alone), as the template's own rendering of an answer tells; else nothing."""
    asked, answer = [{"role": "user", "content": "Hello"}], "Hello"
    try:
        prompt = chat_ids(tokenizer, asked, prompt=True)
        whole = chat_ids(tokenizer, [*asked, {"role": "assistant", "content": answer}], prompt=False)
        last = _written(tokenizer, template, asked, True)[-1:]
    except DataError:
        return ""  # no template for answers, so nothing tells
    alone, after = _plain_ids(tokenizer, [answer])[0], _ids_after(tokenizer, last, answer)
    starts = [whole[: len(prompt) + len(ids)] == [*prompt, *ids] for ids in (alone, after)]
    return last if starts == [False, True] else ""


def _ids_after(tokenizer, before: str, text: str) -> list[int]:
    """Token ids of `text` behind `before`; of `text` alone where the two share a token."""
    first, both, alone = _plain_ids(tokenizer, [before, before + text, text])
    return both[len(first) :] if both[: len(first)] == first else alone


def _plain_ids(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def check_exportable(tokenizer) -> None:
    """Raise ModelError if the tokenizer makes special tokens of other spellings than their own: `render` refuses such a text, but the
    chat template of an export would let it pass."""
    spellings = [text for special in special_texts(tokenizer) for text in respelled(special)]
    found = _plain_ids(tokenizer, [broken(text, literals(tokenizer)) for text in spellings])
    forged = next((text for text, ids in zip(spellings, found, strict=True) if _count_special(tokenizer, ids)), None)
    if forged is not None:
        raise ModelError(
            f"the tokenizer of {_name(tokenizer)} makes a special token of {forged!r}: behind an exported chat template a user could write "
            'one; set "normalized": false for its special tokens in tokenizer.json'
        )


def _name(tokenizer) -> str:
    return repr(tokenizer.name_or_path)


def _written(tokenizer, template: str, messages: Messages, prompt: bool) -> str:
    return tokenizer.apply_chat_template(list(messages), chat_template=template, add_generation_prompt=prompt, tokenize=False)


def _first_missing(text: str, messages: Messages) -> int | None:
    """Index of the first message whose text, but for white space around it, does not follow those before it."""
    place = 0
    for i, message in enumerate(messages):
        content = message["content"].strip()
        found = text.find(content, place)
        if found < 0:
            return i
        place = found + len(content)
    return None


@lru_cache(maxsize=1024)
def _probe(tokenizer, template: str, roles: tuple[str, ...], prompt: bool) -> int | None:
    """Special tokens that the template writes around a conversation of these roles; None if it drops or moves a message."""
    messages = [{"role": role, "content": f"message{i}of{len(roles)}"} for i, role in enumerate(roles)]
    text = _written(tokenizer, template, messages, prompt)
    if _first_missing(text, messages) is not None:
        return None
    return _count_special(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


def _count_special(tokenizer, ids: Sequence[int]) -> int:
    special = _special_ids(tokenizer, len(tokenizer))
    return sum(token in special for token in ids)


@lru_cache(maxsize=64)
def _special_ids(tokenizer, _size: int) -> frozenset[int]:
    """Ids of special tokens but the unknown one, which any text can have."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset((added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id})


@lru_cache(maxsize=64)
def _literals(tokenizer, template: str, _size: int) -> tuple[str, ...]:
    shapes = (("user",), ("user", "assistant", "user"), ("system", "user"), ("system", "user", "assistant", "user"))
    written = []
    for roles in shapes:
        try:
            written.append(_written(tokenizer, template, [{"role": role, "content": "text"} for role in roles], False))
        except _RAISED:
            continue  # it does not take such a conversation
    found = {*special_texts(tokenizer), *markers(written)}
    return tuple(sorted(found, key=lambda text: (-len(text), text)))
