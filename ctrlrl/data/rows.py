"""What a row of a user's data means: a prompt, or a prompt with two answers; every other row is refused by a DataError that says why.

A row gives a prompt as `messages` (list of {"role", "content"}), as `prompt` (text, transcript or such a list), or by what `chosen` and
`rejected` have in common (Anthropic HH transcripts, or lists of messages as TRL and UltraFeedback write them). A `system` text comes first.
"""

import difflib
import json
import re
from collections.abc import Iterable

from ctrlrl.errors import DataError
from ctrlrl.prompts import ROLES, check_messages

COLUMNS = ("messages", "prompt", "system", "chosen", "rejected", "conversations")  # no other column is ever looked at
TOOL_FIELDS = ("tool_calls", "function_call")
MESSAGE_FIELDS = ("role", "content", "from", "value", *TOOL_FIELDS)
Turns = list[dict[str, str]]

_TURN = re.compile(r"\n\n(Human|Assistant):")  # the transcripts of Anthropic HH
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
# Other people's transcripts: they begin with a speaker, and the assistant speaks later on.
_OPENS = re.compile(r"[\s#*]*<?(human|user|prompter|system)>?[ \t]*:", re.IGNORECASE)
_REPLIES = re.compile(r"(^|#)[ \t*]*<?(assistant|ai|bot|gpt|chatgpt)>?[ \t]*:", re.IGNORECASE | re.MULTILINE)
# Prompts that a chat template was applied to already: a turn's marker at the beginning, perhaps after that of the whole text, and the
# user's end or the assistant's beginning later on.
_RENDERED_OPENS = re.compile(
    r"\s*((<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>|\[gMASK\]<sop>|<\|endoftext\|>)\s*)?"
    r"(<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<\|(system|user)\|>|<｜User｜>|<\|start\|>|<\|turn>)"
)
_RENDERED_REPLIES = re.compile(
    r"\[/INST\]|<｜Assistant｜>|<\|assistant\|>|<start_of_turn>model|<\|turn>model"
    r"|<\|(im_start|start_header_id|start)\|>assistant"
)
# Answers that begin with who speaks.
_LABELLED = re.compile(r"\s*(assistant[ \t]*:|<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|assistant\|>)", re.IGNORECASE)
_LISTED = re.compile(r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:.*\]\s*", re.DOTALL)  # messages that a writer made a text of
_OTHER_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
EXPECTED = 'a row needs "messages" (list of role and content), "prompt" (text), or transcripts or messages in "chosen" and "rejected"'
_SHAREGPT = 'ShareGPT\'s "from" and "value" are not read: write "messages" of "role" (human is user, gpt is assistant) and "content"'


def prompt_of(row: object) -> tuple[dict[str, str], ...]:
    """The messages of a row's prompt, the user's turn last."""
    row = _mapping(row)
    chosen, rejected = _decoded(row, "chosen"), _decoded(row, "rejected")
    if _is_conversation(chosen) and _is_conversation(rejected):
        messages = _split_lists(row, chosen, rejected)[0]
    elif _given(row, "messages"):
        messages = message_list(row["messages"], "messages")
        if _given(row, "prompt"):
            messages = _agreed(messages, _prompt(row), "prompt", '"messages"')
    elif row.get("prompt") is not None:
        messages = _prompt(row)
    elif _given(row, "chosen") and _given(row, "rejected"):
        messages = _split_transcripts(_text(row, "chosen"), _text(row, "rejected"))[0]
    else:
        raise DataError(missing_columns(row))
    if _given(row, "system"):
        if messages and messages[0]["role"] == "system":
            raise DataError('a row has its system prompt in "system" or in its messages, not in both')
        messages = [{"role": "system", "content": _text(row, "system")}, *messages]
    check_messages(messages)
    if not messages[-1]["content"].strip():
        raise DataError("the user's message is empty")
    return tuple(messages)


def pair_of(row: object) -> tuple[tuple[dict[str, str], ...], str, str]:
    """The prompt of a row, the better and the worse answer."""
    messages = prompt_of(row)
    good, bad = _decoded(row, "chosen"), _decoded(row, "rejected")
    if isinstance(good, list) or isinstance(bad, list):
        _, good, bad = _split_lists(row, good, bad)
    else:
        good, bad = _text(row, "chosen"), _text(row, "rejected")
        if not _given(row, "messages") and row.get("prompt") is None:
            _, good, bad = _split_transcripts(good, bad)
    for name, text in (("chosen", good), ("rejected", bad)):
        if text.lstrip().startswith("Human:") and _REPLIES.search(text):
            raise DataError(f'"{name}" is a whole transcript beside a prompt of its own: leave the prompt out, or give the answer alone')
        if label := _LABELLED.match(text):
            raise DataError(f'"{name}" begins with {label[0].strip()!r}, which says who speaks: give the answer alone')
    if not good.strip():  # an empty answer may be the worse one, as in UltraFeedback
        raise DataError('the answer "chosen" is empty')
    if good.strip() == bad.strip():
        raise DataError('"chosen" and "rejected" are the same answer, which prefers nothing')
    return messages, good, bad


def parse_transcript(text: str) -> Turns:
    """An HH transcript, `\\n\\nHuman: … \\n\\nAssistant: …`, as messages; raises DataError unless the turns alternate, the human first."""
    before, *parts = _TURN.split(text)
    if before.strip() or not parts:
        raise DataError(f'a transcript starts with "\\n\\nHuman:"; got {text[:60]!r}')
    messages = [{"role": _SPEAKERS[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]
    for index, message in enumerate(messages):
        expected = ("user", "assistant")[index % 2]
        if message["role"] != expected:
            raise DataError(f"turn {index + 1} of a transcript is the {expected}'s; got {message['role']}: {message['content'][:60]!r}")
    return messages


def message_list(value: object, name: str) -> Turns:
    """A column's list of messages, each with role and text alone; where a file has no lists (CSV), written as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f'"{name}" is not JSON: {error}: write the list of messages as JSON') from None
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise DataError(f'"{name}" is a list of {{"role", "content"}}; got {_short(value)}')
    return [_message(message, f'message {number} of "{name}"') for number, message in enumerate(value, 1)]


def missing_columns(names: Iterable[object]) -> str:
    """Why a row or file with these columns has no prompt, with the nearest names that it does have."""
    names = [str(name) for name in names]
    if "conversations" in names:
        return _SHAREGPT
    near = {name: difflib.get_close_matches(name.strip().lower(), COLUMNS[:-1], 1, 0.8) for name in names if name not in COLUMNS}
    hints = "; ".join(f"is {name!r} {match[0]!r}?" for name, match in near.items() if match)
    has = ", ".join(names[:20]) + ", …" * (len(names) > 20)
    return f"{EXPECTED}; this one has {has or 'nothing'}{hints and f' ({hints})'}"


def _split_lists(row: dict, chosen: object, rejected: object) -> tuple[Turns, str, str]:
    """The prompt and the two answers where `chosen` and `rejected` are messages: an answer each, perhaps after all turns before it."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise DataError(f'"chosen" and "rejected" are both texts or both lists of messages; got {_short(chosen)} and {_short(rejected)}')
    good, bad = message_list(chosen, "chosen"), message_list(rejected, "rejected")
    for name, turns in (("chosen", good), ("rejected", bad)):
        if not turns or turns[-1]["role"] != "assistant":
            raise DataError(f'"{name}" ends with the assistant\'s answer; this one ends with {turns[-1]["role"] if turns else "nothing"!r}')
    before = good[:-1]
    if before != bad[:-1]:
        raise DataError('the messages "chosen" and "rejected" share every turn but the last, which is the assistant\'s; these do not')
    for name in ("messages", "prompt"):
        if _given(row, name) and not (name == "messages" and _decoded(row, name) in (chosen, rejected)):
            given = message_list(row[name], name) if name == "messages" else _prompt(row)
            before = _agreed(before, given, name, 'the messages "chosen" and "rejected"')
    if not before:
        raise DataError(f'"chosen" and "rejected" are answers without a prompt: {EXPECTED}')
    return before, good[-1]["content"], bad[-1]["content"]


def _agreed(before: Turns, given: Turns, name: str, where: str) -> Turns:
    """The turns `before` an answer, as `where` has them, and what the column `name` says of them; one may lack the system prompt."""
    bodies = [[(m["role"], m["content"].strip()) for m in turns if m["role"] != "system"] for turns in (before, given)]
    if not before or (bodies[0] == bodies[1] and before[0]["role"] != "system"):
        return given
    # Many sets repeat in "prompt" the first or the last of the user's turns.
    repeats = name == "prompt" and len(given) == 1 and bodies[1][0] in (bodies[0][:1] + bodies[0][-1:])
    if repeats or (bodies[0] == bodies[1] and (given[0]["role"] != "system" or given[0] == before[0])):
        return before
    raise DataError(f'"{name}" is not what {where} begin with: leave one of the two out')


def _split_transcripts(chosen: str, rejected: str) -> tuple[Turns, str, str]:
    """The shared turns and the two last answers; HH repeats the whole conversation in both columns."""
    good, bad = parse_transcript(chosen), parse_transcript(rejected)
    if len(good) < 2 or good[-1]["role"] != "assistant" or bad[-1]["role"] != "assistant" or good[:-1] != bad[:-1]:
        raise DataError("the transcripts \"chosen\" and \"rejected\" share every turn but the last, which is the assistant's; these do not")
    return good[:-1], good[-1]["content"], bad[-1]["content"]


def _prompt(row: dict) -> Turns:
    """The column `prompt` as messages: a list of them, a transcript, or one user turn."""
    value = _decoded(row, "prompt")
    if isinstance(value, list):
        return message_list(value, "prompt")
    if not isinstance(value, str):
        raise DataError(f'"prompt" is a text or a list of messages; got {_short(value)}')
    text = _text(row, "prompt")
    if text.startswith("\n\nHuman:") or (text.lstrip().startswith("Human:") and "\n\nAssistant:" in text):
        turns = parse_transcript("\n\n" + text.lstrip())
        return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns  # open, for the answer
    spoken = _OPENS.match(text) and _REPLIES.search(text)
    if spoken or (_RENDERED_OPENS.match(text) and _RENDERED_REPLIES.search(text)):
        begins, what = text.strip()[:60], "a transcript" if spoken else "what a chat template wrote"
        raise DataError(f'"prompt" holds {what}, {begins!r}: give its turns as "messages" (one message, if a user wrote all of it)')
    return [{"role": "user", "content": text}]


def _message(message: dict, where: str) -> dict[str, str]:
    role, content = message.get("role"), message.get("content")
    if role is None and "from" in message:
        raise DataError(_SHAREGPT)
    if role not in ROLES or not isinstance(content, str):
        near = str(role).strip().lower()
        near = near if near in ROLES else _OTHER_ROLES.get(near)
        hint = f": is it {near!r}?" if near and role not in ROLES else ""
        needs = f'a message needs "role" (one of {", ".join(ROLES)}) and a text "content"'
        raise DataError(f"{needs}; {where} has the role {_short(role)} and the content {_short(content)}{hint}")
    if tools := next((field for field in TOOL_FIELDS if message.get(field)), None):
        raise DataError(f"{where} has {tools}, which are not read: leave out conversations with tools")
    _encodable(content, where)
    return {"role": role, "content": content}


def _decoded(row: object, name: str) -> object:
    """A column's value; a text that is a list of messages, as writers without lists put it, as that list."""
    value = row.get(name) if isinstance(row, dict) else None
    if isinstance(value, str) and _LISTED.fullmatch(value):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f'"{name}" is a list of messages written as a text that is not JSON, {value[:60]!r}: write JSON') from None
    return value


def _is_conversation(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _mapping(row: object) -> dict:
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"a row is a JSON object; got {_short(row)}")
    return row


def _given(row: dict, name: str) -> bool:
    return row.get(name) not in (None, "", [])


def _text(row: dict, name: str) -> str:
    if not isinstance(row.get(name), str):
        raise DataError(f'"{name}" is a text; got {_short(row.get(name))}')
    _encodable(row[name], f'"{name}"')
    return row[name]


def _encodable(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair: legal in JSON, storable nowhere
        raise DataError(f"{where} holds half a surrogate pair at character {error.start}: not Unicode text") from None


def _short(value: object) -> str:
    """A value in a message: its beginning, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}…"
