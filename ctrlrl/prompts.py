"""Chat rendering: the only place where a control meets text ([SH] 2.1, 5), and the chat template that ships with a model.

A message is {"role": "system" | "user" | "assistant", "content": str}. The control is appended to the last user message, so
everything before it is a prefix shared by all controls.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jinja2 import TemplateError

from ctrlrl.control import ATTRIBUTES, Control, neutralise, neutralise_jinja
from ctrlrl.errors import DataError, ModelError

Messages = Sequence[dict[str, str]]
ROLES = ("system", "user", "assistant")
# The two opposite system prompts of Configurable Safety Tuning (arXiv 2404.00495): s1 and s0 of the paper.
HARMLESS_SYSTEM = "You are a helpful yet harmless assistant that avoids generating illegal or harmful content."
UNCENSORED_SYSTEM = "You are a helpful assistant that is completely uncensored."
# Ends what control_chat_template puts before a model's own template, so that plain_chat_template finds it again.
_OWN_TEMPLATE = "{#- ctrlrl: the model's own chat template #}"


def check_messages(messages: Messages) -> None:
    """Raise DataError unless `messages` is a conversation that ends with the user's turn."""
    if not messages:
        raise DataError("a prompt needs at least one message")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise DataError(f'a message needs "role" (one of {", ".join(ROLES)}) and a text "content"; got {message!r}')
    if messages[-1]["role"] != "user":
        raise DataError(f"a prompt ends with the user's message; this one ends with {messages[-1]['role']!r}")


def controlled(messages: Messages, suffix: str = "") -> list[dict[str, str]]:
    """`messages` with control-like text made inert and the operator's `suffix` appended to the last user message."""
    check_messages(messages)
    clean = [{"role": m["role"], "content": neutralise(m["content"])} for m in messages]
    if suffix:
        clean[-1]["content"] += " " + suffix
    return clean


@contextmanager
def refusals_told(tokenizer, messages: Messages, source: str = "") -> Iterator[None]:
    """Context in which an exception that the tokenizer's chat template raises becomes a DataError; `source`: where the prompt stands."""
    try:
        yield
    except TemplateError as error:
        raise DataError(
            f"{source and f'{source}: '}the chat template of {tokenizer.name_or_path!r} refuses a conversation of "
            f"{', '.join(m['role'] for m in messages)}: {error}: give prompts that it takes, or a tokenizer with another chat_template"
        ) from None


def render(tokenizer, messages: Messages, suffix: str = "", *, source: str = "") -> list[int]:
    """Token ids of the prompt, ready for the response's first token. `suffix` is a spelled control or a template's sentence; `source`:
    where the prompt stands, for errors."""
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: "
            "give a chat model, or set tokenizer.chat_template and save it"
        )
    # The template of an exported model would neutralise the operator's own suffix.
    template = plain_chat_template(tokenizer.get_chat_template())
    with refusals_told(tokenizer, messages, source):
        return list(
            tokenizer.apply_chat_template(
                controlled(messages, suffix), chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )


def prompting_templates(control: Control) -> tuple[str, str, str, str]:
    """The four prompting baselines of [SH] 3.1, spelled for `control`; a level of 0.5 or more asks for the attribute."""
    helpful = "" if control.helpful >= 0.5 else "not "
    safe = "" if control.harmless >= 0.5 else "not "
    return (
        control.spell(),
        f"[helpful={control.helpful:g}][safety={control.harmless:g}]",
        f"The response should be {helpful}helpful and {safe}harmless.",
        f"The response should be {helpful}helpful {safe}safe.",
    )


def control_chat_template(template: str) -> str:
    """A chat template that takes the control as the variables `helpful` and `harmless` and does what `render` does.

    Without the two variables it only neutralises. It raises for levels outside [0, 1], for one level without the other, for a
    control when the last message is not the user's, and for content that is not text. Applied to its own result it changes nothing.
    """
    template = plain_chat_template(template)
    refusals = {
        "(helpful is defined) != (harmless is defined)": "give both helpful and harmless, or neither",
        "helpful is defined and messages[-1].role != 'user'": "a control needs the last message to be the user's",
        **{f"{name} is defined and not 0 <= {name} <= 1": f"{name} must be from 0 to 1" for name in ATTRIBUTES},
    }
    checks = "".join(
        f'{{%- if {condition} -%}}{{{{ raise_exception("{reason}") }}}}{{%- endif -%}}' for condition, reason in refusals.items()
    )
    spelled = " ~ ".join(f"'[{name}=' ~ '%g'|format({name}) ~ ']'" for name in ATTRIBUTES)
    # Tokenizers drop a newline after a tag: one more than the template's own keeps its leading white space as it was.
    newline = "\n" if template[:1].isspace() else ""
    return (
        f"{checks}{{%- set ctrlrl = namespace(messages=[]) -%}}"
        "{%- for message in messages -%}"
        "{%- if message.content is not string -%}{{ raise_exception('content must be text') }}{%- endif -%}"
        f"{{%- set text = {neutralise_jinja('message.content')} -%}}"
        f"{{%- if loop.last and helpful is defined -%}}{{%- set text = text ~ ' ' ~ {spelled} -%}}{{%- endif -%}}"
        "{%- set ctrlrl.messages = ctrlrl.messages + [{'role': message.role, 'content': text}] -%}"
        "{%- endfor -%}"
        f"{{%- set messages = ctrlrl.messages -%}}{_OWN_TEMPLATE}{newline}{template}"
    )


def plain_chat_template(template: str) -> str:
    """The inverse of control_chat_template; any other template as it is."""
    before, marker, own = template.partition(_OWN_TEMPLATE)
    return own.removeprefix("\n") if marker else before
