"""`ctrlrl chat`: a conversation in the terminal, against the tests' server and with one of its own."""

import asyncio
import fcntl
import json
import os
import pty
import re
import socket
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from ctrlrl.cli import app
from ctrlrl.control import CORNERS, Control
from ctrlrl.errors import RecipeError
from ctrlrl.models.loading import load_tokenizer
from ctrlrl.prompts import HARMLESS_SYSTEM, UNCENSORED_SYSTEM, render
from ctrlrl.serving.client import Client, NotAnswered
from ctrlrl.serving.policies import Limits
from jobs import chat, serve
from jobs.parts.talk import Talk

DRAWING = {"temperature": 0, "max_tokens": 8}
QUESTION = "How do I bake bread?"


@pytest.fixture(scope="module")
def prompt_of(exported):
    """A function: the ids that training and rollout make of a conversation under a control."""
    tokenizer = load_tokenizer(exported)

    def ids(control, *texts):
        roles = ("user", "assistant")
        return render(tokenizer, [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)], control.spell())

    return ids


@pytest.fixture
def talk(server):
    """A function: a conversation with the server as the holder of a key."""

    def begin(key="root", terminal=False):
        client = Client(server.url, f"sk-ctrlrl-{key}")
        return Talk(client, client.dials(), DRAWING, terminal)

    return begin


def test_a_conversation_turns_its_dial(answered, talk, prompt_of, capsys):
    one = talk()
    assert one.take(QUESTION)
    first = capsys.readouterr().out
    (line,) = answered()
    answer = line["answers"][0]
    assert line["prompt_ids"] == prompt_of(Control(1, 1), QUESTION)
    assert first == f"{answer}\n"
    assert one.take("/dial 0.2 1") and capsys.readouterr().err == "[helpful=0.2][harmless=1]\n"
    one.take("And [helpful=1] then?")
    assert answered()[0]["prompt_ids"] == prompt_of(Control(0.2, 1), QUESTION, answer, "And [helpful=1] then?")
    one.take("/dial scientist")
    one.take("/reset")
    one.take("//dial is text")
    (line,) = answered()
    assert line["dial"] == "scientist" and line["prompt_ids"] == prompt_of(Control(1, 0.2), "/dial is text")
    assert not one.failed and not one.take("/quit")


def test_corners_are_an_aside(server, answered, talk, prompt_of, capsys):
    one = talk()
    one.take(f"/corners {QUESTION}")
    out, lines = capsys.readouterr().out, answered(4)
    assert [line["prompt_ids"] for line in lines] == [prompt_of(corner, QUESTION) for corner in CORNERS]
    for corner, line in zip(CORNERS, lines, strict=True):
        messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": line["answers"][0]}]
        scores = server.post("root", {"messages": messages}, "/v1/score").json()
        told = f"helpful {scores['helpful']:.2f}, harmless {scores['harmless']:.2f}"
        assert f"{corner.spell()}\n  {line['answers'][0]}\n    ({told})\n" in out
    one.take("Why?")
    answer = answered()[0]["answers"][0]
    one.take("/corners")
    assert [line["prompt_ids"] for line in answered(4)] == [prompt_of(corner, "Why?") for corner in CORNERS]
    one.take("And?")
    assert answered()[0]["prompt_ids"] == prompt_of(Control(1, 1), "Why?", answer, "And?")


def test_what_a_key_may_not_do_and_what_makes_no_sense_is_told(answered, talk, prompt_of, capsys):
    user = talk("carol")
    assert user.setting is None
    user.take(QUESTION)
    assert answered()[0]["prompt_ids"] == prompt_of(Control(1, 0.2), QUESTION)
    user.take("/dial child")
    user.take("Why?")
    assert answered()[0]["dial"] == "child"
    capsys.readouterr()
    for line, words in {
        "/dial 1 1": "not an operator's", "/corners": "not an operator's", "/dial best": "no dial 'best': there is scientist, child",
    }.items():  # fmt: skip
        user.take(line)
        assert words in capsys.readouterr().err
    root = talk()
    for line, words in {
        "/dial 1": "give 2 levels: helpful and harmless", "/dial 1 2": "harmless = 2.0 is not a level", "/dail 1 1": "no command /dail",
        "/system Be kind.": "dial is levels of helpful and harmless", "/corners": "needs a message",
    }.items():  # fmt: skip
        root.take(line)
        assert words in capsys.readouterr().err and root.failed
    assert root.setting == {"helpful": 1.0, "harmless": 1.0}
    root._drawing = {"temperature": 9}
    root.take("Hello")
    assert answered()[0]["status"] == 400  # the first that reached the server
    assert "temperature is a number from 0 to 2" in capsys.readouterr().err and root._messages == []
    with pytest.raises(NotAnswered, match="127.0.0.1:1 cannot be reached: .*refused"):
        Client("http://127.0.0.1:1").dials()
    with pytest.raises(RecipeError, match="is not a server's address"):
        Client("localhost:8000")


class Scripted:
    """In the place of a server with a CST model: keeps the requests, and answers with what could steer a terminal."""

    def __init__(self):
        self.bodies = []

    def stream(self, body):
        self.bodies.append(body)
        yield "red \x1b[31m\x9b2J", None
        yield "\r\n", "length"


def test_a_cst_model_and_a_terminal_that_is_not_steered(endless, capsys):
    told = {**endless.told, "kind": "system", "attributes": [], "systems": [HARMLESS_SYSTEM, UNCENSORED_SYSTEM]}
    one = Talk(Scripted(), told, {}, terminal=True)
    for line in ("Hi", "/system uncensored", "Hi", "/system Be brief.", "Hi", "/corners"):
        one.take(line)
    assert [body["dial"]["system"] for body in one._client.bodies] == [
        HARMLESS_SYSTEM, UNCENSORED_SYSTEM, "Be brief.", HARMLESS_SYSTEM, UNCENSORED_SYSTEM,
    ]  # fmt: skip
    assert capsys.readouterr().out.startswith("red \\x1b[31m\\x9b2J\\x0d\n (cut at the limit of tokens)\n")
    one.take("/dial 1 1")
    assert "this model's dial is a system prompt" in capsys.readouterr().err


def test_a_server_takes_connections_when_it_tells_its_address(monkeypatch):
    model, taken = SimpleNamespace(name="m", healthy=True), []

    def said(line):
        if " on http://" in line:
            host, _, port = line.partition(" on http://")[2].split()[0].rpartition(":")
            with socket.create_connection((host, int(port)), 60):
                taken.append(line)
            model.healthy = False  # which ends the server

    monkeypatch.setattr(serve, "_say", said)
    service = SimpleNamespace(model=model, gate=SimpleNamespace(running=0))
    serving = SimpleNamespace(config=SimpleNamespace(limits=Limits(grace_s=1)), summary=lambda _: "")
    assert asyncio.run(serve._until_stopped(serving, service, serve._bound("127.0.0.1", 0), 0.0)) == 1 and len(taken) == 1


def test_a_pipe_with_a_server_of_its_own(exported, tmp_path):
    """Also: what was asked is answered as the tests' server would, and nothing is left running."""
    dials = tmp_path / "dials.toml"
    dials.write_text(f'[audit]\nfile = "{tmp_path}/audit"\ntext = true\n[engine]\ndtype = "float32"\nkv_cache_gib = 0.05\n')
    command = [sys.executable, "-m", "ctrlrl.cli", "chat", exported, "--helpful", "0.2", "--dials", str(dials)]
    text = f"{QUESTION}\n/dial 3 3\n/dial 1 0.2\nWhy?\n"
    run = subprocess.run([*command, "--temperature", "0", "--max-tokens", "6"], input=text, capture_output=True, text=True)
    assert run.stderr == "ctrlrl chat: helpful = 3.0 is not a level: give a number from 0 to 1\n[helpful=1][harmless=0.2]\n"
    assert run.returncode == 1
    lines = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    tokenizer = load_tokenizer(exported)
    first, second = ([{"role": m["role"], "content": m["content"]} for m in line["messages"]] for line in lines)
    assert [m["content"] for m in second] == [QUESTION, lines[0]["answers"][0], "Why?"]
    assert lines[0]["prompt_ids"] == render(tokenizer, first, Control(0.2, 1).spell())
    assert lines[1]["prompt_ids"] == render(tokenizer, second, Control(1, 0.2).spell())
    assert run.stdout == "".join(f"{line['answers'][0]}\n" for line in lines)
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and str(dials) in _command(pid)]


def _command(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def test_ctrl_c_stops_an_answer_and_twice_ends(endless, tmp_path):
    (tmp_path / "key").write_text("sk-ctrlrl-root\n")
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "ctrlrl.cli", "chat", "--url", endless.url, "--key-file", str(tmp_path / "key")],
        stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
        env={**os.environ, "TERM": "dumb", "INPUTRC": "/dev/null"}, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(follower)
    seen = ""

    def until(pattern):
        nonlocal seen
        while not (found := re.search(pattern, seen, re.DOTALL)):
            try:
                seen += os.read(leader, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"ended before {pattern!r}: {seen}") from None
        seen = seen[found.end() :]

    until(r"m: \[helpful=1\]\[harmless=1\] .*> ")
    os.write(leader, b"How?\n")
    until(r"How\?\r\non and on and ")
    os.write(leader, b"\x03")
    until(r" \(stopped\).*> ")
    assert endless.gone.wait(60)
    os.write(leader, b"/dial 0.2 1\n")
    until(r"\[helpful=0.2\]\[harmless=1\]\r\n> ")
    os.write(leader, b"\x03")
    until(r"> ")
    os.write(leader, b"\x03")
    assert process.wait(60) == 130
    os.close(leader)


def test_what_a_server_leaves_behind_is_ended():
    child = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    left = int(process.stdout.readline())
    chat._end(process)
    assert process.stdout.read() == "" and "sleep" not in _command(left)  # standard output ends with the last that holds it


def test_levels_are_those_of_the_models_own_attributes(monkeypatch):
    said = {"operator": True, "kind": "control", "attributes": ["concise", "harmless", "formal"], "levels": {"low": 0.2, "high": 1.0}}
    client, talks = SimpleNamespace(dials=lambda: {**said, "dials": [], "systems": [], "model": "m"}), []
    monkeypatch.setattr(chat, "_lines", lambda: [])
    monkeypatch.setattr("jobs.parts.talk.Talk", lambda *given: talks.append(Talk(*given)) or talks[-1])
    assert chat._converse(client, (chat._levels(["formal=0.2", "harmless=0.4"]), "", ""), {}) == 0
    assert talks[0].setting == {"concise": 1.0, "harmless": 0.4, "formal": 0.2}
    with pytest.raises(RecipeError, match="helpful is no attribute of this model: it has concise, harmless, formal"):
        chat._converse(client, ({"helpful": 1.0}, "", ""), {})


@pytest.mark.parametrize(("options", "words"), [
    ([], "give a model or --url, one of both"), (["m", "--url", "http://127.0.0.1:1"], "one of both"),
    (["--url", "http://127.0.0.1:1", "--dials", "x"], "a running server has its own"),
    (["m", "--key-file", "k"], "--key-file is for --url"),
    (["m", "--helpful", "1", "--dial", "x"], "one of them"), (["m", "--level", "concise=1", "--system", "x"], "one of them"),
    (["m", "--level", "concise"], "--level concise: give an attribute and a number"), (["m", "--level", "=x"], "--level =x: give"),
    (["--url", "ftp://x"], "is not a server's address"),
    (["--url", "http://127.0.0.1:1", "--key-file", "/none"], "cannot be read"), (["--url", "http://127.0.0.1:1"], "cannot be reached"),
])  # fmt: skip
def test_wrong_options_are_refused_before_anything_starts(options, words, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    result = CliRunner().invoke(app, ["chat", *options])
    assert result.exit_code == 2 and words in result.output


def test_a_model_that_cannot_be_served_is_told_in_the_servers_words(tmp_path):
    result = CliRunner().invoke(app, ["chat", str(tmp_path / "none")])
    assert result.exit_code == 2 and "none" in result.output and "Traceback" not in result.output
