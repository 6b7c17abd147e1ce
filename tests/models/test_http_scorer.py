"""A service as a scorer, against one that listens: what it is asked, how patiently, and what is refused by name."""

import json
import threading

import numpy as np
import pytest
from pydantic import ValidationError

from ctrlrl.config import dump, load
from ctrlrl.errors import DataError, ModelError, RecipeError
from ctrlrl.models.conversations import reader_of
from ctrlrl.models.fingerprint import model_contents
from ctrlrl.models.http_scorer import HttpScorer
from ctrlrl.models.scorer import ScorerConfig, make_scorer
from ctrlrl.models.scorer_names import weights_of
from ctrlrl.models.service import Service

CONVERSATIONS = [([{"role": "user", "content": f"Question {i}?"}], "x" * i) for i in range(10)]


def by_length(body, headers):
    return 200, {}, {"scores": [len(c["answer"]) / 100 for c in body["conversations"]]}


def scorer_of(service, waits=None, **settings):
    """A scorer that writes down its waits in place of waiting."""
    config = ScorerConfig(http={"url": service.url, **settings})
    sleep = (lambda _: None) if waits is None else waits.append
    return HttpScorer(config.http, config.load_calibration(), Service(config.http, config.secret(), sleep))


def test_its_scores_come_in_their_order_from_batches(listen):
    service = listen(by_length)
    config = ScorerConfig(http={"url": service.url, "batch": 3, "at_once": 2})
    config.check()
    scorer = make_scorer(config)
    assert scorer.score(CONVERSATIONS).tolist() == scorer.raw(CONVERSATIONS).tolist() == pytest.approx([i / 100 for i in range(10)])
    assert scorer.score([]).shape == (0,) and scorer.score(CONVERSATIONS).dtype == np.float32
    asked = service.asked[1:5]
    assert sorted(len(body["conversations"]) for body in asked) == [1, 3, 3, 3]
    assert {"messages": CONVERSATIONS[4][0], "answer": "xxxx"} in [c for body in asked for c in body["conversations"]]


def test_any_text_passes_in_any_encoding_of_json(listen):
    said = json.dumps({"scores": [0.5]})
    other = listen(lambda *_: (200, {}, said.encode("utf-16")))
    assert make_scorer(ScorerConfig(http=other.url)).raw(CONVERSATIONS[:1]).tolist() == [0.5]
    service = listen(lambda body, _: (200, {}, b"\xef\xbb\xbf" + json.dumps({"scores": [0.5], "version": None}).encode()))
    assert make_scorer(ScorerConfig(http=service.url)).raw([([{"role": "user", "content": "\ud800"}], "\u00fc")]).tolist() == [0.5]
    assert service.asked == [{"conversations": [{"messages": [{"role": "user", "content": "\ud800"}], "answer": "\u00fc"}]}]


def test_the_setting_is_an_address_or_a_section():
    config = ScorerConfig(http="https://scores.example/v1/score")
    assert config == ScorerConfig(http={"url": "https://scores.example/v1/score"}) == ScorerConfig(**config.model_dump())
    assert config.model == "https://scores.example/v1/score" and config.calibration == "identity" and weights_of(config.model) == ""
    reader_of(config.model)(CONVERSATIONS[0][0], "here")
    assert load(ScorerConfig, None, ["http=https://scores.example/v1/score"]) == config
    assert load(ScorerConfig, None, ["http.url=https://scores.example/v1/score", "http.batch=8"]).http.batch == 8
    assert ScorerConfig(http="https://x/?tokenizer=a&max_tokens=5&keys_of=b").model == "https://x/?tokenizer=a&max_tokens=5&keys_of=b"
    assert "http" not in ScorerConfig(model="m").model_dump()
    for wrong, told in (
        ({"http": "ftp://x"}, "is not an address"), ({"http": "https://me@x/"}, "names a user"),
        ({"http": "https://x/?a=1&API_Key=s3"}, "'API_Key' in its query"), ({"http": {"url": "https://x/?sig="}}, "'sig' in its query"),
        ({"http": "https://x/", "model": "m"}, "give model or http, one of both"), ({"model": "https://x/"}, "give an address as http"),
        ({"http": "https://x/", "python": "a.py:f"}, "give one of python and http"),
        ({"http": "https://x/", "label": "toxic"}, "leave it out"), ({"http": {"batch": 2}}, "url"),
    ):  # fmt: skip
        with pytest.raises(ValidationError, match=told):
            ScorerConfig(**wrong)


def test_its_identity_is_its_address_and_its_declared_version():
    of = lambda url="https://a.example/", **more: ScorerConfig(http={"url": url, **more}).fingerprint()  # noqa: E731
    assert of() == of(timeout_s=5, batch=2, attempts=1, key="A_KEY")
    assert len({json.dumps(found, sort_keys=True) for found in (of(), of("https://b.example/"), of(version="2"))}) == 3
    assert model_contents("https://a.example/") != model_contents("https://b.example/")


def test_the_key_is_in_the_header_and_nowhere_else(listen, monkeypatch):
    def guarded(body, headers):
        said = headers["Authorization"]
        return by_length(body, headers) if said == "Bearer s3cret-key" else (401, {}, {"error": f"who is {said}?"})

    service = listen(guarded)
    config = ScorerConfig(http={"url": service.url, "key": "CTRLRL_TEST_KEY"})
    with pytest.raises(ModelError, match="environment variable CTRLRL_TEST_KEY, which is not set"):
        config.check()
    monkeypatch.setenv("CTRLRL_TEST_KEY", "s3cret-key")
    config.check()
    assert "s3cret" not in dump(config) + json.dumps(config.fingerprint()) + repr(config) + json.dumps(service.asked)
    monkeypatch.setenv("CTRLRL_TEST_KEY", "wr0ng-key")
    with pytest.raises(ModelError, match="does not accept the key in CTRLRL_TEST_KEY; it answers 401.*who is Bearer …") as told:
        config.check()
    assert "wr0ng" not in str(told.value)
    service.answer = lambda *_: (401, {}, b"x" * 190 + b" wr0ng-key")  # said back where it would be cut short
    with pytest.raises(ModelError, match="x …") as told:
        config.check()
    assert "wr0" not in str(told.value)
    service.answer = lambda *_: (200, {}, {"scores": "wr0ng-key"})
    with pytest.raises(ModelError, match="has a list of scores") as told:
        config.check()
    assert "wr0" not in str(told.value)
    monkeypatch.setenv("CTRLRL_TEST_KEY", "schl\u00fcssel")
    with pytest.raises(ModelError, match="CTRLRL_TEST_KEY holds what cannot be in a request's header"):
        config.check()
    service.answer = guarded
    with pytest.raises(ModelError, match="does not accept requests without a key"):
        ScorerConfig(http=service.url).check()
    with pytest.raises(RecipeError, match="key is the name of an environment variable") as told:
        load(ScorerConfig, None, settings={"http": {"url": service.url, "key": "sk-abc123"}})
    assert "abc123" not in str(told.value)
    with pytest.raises(RecipeError, match="names a user") as told:
        load(ScorerConfig, None, settings={"http": {"url": "https://me:abc123@x/"}})
    assert "abc123" not in str(told.value)
    with pytest.raises(RecipeError, match="'key' in its query") as told:
        load(ScorerConfig, None, settings={"http": "https://x/?key=abc123"})
    assert "abc123" not in str(told.value)


def test_what_may_pass_is_tried_again_after_growing_waits_or_as_long_as_asked(listen):
    failures = [(503, {}, b""), (500, {}, b"oops"), (429, {"Retry-After": 7}, b""), (502, {}, b"")]
    service, waits = listen(lambda *given: failures.pop(0) if failures else by_length(*given)), []
    assert scorer_of(service, waits).raw(CONVERSATIONS[:3]).tolist() == pytest.approx([0, 0.01, 0.02])
    assert waits == [1, 2, 7, 8] and len(service.asked) == 5 and all(body == service.asked[0] for body in service.asked)


def test_what_does_not_pass_ends_after_the_attempts(listen):
    service, waits = listen(lambda *_: (503, {}, b"down for\n repairs")), []
    with pytest.raises(DataError, match=r"answers 503 Service Unavailable: down for repairs \(tried 5 times\).*run the same command again"):
        scorer_of(service, waits, attempts=5, longest_wait_s=3).raw(CONVERSATIONS)
    assert waits == [1, 2, 3, 3]
    long = listen(lambda *_: (429, {"Retry-After": 3600}, b""))
    with pytest.raises(DataError, match="asks to wait 3600 s, and longest_wait_s = 60"):
        scorer_of(long, waits).raw(CONVERSATIONS[:1])
    assert len(long.asked) == 1


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ((200, {}, {"scores": [0.5]}), "gave 1 scores for 2 conversations"),
        ((200, {}, {"scores": [0.5, 1.5]}), "gave 1.5 for the answer 'Another answer.' to 'A question.'"),
        ((200, {}, {"scores": [0.5, True]}), "gave True for"),
        ((200, {}, b'{"scores": [0.5, NaN]}'), "does not answer in JSON: NaN is no number"),
        ((200, {}, b'{"scores": [0.5, 0.5], "scores": [0.1, 0.1]}'), "does not answer in JSON: 'scores' is there twice"),
        ((200, {}, b"<html>Please sign in</html>"), "does not answer in JSON"),
        ((200, {}, [0.5, 0.5]), "must answer with an object that has a list of scores"),
        ((200, {}, {"scores": [0.5, None], "reasons": {"1": "too odd"}}), "does not score a small conversation: too odd"),
        ((200, {}, {"scores": [0.5, 0.5], "version": "2"}), "scores by version '2', and http.version = ''"),
        ((200, {}, {"scores": [0.5, "0.5"]}), "gave '0.5' for"),
        ((200, {}, '{"scores": [0.5, "\u00fc"]}'.encode("latin-1")), "does not answer in JSON"),
        ((404, {}, b"no such page"), "answers 404 Not Found: no such page"),
        ((301, {"Location": "http://127.0.0.1:1/"}, b""), "answers 301"),
    ],
)
def test_a_service_that_does_not_score_is_refused_before_anything_starts(listen, said, told):
    service = listen(lambda *_: said)
    with pytest.raises(ModelError, match=told):
        ScorerConfig(http=service.url).check()
    assert len(service.asked) == 1


def test_a_service_that_is_not_there_is_refused_at_once():
    with pytest.raises(ModelError, match="cannot be reached: ConnectError"):
        ScorerConfig(http="http://127.0.0.1:1/").check()


def test_a_lost_connection_and_a_late_answer_are_tried_again(listen):
    late, turns = threading.Event(), iter(range(9))

    def answer(body, headers):
        if (turn := next(turns)) == 0:
            late.wait(60)
        broken = {1: {"Content-Length": 1000}, 2: {"Content-Encoding": "gzip"}}
        return (200, broken[turn], b"{ this is not packed") if turn in broken else by_length(body, headers)

    service, waits = listen(answer), []
    try:
        assert scorer_of(service, waits, timeout_s=2).raw(CONVERSATIONS[5:6]).tolist() == pytest.approx([0.05])
    finally:
        late.set()
    assert waits == [1, 2, 4] and len(service.asked) == 4


def test_an_answer_that_drips_is_given_up_in_time_and_one_that_never_ends(listen, monkeypatch):
    released = threading.Event()

    def dripping():
        while not released.wait(0.02):
            yield b" "

    service = listen(lambda *_: (200, {}, dripping()))
    with pytest.raises(ModelError, match="no whole answer within 0.2 s"):
        ScorerConfig(http={"url": service.url, "timeout_s": 0.2, "attempts": 1}).check()
    released.set()
    monkeypatch.setattr("ctrlrl.models.service._MOST", 1000)
    for said in (b"[" + b"0," * 600, iter([b"0" * 600] * 9)):
        with pytest.raises(ModelError, match="answers more than"):
            ScorerConfig(http=listen(lambda *_, said=said: (200, {}, said)).url).check()


def test_where_a_service_has_gone_is_told_and_no_query_is(listen):
    service = listen(lambda *_: (307, {"Location": "https://elsewhere.example/"}, b""))
    with pytest.raises(ModelError, match="307 Temporary Redirect, to https://elsewhere.example/: if that is the service, give") as told:
        ScorerConfig(http=f"{service.url}?k=secret123").check()
    assert "secret123" not in str(told.value)
    for wrong in ({"timeout_s": "inf"}, {"longest_wait_s": 1e10}):
        with pytest.raises(ValidationError):
            ScorerConfig(http={"url": "https://a.example", **wrong})


def test_an_answer_without_a_score_is_asked_for_alone_then_set_aside(listen):
    hopeless, times = {"xxxxx"}, {}

    def partly(body, headers):
        scores = []
        for given in (c["answer"] for c in body["conversations"]):
            times[given] = times.get(given, 0) + 1
            scores.append(None if given in hopeless or (given == "xx" and times[given] < 3) else 0.5)
        return 200, {}, {"scores": scores, "reasons": {str(i): "too long" for i, s in enumerate(scores) if s is None}}

    service = listen(partly)
    raw, reasons = scorer_of(service, batch=4).reasoned(CONVERSATIONS)
    assert np.isnan(raw).tolist() == [i == 5 for i in range(10)] and reasons == {5: "too long (asked 3 times)"}
    assert times == {c[1]: 3 if c[1] in ("xx", "xxxxx") else 1 for c in CONVERSATIONS}
    assert sorted(len(body["conversations"]) for body in service.asked) == [1, 1, 1, 1, 2, 4, 4]
    hopeless.clear()
    times.clear()
    assert scorer_of(service).reasoned(CONVERSATIONS)[0].tolist() == [0.5] * 10
    hopeless.add("xxxxx")
    assert np.isnan(scorer_of(service).score(CONVERSATIONS[4:7])).tolist() == [False, True, False]


def test_a_version_that_changes_is_refused(listen):
    said = iter(["7", 7, "8"])
    service = listen(lambda body, _: (200, {}, {"scores": [0.5] * len(body["conversations"]), "version": next(said)}))
    config = ScorerConfig(http={"url": service.url, "version": "7"})
    config.check()
    scorer = make_scorer(config)
    assert scorer.raw(CONVERSATIONS[:2]).tolist() == [0.5, 0.5]
    with pytest.raises(DataError, match="scores by version '8', and http.version = '7'"):
        scorer.raw(CONVERSATIONS[:2])
