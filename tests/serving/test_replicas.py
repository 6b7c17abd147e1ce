"""`ctrlrl serve` as a Ray Serve application, on a local cluster: the same HTTP, and new dials without a new start."""

import socket
import time

import httpx
import pytest

from ctrlrl.control import Control
from ctrlrl.errors import RecipeError
from ctrlrl.models.loading import load_tokenizer
from ctrlrl.prompts import render
from ctrlrl.serving.policies import hashed

POLICIES = """
keys = {{ alice = "{alice}", root = "{root}" }}
dials.wild = {{ helpful = 1, harmless = {harmless}, keys = ["alice"] }}
operators.keys = ["root"]
engine = {{ dtype = "float32", kv_cache_gib = 0.05 }}
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_a_replica_answers_and_takes_new_dials(ray_cluster, exported, tmp_path):
    from ray import serve

    from jobs.replicas import ReplicaConfig, deployment

    dials, port = tmp_path / "dials.toml", free_port()
    hashes = {"alice": hashed("a-key"), "root": hashed("r-key")}
    dials.write_text(POLICIES.format(harmless=0.2, **hashes))
    small = deployment().options(health_check_period_s=1, ray_actor_options={"num_cpus": 0.5})
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(small.bind(ReplicaConfig(model=exported, dials=str(dials), name="tiny")), name="ctrlrl")
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
        body = {"messages": [{"role": "user", "content": "How?"}], "max_tokens": 3}

        def post(key, **fields):
            return client.post("/v1/chat/completions", json={**body, **fields}, headers={"Authorization": f"Bearer {key}"})

        prompt = len(render(load_tokenizer(exported), body["messages"], Control(1, 0.2).spell()))
        assert post("a-key").json()["usage"]["prompt_tokens"] == prompt
        assert post("r-key", model="tiny:wild", return_token_ids=True).json()["prompt_token_ids"] == render(
            load_tokenizer(exported), body["messages"], Control(1, 0.2).spell()
        )
        assert post("b-key").status_code == 401 and post("a-key", dial={"helpful": 0, "harmless": 0}).status_code == 400
        assert post("a-key", stream=True).text.endswith("data: [DONE]\n\n")
        dials.write_text(POLICIES.format(harmless=0.4, **hashes))
        due, end = render(load_tokenizer(exported), body["messages"], Control(1, 0.4).spell()), time.monotonic() + 60
        while post("r-key", model="tiny:wild", return_token_ids=True).json()["prompt_token_ids"] != due:
            assert time.monotonic() < end
            time.sleep(0.5)
    finally:
        serve.shutdown()


def test_wrong_arguments_are_told_before_anything_is_deployed():
    from jobs.replicas import build

    with pytest.raises(RecipeError, match="did you mean 'model'"):
        build({"modle": "x", "dials": "y"})
    with pytest.raises(RecipeError, match="'dials' is required"):
        build({"model": "x"})
