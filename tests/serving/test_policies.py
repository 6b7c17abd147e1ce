"""What needs no server: the file of dials, requests, limits, and where one may listen."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrlrl.config import load
from ctrlrl.control import Control
from ctrlrl.errors import RecipeError
from ctrlrl.prompts import prompting_templates
from ctrlrl.serving.app import build_app
from ctrlrl.serving.asked import CONSTRAINTS, DRAWING, LABELS, NEUTRAL, Refused, asked, parse
from ctrlrl.serving.limits import Gate
from ctrlrl.serving.policies import Limits, Policies, caller_of, first_dial, hashed, made_dial, new_key
from ctrlrl.serving.service import Service
from jobs.serve import check_address, print_key

KEYS = {name: hashed(name) for name in ("alice", "bob", "root")}
LEVELS = {"helpful": 1.0, "harmless": 0.2}


def policies(**settings) -> Policies:
    """Policies with three keys, of which one is the operator's."""
    dials = {"wild": {**LEVELS, "keys": ["alice"]}, "tame": {"helpful": 0.2, "harmless": 1, "keys": ["bob", "alice"]}}
    return load(Policies, None, settings={"keys": KEYS, "dials": dials, "operators": {"keys": ["root"]}, **settings})


TEXT = st.text(max_size=40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(sorted(DRAWING | LABELS | CONSTRAINTS | set(NEUTRAL) | {"dial", "model", "messages", "chat_template"})) | TEXT
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]) | TEXT, "content": TEXT | JSON},
        optional={"name": JSON, "tool_calls": JSON},
    ),
    max_size=4,
)


# Of what turns a dial where it is allowed, for a key where it is not.
TURNS = st.sampled_from([{}, {"dial": LEVELS}, {"return_token_ids": True}, {"model": "tiny:wild"}, {"model": "tiny:tame"}])


@given(body=st.dictionaries(NAMES, JSON, max_size=5), messages=MESSAGES | JSON, turns=TURNS)
def test_whatever_is_asked_the_dial_is_the_keys_own_and_the_text_is_kept(body, messages, turns):
    held = policies()
    try:
        request = asked({**body, "messages": messages, **turns}, held, "tokens", caller_of(held, "Bearer bob"), "tiny")
    except Refused as refused:
        assert refused.status in (400, 404) and json.dumps(refused.body())
        return
    assert request.dial == held.dials["tame"] and request.dial_name == "tame"
    assert set(request.fields) <= DRAWING
    assert [m["role"] for m in request.messages] == [m["role"] for m in messages]
    for given_message, kept in zip(messages, request.messages, strict=True):
        content = given_message["content"]
        assert kept == {
            "role": given_message["role"],
            "content": content if isinstance(content, str) else "\n".join(part["text"] for part in content),
        }


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_body_is_an_object_or_refused(body):
    try:
        value = parse(body)
    except Refused as refused:
        assert refused.status == 400
    else:
        assert value == json.loads(body)


def test_only_an_operator_turns_a_dial_and_only_its_own_keys_ask_by_a_dials_name():
    held, body = policies(), {"messages": [{"role": "user", "content": "x"}]}

    def asked_by(key, **fields):
        return asked({**body, **fields}, held, "tokens", caller_of(held, f"Bearer {key}"), "tiny")

    assert asked_by("root", dial=LEVELS).dial.control == Control(1.0, 0.2)
    assert asked_by("alice", model="tiny:tame").dial_name == "tame" and asked_by("root", model="tiny:tame").dial_name == "tame"
    for key, fields, status in (("alice", {"dial": LEVELS}, 400), ("bob", {"return_token_ids": True}, 400),
                                ("bob", {"model": "tiny:wild"}, 404), ("root", {"model": "tiny:x"}, 404)):  # fmt: skip
        with pytest.raises(Refused) as refused:
            asked_by(key, **fields)
        assert (refused.value.status, refused.value.param) == (status, *fields)
    with pytest.raises(Refused, match="model is given twice"):
        parse(b'{"model": "tiny:wild", "model": "tiny"}')


def test_neutral_values_pass_and_are_not_handed_on():
    held = policies()
    body = {"messages": [{"role": "user", "content": "x"}], **NEUTRAL, "tools": None, "chat_template": None}
    assert asked(body, held, "tokens", caller_of(held, "Bearer bob"), "tiny").fields == {}
    for name, value in (("add_generation_prompt", 1), ("priority", 0), ("echo", 0), ("store", True)):
        with pytest.raises(Refused):
            asked({**body, name: value}, held, "tokens", caller_of(held, "Bearer bob"), "tiny")


@pytest.mark.parametrize(("settings", "message"), [
    ({"dials": {"x": {"helpful": 1}}}, "helpful and harmless together"),
    ({"dials": {"x": {**LEVELS, "system": "y"}}}, "give one of both"),
    ({"dials": {"x": {}}}, "give one of both"),
    ({"dials": {"x": {"helpful": 1.2, "harmless": 1}}}, "not a level"),
    ({"dials": {"x": {"helpful": True, "harmless": 1}}}, "valid number"),
    ({"dials": {"x": {**LEVELS, "keys": ["mallory"]}}}, "names 'mallory'"),
    ({"dials": {"x:y": LEVELS}}, "not a name"), ({"dials": {"": LEVELS}}, "not a name"), ({"dials": {"é": LEVELS}}, "not a name"),
    ({"dials": {"x": {**LEVELS, "key": ["bob"]}}}, "did you mean 'keys'"),
    ({"dials": {"x": {**LEVELS, "rerank": 3}}}, "rerank needs reward models"),
    ({"dials": {"x": {"system": "y", "rerank": 3}}, "rewards": {"helpful": "a", "harmless": "b"}}, "belong to a dial with helpful"),
    ({"dials": {"x": {"system": "y"}, "z": LEVELS}}, "of one kind"), ({"kind": "system", "dials": {"x": LEVELS}}, "of one kind"),
    ({"dials": {"x": {"system": "y"}}, "system_turns": "allowed"}, "overrule"),
    ({"operators": {"keys": ["eve"]}}, "names 'eve'"), ({"rewards": {"helpful": "a"}}, "rewards needs both"),
    ({"keys": {"alice": "secret"}}, "not a hash"), ({"keys": {**KEYS, "twin": hashed("bob")}}, "two keys are the same"),
    ({"limits": {"max_body_bytes": 1}}, "max_body_bytes"),
])  # fmt: skip
def test_a_bad_file_is_refused_by_name(settings, message):
    with pytest.raises(RecipeError, match=message):
        policies(**settings)


def test_callers_and_their_first_dials():
    held = policies()
    alice, bob, root = (caller_of(held, f"bearer  {key} ") for key in ("alice", "bob", "root"))
    assert (alice.dials, bob.dials, root.dials) == (("wild", "tame"), ("tame",), ("wild", "tame"))
    assert [c.operator for c in (alice, bob, root)] == [False, False, True]
    assert first_dial(held, "tokens", alice) == ("wild", held.dials["wild"])
    assert first_dial(held, "tokens", root)[1].control == Control(1.0, 1.0)
    assert caller_of(held, None) is None and caller_of(held, "Bearer eve") is None and caller_of(held, KEYS["bob"]) is None
    assert caller_of(held, f"Bearer {KEYS['bob']}") is None  # a stored hash is no key
    local = caller_of(Policies(), None)
    assert local.operator and local.name == "local"


def test_a_dial_in_words_and_one_by_system_prompt():
    control = Control(1.0, 0.2)
    assert made_dial("tokens", LEVELS).suffix == control.spell()
    assert made_dial("prompting", LEVELS).suffix == prompting_templates(control)[2]
    assert made_dial("system", {"system": "Be kind."}).system == "Be kind."
    second = policies(dials={"x": {**LEVELS, "prompting": 4}}).dials["x"]
    assert second.kind == "prompting" and second.suffix == prompting_templates(control)[3]
    with pytest.raises(ValueError, match="an object with system"):
        made_dial("system", LEVELS)


def test_keys_are_printed_once_and_stored_hashed(capsys):
    assert print_key("dora") == 0
    key, line = (part.partition(":")[2].strip() for part in capsys.readouterr().out.splitlines())
    assert line == f'dora = "{hashed(key)}"' and key not in line and len(key) > 40
    assert new_key() != new_key()
    with pytest.raises(RecipeError, match="not a name"):
        print_key("do ra")


def test_a_minute_of_requests_and_places():
    now = [0.0]
    gate, limits = Gate(lambda: now[0]), Limits(requests_per_minute=3, concurrent_per_key=1, max_concurrent=2)

    def spent(key):
        try:
            gate.spend(key, limits)
        except Refused as refused:
            return refused.status
        return 200

    assert [spent("a") for _ in range(4)] == [200, 200, 200, 429] and spent("b") == 200
    now[0] = 20.0
    assert [spent("a") for _ in range(2)] == [200, 429]
    now[0] = 1e6
    assert [spent("a") for _ in range(4)] == [200, 200, 200, 429]
    with gate.entered("a", limits):
        with pytest.raises(Refused, match="at a time"), gate.entered("a", limits):
            pass
        with gate.entered("b", limits), pytest.raises(Refused) as full, gate.entered("c", limits):
            pass
        assert full.value.status == 503 and gate.running == 1
    assert gate.running == 0


def test_no_server_without_keys_where_others_reach_it():
    for host in ("127.0.0.1", "127.0.0.5", "localhost", "::1"):
        check_address(host, keyless=True)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "", "localhost.example.org"):
        with pytest.raises(RecipeError, match="no keys are set"):
            check_address(host, keyless=True)
        check_address(host, keyless=False)


def test_without_keys_other_names_and_other_sites_are_refused():
    service = Service(SimpleNamespace(name="tiny", healthy=True), None, Policies(), "tokens")
    app = build_app(service)

    async def status(headers):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000") as client:
            return (await client.get("/v1/dial", headers=headers)).status_code

    own = {"Host": "127.0.0.1:8000"}
    for headers in (own, {"Host": "localhost:80"}, {"Host": "[::1]:8000"}, {"Host": "localhost"}, {**own, "Origin": "http://127.0.0.1:8000"}):
        assert asyncio.run(status(headers)) == 200, headers
    for headers in ({"Host": "evil.example:8000"}, {"Host": "localhost.evil.example"}, {**own, "Origin": "http://evil.example"},
                    {**own, "Origin": "null"}, {**own, "Origin": "http://127.0.0.1:9000"}, {"Host": "10.0.0.7:8000"}):  # fmt: skip
        assert asyncio.run(status(headers)) == 403, headers
    service.close()
