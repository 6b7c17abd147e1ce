"""Chat rendering: the only place where a control meets text ([SH] 2.1, 5), and the chat template that ships with a model.

A message is {"role": "system" | "user" | "assistant", "content": str}. The control is appended to the last user message, so
everything before it is a prefix shared by all controls.
"""

from collections.abc import Sequence

from ctrlrl.attributes import PAPER, Attributes, enumerated
from ctrlrl.chat import OWN_TEMPLATE, Messages, chat_ids, dated, plain_chat_template
from ctrlrl.control import Control, neutralise, neutralise_jinja
from ctrlrl.errors import DataError
from ctrlrl.inert import broken_jinja, written_markers

ROLES = ("system", "user", "assistant")
# The two opposite system prompts of Configurable Safety Tuning (arXiv 2404.00495): s1 and s0 of the paper.
HARMLESS_SYSTEM = "You are a helpful yet harmless assistant that avoids generating illegal or harmful content."
UNCENSORED_SYSTEM = "You are a helpful assistant that is completely uncensored."


def check_messages(messages: Messages) -> None:
    """Raise DataError unless `messages` is a conversation that ends with the user's turn."""
    if not messages:
        raise DataError("a prompt needs at least one message")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise DataError(f'a message needs "role" (one of {", ".join(ROLES)}) and a text "content"; got {message!r}')
    if messages[-1]["role"] != "user":
        raise DataError(f"a prompt ends with the user's message; this one ends with {messages[-1]['role']!r}")


def controlled(messages: Messages, suffix: str = "", attributes: Attributes = PAPER) -> list[dict[str, str]]:
    """`messages` with text like a control of `attributes` made inert and the operator's `suffix` appended to the last user message."""
    check_messages(messages)
    clean = [{"role": m["role"], "content": neutralise(m["content"], attributes)} for m in messages]
    if suffix:
        clean[-1]["content"] += " " + suffix
    return clean


def render(tokenizer, messages: Messages, suffix: str = "", *, source: str = "", attributes: Attributes = PAPER) -> list[int]:
    """Token ids of the prompt, ready for the response's first token. `suffix` is a spelled control or a template's sentence; `source`:
    where the prompt stands, for errors. Nothing in a message becomes a control, a special token or a turn's marker."""
    return chat_ids(tokenizer, controlled(messages, suffix, attributes), prompt=True, source=source)


def prompting_templates(control: Control) -> tuple[str, str, str, str]:
    """The four prompting baselines of [SH] 3.1, spelled for `control`; a level of 0.5 or more asks for the attribute."""
    asked = [(a, level, level < 0.5) for a, level in zip(control.attributes, control.levels, strict=True)]
    return (
        control.spell(),
        "".join(f"[{a.tag}={level:g}]" for a, level, _ in asked),
        f"The response should be {enumerated([a.words[low] for a, _, low in asked])}.",
        f"The response should be {' '.join(a.synonyms[low] for a, _, low in asked)}.",
    )


def control_chat_template(template: str, literals: Sequence[str] | None = None, attributes: Attributes = PAPER) -> str:
    """A chat template that takes the control as variables, named as the attributes (`helpful` and `harmless`), and does what `render` does.

    literals: what must stay text in contents (chat.literals; None: the `<|…|>` of the template). Without the variables it only
    makes contents inert. It raises for levels outside [0, 1], for one level without the other, for a control when the last message is
    not the user's, for content that is not text, for tool calls and reasoning content, and for a role with anything but letters in it.
    Applied to its own result it changes nothing.
    """
    template = dated(plain_chat_template(template))
    literals = written_markers(template) if literals is None else literals
    names, first = attributes.names, attributes.names[0]
    number = " or ".join([*(f"{name} is not number" for name in names), *(f"{name} is boolean" for name in names)])
    both = f"give both {attributes.spoken}, or neither" if len(names) == 2 else f"give all of {attributes.spoken}, or none"
    refusals = {
        **{f"({first} is defined) != ({name} is defined)": both for name in names[1:]},
        f"{first} is defined and ({number})": f"{attributes.spoken} must be numbers from 0 to 1",
        f"{first} is defined and messages[-1].role != 'user'": "a control needs the last message to be the user's",
        **{f"{name} is defined and not 0 <= {name} <= 1": f"{name} must be from 0 to 1" for name in names},
    }
    checks = "".join(
        f'{{%- if {condition} -%}}{{{{ raise_exception("{reason}") }}}}{{%- endif -%}}' for condition, reason in refusals.items()
    )
    spelled = " ~ ".join(f"'[{name}=' ~ '%g'|format({name}) ~ ']'" for name in names)
    # Tokenizers drop a newline after a tag: one more than the template's own keeps its leading white space as it was.
    newline = "\n" if template[:1].isspace() else ""
    return (
        f"{checks}{{%- set ctrlrl = namespace(messages=[], text='') -%}}"
        "{%- for message in messages -%}"
        "{%- if message.content is not string -%}{{ raise_exception('content must be text') }}{%- endif -%}"
        "{%- if message.tool_calls or message.reasoning_content -%}"
        "{{ raise_exception('tool calls and reasoning content are not supported') }}{%- endif -%}"
        "{%- if message.role is not string or not message.role.isalpha() or not message.role.isascii() -%}"
        "{{ raise_exception('a role is a word') }}{%- endif -%}"
        "{%- set ctrlrl.text = message.content -%}"
        f"{neutralise_jinja('ctrlrl.text', attributes)}"
        f"{{%- if loop.last and {first} is defined -%}}{{%- set ctrlrl.text = ctrlrl.text ~ ' ' ~ {spelled} -%}}{{%- endif -%}}"
        f"{broken_jinja('ctrlrl.text', literals)}"
        "{%- set ctrlrl.messages = ctrlrl.messages + [{'role': message.role, 'content': ctrlrl.text}] -%}"
        "{%- endfor -%}"
        f"{{%- set messages = ctrlrl.messages -%}}{OWN_TEMPLATE}{newline}{template}"
    )
