"""Chat rendering: the only place where a control meets text ([SH] 2.1, 5), and the chat template that ships with a model.

A message is {"role": "system" | "user" | "assistant", "content": str}. The control is appended to the last user message, so
everything before it is a prefix shared by all controls.
"""

from collections.abc import Sequence

from ctrlrl.chat import OWN_TEMPLATE, Messages, chat_ids, dated, plain_chat_template
from ctrlrl.control import ATTRIBUTES, Control, neutralise, neutralise_jinja
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


def controlled(messages: Messages, suffix: str = "") -> list[dict[str, str]]:
    """`messages` with control-like text made inert and the operator's `suffix` appended to the last user message."""
    check_messages(messages)
    clean = [{"role": m["role"], "content": neutralise(m["content"])} for m in messages]
    if suffix:
        clean[-1]["content"] += " " + suffix
    return clean


def render(tokenizer, messages: Messages, suffix: str = "", *, source: str = "") -> list[int]:
    """Token ids of the prompt, ready for the response's first token. `suffix` is a spelled control or a template's sentence; `source`:
    where the prompt stands, for errors. Nothing in a message becomes a control, a special token or a turn's marker."""
    return chat_ids(tokenizer, controlled(messages, suffix), prompt=True, source=source)


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


def control_chat_template(template: str, literals: Sequence[str] | None = None) -> str:
    """A chat template that takes the control as the variables `helpful` and `harmless` and does what `render` does.

    literals: what must stay text in contents (chat.literals; None: the `<|…|>` of the template). Without the two variables it only
    makes contents inert. It raises for levels outside [0, 1], for one level without the other, for a control when the last message is
    not the user's, for content that is not text, for tool calls and reasoning content, and for a role with anything but letters in it.
    Applied to its own result it changes nothing.
    """
    template = dated(plain_chat_template(template))
    literals = written_markers(template) if literals is None else literals
    number = "(helpful is not number or harmless is not number or helpful is boolean or harmless is boolean)"
    refusals = {
        "(helpful is defined) != (harmless is defined)": "give both helpful and harmless, or neither",
        f"helpful is defined and {number}": "helpful and harmless must be numbers from 0 to 1",
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
        f"{checks}{{%- set ctrlrl = namespace(messages=[], text='') -%}}"
        "{%- for message in messages -%}"
        "{%- if message.content is not string -%}{{ raise_exception('content must be text') }}{%- endif -%}"
        "{%- if message.tool_calls or message.reasoning_content -%}"
        "{{ raise_exception('tool calls and reasoning content are not supported') }}{%- endif -%}"
        "{%- if message.role is not string or not message.role.isalpha() or not message.role.isascii() -%}"
        "{{ raise_exception('a role is a word') }}{%- endif -%}"
        "{%- set ctrlrl.text = message.content -%}"
        f"{neutralise_jinja('ctrlrl.text')}"
        f"{{%- if loop.last and helpful is defined -%}}{{%- set ctrlrl.text = ctrlrl.text ~ ' ' ~ {spelled} -%}}{{%- endif -%}}"
        f"{broken_jinja('ctrlrl.text', literals)}"
        "{%- set ctrlrl.messages = ctrlrl.messages + [{'role': message.role, 'content': ctrlrl.text}] -%}"
        "{%- endfor -%}"
        f"{{%- set messages = ctrlrl.messages -%}}{OWN_TEMPLATE}{newline}{template}"
    )
