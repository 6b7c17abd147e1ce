"""A conversation of `ctrlrl chat`: what is asked, under which setting of the dial, and the commands that change it."""

import itertools
import re
import sys
from collections.abc import Sequence
from typing import Any

from ctrlrl.attributes import read_attributes
from ctrlrl.control import Control
from ctrlrl.errors import ControlError, RecipeError
from ctrlrl.serving.client import Client, NotAnswered

HELP = """\
/dial 0.2 1       levels, such as of helpful and harmless
/dial NAME        a dial of the server's file
/system TEXT      a system prompt, or harmless or uncensored for the two published ones
/corners [TEXT]   a message, or the last one, at every corner; the conversation goes on without it
/reset            begin anew
/help, /quit
//text sends /text. Ctrl-C stops an answer; twice it ends."""
Setting = dict[str, Any] | str | None  # a dial of the operator's, the name of one, or whatever the key has
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # could move the cursor or change the terminal


class Talk:
    """One conversation with a server. dials: what it tells of them; drawing: fields of every request, such as temperature."""

    def __init__(self, client: Client, dials: dict[str, Any], drawing: dict[str, Any], terminal: bool):
        self.failed = False
        self._client, self._dials, self._drawing, self._terminal = client, dials, drawing, terminal
        self._messages: list[dict[str, str]] = []
        self._asked = ""
        self.setting: Setting = None
        if dials["operator"]:
            high = dials["levels"]["high"]
            self.setting = {"system": dials["systems"][0]} if dials["kind"] == "system" else dict.fromkeys(dials["attributes"], high)

    def turn(self, levels: Sequence[float] = (), system: str = "", name: str = "") -> None:
        """Set the dial; RecipeError, which says what there is instead, if this server or this key has none such."""
        kind, attributes = self._dials["kind"], self._dials["attributes"]
        if name:
            if name not in self._dials["dials"]:
                raise RecipeError(f"no dial {name!r}: there {_named(self._dials['dials'])} for this key")
            self.setting = name
            return
        if not self._dials["operator"]:
            raise RecipeError(f"this key is not an operator's and sets no levels: there {_named(self._dials['dials'])}")
        if bool(system) != (kind == "system"):
            wanted = "a system prompt" if kind == "system" else f"levels of {' and '.join(attributes)}"
            raise RecipeError(f"this model's dial is {wanted}")
        if system:
            published = dict(zip(("harmless", "uncensored"), self._dials["systems"], strict=True))
            self.setting = {"system": published.get(system, system)}
            return
        if len(levels) != len(attributes):
            raise RecipeError(f"give {len(attributes)} levels: {' and '.join(attributes)}")
        try:
            self.setting = dict(zip(attributes, _control(attributes, levels).levels, strict=True))
        except ControlError as error:
            raise RecipeError(str(error)) from None

    def take(self, line: str) -> bool:
        """Do what a line says: a command, or else a message. Returns whether the conversation goes on."""
        text = line.strip()
        word, _, rest = text.partition(" ")
        try:
            if not text.startswith("/") or text.startswith("//"):
                if text:
                    self.ask(text[1:] if text.startswith("//") else text)
            elif word == "/quit":
                return False
            elif word not in ("/dial", "/system", "/corners", "/reset", "/help"):
                raise RecipeError(f"no command {word}: /help tells them, and /{word} … sends it as a message")
            else:
                getattr(self, f"_{word[1:]}")(rest.strip())
        except (RecipeError, NotAnswered) as error:
            self.failed = True
            print(f"ctrlrl chat: {_seen(str(error))}", file=sys.stderr, flush=True)
        return True

    def ask(self, text: str) -> None:
        """Print the answer to a message as it comes, and its scores; both become part of the conversation. NotAnswered: neither does."""
        self._asked = text
        messages = [*self._messages, {"role": "user", "content": text}]
        answer, stopped = self._answer(messages, self.setting)
        if answer:
            self._messages = [*messages, {"role": "assistant", "content": answer}]
        if stopped:
            raise KeyboardInterrupt
        if self._terminal and answer and (scores := self._scores(messages, answer)):
            print(f"  ({scores})", flush=True)

    def spelled(self, setting: Setting) -> str:
        """A setting as it is shown."""
        if setting is None:
            return "the key's own dial"
        if isinstance(setting, str):
            return setting
        if "system" in setting:
            return setting["system"]
        if self._dials["kind"] == "tokens":
            return _control(list(setting), list(setting.values())).spell()
        return ", ".join(f"{a} {b:g}" for a, b in setting.items())

    def _dial(self, rest: str) -> None:
        words = rest.split()
        try:
            levels = [float(word) for word in words]
        except ValueError:
            self.turn(name=rest)
        else:
            if words:
                self.turn(levels)
        self._note(self.spelled(self.setting))

    def _system(self, rest: str) -> None:
        if rest:
            self.turn(system=rest)
        self._note(self.spelled(self.setting))

    def _reset(self, _: str) -> None:
        self._messages, self._asked = [], ""
        self._note("a new conversation")

    def _help(self, _: str) -> None:
        print(HELP, flush=True)

    def _corners(self, text: str) -> None:
        """The message at every corner, each under its own heading."""
        asked = text or self._asked
        if not asked:
            raise RecipeError("/corners needs a message")
        if not self._dials["operator"]:
            raise RecipeError("this key is not an operator's and sets no levels")
        before = self._messages
        if not text and before and before[-2]["content"] == asked:
            before = before[:-2]
        messages = [*before, {"role": "user", "content": asked}]
        for setting in self._settings():
            print(self.spelled(setting), flush=True)
            answer, stopped = self._answer(messages, setting, "  ")
            if stopped:
                raise KeyboardInterrupt
            if answer and (scores := self._scores(messages, answer)):
                print(f"    ({scores})", flush=True)

    def _settings(self) -> list[dict[str, Any]]:
        if self._dials["kind"] == "system":
            return [{"system": text} for text in self._dials["systems"]]
        names, levels = self._dials["attributes"], self._dials["levels"]
        return [dict(zip(names, corner, strict=True)) for corner in itertools.product((levels["low"], levels["high"]), repeat=len(names))]

    def _answer(self, messages: list[dict[str, str]], setting: Setting, margin: str = "") -> tuple[str, bool]:
        """The answer, printed as it comes, and whether it was stopped."""
        name = self._dials["model"]
        body = {"model": f"{name}:{setting}" if isinstance(setting, str) else name, "messages": messages, **self._drawing}
        if isinstance(setting, dict):
            body["dial"] = setting
        text, note, stopped = "", "", False
        try:
            for piece, finish in self._client.stream(body):
                if piece:
                    print(self._shown(piece if text else margin + piece), end="", flush=True)
                    text += piece
                note = " (cut at the limit of tokens)" if finish == "length" else note
        except KeyboardInterrupt:
            note, stopped = " (stopped)", True
        except NotAnswered:
            if text:
                print(flush=True)
            raise
        print(note if self._terminal else "", flush=True)
        return text, stopped

    def _scores(self, messages: list[dict[str, str]], answer: str) -> str:
        if not (self._dials["scores"] and self._dials["operator"]):
            return ""
        scores = self._client.score([*messages, {"role": "assistant", "content": answer}])
        return ", ".join(f"{name} {value:.2f}" for name, value in scores.items())

    def _note(self, text: str) -> None:
        print(_seen(text), file=sys.stdout if self._terminal else sys.stderr, flush=True)

    def _shown(self, text: str) -> str:
        return _seen(text) if self._terminal else text


def _seen(text: str) -> str:
    """Text for a terminal: what would steer it is spelled."""
    return _UNSEEN.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _control(names: Sequence[str], levels: Sequence[float]) -> Control:
    return Control(*levels, attributes=read_attributes({name: {} for name in names}, "the server"))


def _named(dials: Sequence[str]) -> str:
    return f"is {', '.join(dials)}" if dials else "is none"
