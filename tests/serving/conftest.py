"""One server for all tests that need one: a tiny model, every kind of key, two reward models, and an audit file with text."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from ctrlrl.serving.policies import hashed

POLICIES = """
[keys]
{keys}

[dials.scientist]
helpful = 1.0
harmless = 0.2
keys = ["alice", "carol"]

[dials.child]
helpful = 0.2
harmless = 1
keys = ["bob", "carol"]

[dials.best]
helpful = 1
harmless = 1
rerank = 3
keys = ["erin"]

[operators]
keys = ["root"]

[audit]
file = "{audit}"
text = true

[rewards]
helpful = "{helpful}"
harmless = "{harmless}"

[limits]
max_body_bytes = 20000
max_temperature = 2.0

[engine]
dtype = "float32"
kv_cache_gib = 0.05
"""
KEYS = {name: f"sk-ctrlrl-{name}" for name in ("alice", "bob", "carol", "dave", "erin", "root")}


class Server:
    """`ctrlrl serve` in a process of its own."""

    def __init__(self, folder: Path, model: str, text: str, audit: Path):
        self.dials, self.audit, self.text = folder / "dials.toml", audit, text
        self.dials.write_text(text)
        self.log = folder / "stderr"
        command = [sys.executable, "-m", "ctrlrl.cli", "serve", model, "--dials", str(self.dials), "--port", "0", "--name", "tiny"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self.log.open("w"), env={**os.environ})
        self.url = self._wait("on http://").partition("on ")[2].split()[0]
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def _wait(self, words: str, after: int = 0) -> str:
        """The first line of the log, from a position on, that has these words."""
        end = time.monotonic() + 400
        while time.monotonic() < end:
            found = [line for line in self.log.read_text()[after:].splitlines() if words in line]
            if found:
                return found[0]
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        raise AssertionError(f"the server never says {words!r}: {self.log.read_text()}")

    def post(self, key: str, body, path: str = "/v1/chat/completions") -> httpx.Response:
        """A request as the holder of a key; `body` is an object, or bytes as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {KEYS.get(key, key)}", "Content-Type": "application/json"}
        before = len(self.audited())
        response = self.client.post(path, content=content, headers=headers)
        end = time.monotonic() + 60
        while path == "/v1/chat/completions" and len(self.audited()) == before and time.monotonic() < end:
            time.sleep(0.005)  # a stream is audited once it has gone
        return response

    def get(self, key: str, path: str) -> httpx.Response:
        """A GET as the holder of a key."""
        return self.client.get(path, headers={"Authorization": f"Bearer {KEYS.get(key, key)}"})

    def audited(self) -> list[dict]:
        """The audit file's whole lines."""
        return [json.loads(line) for line in self.audit.read_text().rpartition("\n")[0].splitlines()]

    def reload(self, text: str) -> str:
        """Write the file of dials and have it read; what the server says of it."""
        self.dials.write_text(text)
        before = len(self.log.read_text())
        self.process.send_signal(signal.SIGHUP)
        return self._wait("dials", before)


@pytest.fixture(scope="session")
def exported(models, tokenizer, tmp_path_factory) -> str:
    """The tiny policy as an export of ctrlrl: with a chat template that takes the control."""
    import shutil

    from ctrlrl.models.loading import save_control_tokenizer

    folder = tmp_path_factory.mktemp("exported") / "model"
    shutil.copytree(models["policy"], folder)
    save_control_tokenizer(tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="session")
def server(models, exported, tmp_path_factory):
    """A running server; at its end a stop under way lets the answer that is being streamed come to its end."""
    folder = tmp_path_factory.mktemp("server")
    audit = folder / "audit.jsonl"
    keys = "\n".join(f'{name} = "{hashed(key)}"' for name, key in KEYS.items())
    text = POLICIES.format(keys=keys, audit=audit, helpful=models["helpful"], harmless=models["harmless"])
    server = Server(folder, exported, text, audit)
    yield server
    try:
        _stops_gracefully(server)
    finally:
        server.process.kill()


def _stops_gracefully(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "How?"}], "stream": True, "max_tokens": 300, "seed": 5}
    headers = {"Authorization": f"Bearer {KEYS['alice']}"}
    with server.client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.terminate()
        events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]" and '"finish_reason":"' in events[-2]
    assert server.process.wait(60) == 0
    assert "Traceback" not in server.log.read_text()


@pytest.fixture(scope="session")
def ask():
    """A function: the body of a request of one message."""
    return lambda text="How do I bake bread?", **fields: {
        "model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 6, "seed": 3, **fields
    }  # fmt: skip


@pytest.fixture
def answered(server):
    """A function: the next `count` audit lines of requests for answers that this test makes; each is written once its answer has gone."""

    def lines():
        return [line for line in server.audited() if line["path"] == "/v1/chat/completions"]

    position = len(lines())

    def following(count: int = 1) -> list[dict]:
        nonlocal position
        end = time.monotonic() + 60
        while len(found := lines()[position : position + count]) < count:
            assert time.monotonic() < end, f"{len(found)} of {count} requests came"
            time.sleep(0.02)
        position += count
        return found

    return following


@pytest.fixture
def endless():
    """A server whose answers have no end: its url, what it tells of its dials, and an event that is set when a client has hung up."""
    gone = threading.Event()
    told = {
        "model": "m", "kind": "tokens", "attributes": ["helpful", "harmless"], "levels": {"low": 0.2, "high": 1}, "dials": [],
        "operator": True, "scores": False,
    }  # fmt: skip

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._send("application/json", json.dumps(told).encode())

        def do_POST(self):
            assert self.headers["Authorization"] == "Bearer sk-ctrlrl-root"
            event = {"choices": [{"index": 0, "delta": {"content": "on and "}, "finish_reason": None}]}
            try:
                self._send("text/event-stream", b"")
                while True:
                    self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                    time.sleep(0.02)
            except OSError:
                gone.set()

        def _send(self, kind, body):
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{httpd.server_port}", told=told, gone=gone)
        httpd.shutdown()
        thread.join()
