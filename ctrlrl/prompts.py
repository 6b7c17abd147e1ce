"""Chat rendering: the only place where a control meets text ([SH] 2.1, 5), and the chat template that ships with a model.

A message is {"role": "system" | "user" | "assistant", "content": str}. The control is appended to the last user message, so
everything before it is a prefix shared by all controls.
"""
from collections.abc import Sequence

from ctrlrl.control import ATTRIBUTES, Control, neutralise, neutralise_jinja
from ctrlrl.errors import DataError, ModelError

Messages = Sequence[dict[str, str]]
ROLES = ("system", "user", "assistant")


def check_messages(messages: Messages) -> None:
    """Raise DataError unless `messages` is a conversation that ends with the user's turn."""
    if not messages:
        raise DataError("a prompt needs at least one message")
    for message in messages:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
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


def render(tokenizer, messages: Messages, suffix: str = "") -> list[int]:
    """Token ids of the prompt, ready for the response's first token. `suffix` is a spelled control or a template's sentence."""
    if not tokenizer.chat_template:
        raise ModelError(f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: give a chat model, or set tokenizer.chat_template and save it")
    ids = tokenizer.apply_chat_template(controlled(messages, suffix), add_generation_prompt=True, tokenize=True, return_dict=False)
    return list(ids)


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

    Without the two variables it only neutralises. Levels outside [0, 1] raise in the template.
    """
    checks = "".join(
        f"{{%- if {name} < 0 or {name} > 1 -%}}{{{{ raise_exception('{name} must be from 0 to 1') }}}}{{%- endif -%}}" for name in ATTRIBUTES
    )
    spelled = " ~ ".join(f"'[{name}=' ~ '%g'|format({name}) ~ ']'" for name in ATTRIBUTES)
    return (
        "{%- set ctrlrl = namespace(messages=[]) -%}"
        "{%- for message in messages -%}"
        f"{{%- set text = {neutralise_jinja('message.content')} -%}}"
        "{%- if loop.last and message.role == 'user' and helpful is defined and harmless is defined -%}"
        f"{checks}{{%- set text = text ~ ' ' ~ {spelled} -%}}"
        "{%- endif -%}"
        "{%- set ctrlrl.messages = ctrlrl.messages + [{'role': message.role, 'content': text}] -%}"
        "{%- endfor -%}"
        "{%- set messages = ctrlrl.messages -%}" + template
    )
