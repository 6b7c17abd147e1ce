"""Text that stays text: nothing that a user or a policy writes becomes a special token or a turn's marker.

Special tokens and markers get a space after their first character. Text without any of them is not touched.
"""

import re
from collections.abc import Sequence

# Words in brackets that a template writes around messages, such as [INST], <<SYS>>, <|im_start|>.
_MARKER = re.compile(r"\[[^\[\]\s]+\]|<+[^<>\s]+>+")


def broken(text: str, literals: Sequence[str]) -> str:
    """`text` with a space after the first character of every one of `literals` in it."""
    for literal in literals:
        text = text.replace(literal, f"{literal[0]} {literal[1:]}")
    return text


def special_texts(tokenizer) -> list[str]:
    """The spelling of every special token, longest first."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted((t for t in added | set(tokenizer.all_special_tokens) if len(t) > 1), key=lambda t: (-len(t), t))


def respelled(text: str) -> list[str]:
    """`text`, and spellings of it that a normalising tokenizer may undo: case, full width, and characters that it drops."""
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)
    return [text, text.lower(), text.upper(), wide, *(f"{text[:2]}{dropped}{text[2:]}" for dropped in ("\u0301", "\u200b", "\x01"))]


def markers(rendered: Sequence[str]) -> list[str]:
    """Bracketed words that a template writes around messages. rendered: conversations of placeholder messages."""
    return sorted({marker for text in rendered for marker in _MARKER.findall(text)}, key=lambda t: (-len(t), t))


def written_markers(template: str) -> list[str]:
    """The `<|…|>` in a chat template's source."""
    return sorted(set(re.findall(r"<\|[^<>|\s]+\|>", template)), key=lambda t: (-len(t), t))


def broken_jinja(variable: str, literals: Sequence[str]) -> str:
    """Jinja statements that do to `variable`, an attribute of a namespace, what `broken` does."""
    if not literals:
        return ""
    listed = ", ".join("'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'" for text in literals)
    return (
        f"{{%- for literal in [{listed}] -%}}"
        f"{{%- set {variable} = {variable}|replace(literal, literal[0] ~ ' ' ~ literal[1:]) -%}}{{%- endfor -%}}"
    )
