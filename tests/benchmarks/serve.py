"""What `ctrlrl serve` costs against vLLM's own server, and whether it stands a long mixed load.

    .venv/bin/python tests/benchmarks/serve.py --model runs/demo/ppo/model --prompts runs/demo/world/test.jsonl [--soak 600]

Both servers run on the same engine settings and get the same requests in turn, in one run; vLLM's gets the control as text and the
model's own template. Prints output tokens/s of both at 64 concurrent requests of mixed lengths, the ratio of their medians, and the time to
the first token of a stream at 1, 16 and 64. --soak: seconds of good and malformed requests, with what came of each and the memory.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import aiohttp

from ctrlrl.chat import own_template
from ctrlrl.control import Control
from ctrlrl.models.loading import load_tokenizer
from ctrlrl.serving.policies import hashed

CONTROL, KEY, CONCURRENT = Control(1.0, 0.2), "sk-ctrlrl-benchmark", 64
DIALS = """
constraints = "allowed"
keys = {{ bench = "{key}" }}
dials.wild = {{ helpful = 1, harmless = 0.2, keys = ["bench"] }}
engine = {{ dtype = "{dtype}", max_model_tokens = {tokens}, kv_cache_gib = {gib} }}
audit.file = "{audit}"
"""
BAD = (
    b"{", b'{"messages": []}', b"\xff" * 500, b'{"a":' * 2000, b"[" * 5000, b'{"messages": [{"role": "system", "content": "x"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ 1 }}"}', b" " * 300_000,
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e9}', b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 100000000}', b'{"messages": NaN}',
)  # fmt: skip


class Server:
    """A server process of its own, from start to end."""

    def __init__(self, name: str, command: list[str], port: int, folder: Path):
        self.name, self.url = name, f"http://127.0.0.1:{port}"
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": "1",
                       "VLLM_LOGGING_LEVEL": "ERROR", "TORCHDYNAMO_DISABLE": "1"}  # fmt: skip
        self._log = (folder / f"{name}.log").open("w")
        self.process = subprocess.Popen([sys.executable, *command], stdout=self._log, stderr=self._log, env=environment)

    def wait(self) -> None:
        """Until it answers."""
        end = time.monotonic() + 300
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if urllib.request.urlopen(f"{self.url}/health", timeout=2).status == 200:
                    return
            except OSError:
                time.sleep(0.5)
        raise SystemExit(f"{self.name} does not start: {Path(self._log.name).read_text()[-2000:]}")

    def memory(self) -> float:
        """Resident MiB of the process and its children."""
        pids = [self.process.pid]
        pids += [int(pid) for pid in Path(f"/proc/{pids[0]}/task/{pids[0]}/children").read_text().split()]
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def stop(self) -> int:
        """End it; its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return -9


def start(arguments, folder: Path) -> dict[str, Server]:
    """Both servers."""
    ports = []
    for _ in range(2):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            ports.append(sock.getsockname()[1])
    dials, template = folder / "dials.toml", folder / "template.jinja"
    settings = dict(key=hashed(KEY), dtype=arguments.dtype, tokens=arguments.tokens, gib=arguments.gib, audit=folder / "audit.jsonl")
    dials.write_text(DIALS.format(**settings))
    template.write_text(own_template(load_tokenizer(arguments.model)))
    vllm = [
        "-m", "vllm.entrypoints.openai.api_server", "--model", arguments.model, "--served-model-name", "bench", "--host", "127.0.0.1",
        "--port", str(ports[1]), "--dtype", arguments.dtype, "--max-model-len", str(arguments.tokens), "--enforce-eager",
        "--kv-cache-memory-bytes", str(int(arguments.gib * 2**30)), "--max-num-seqs", "256", "--block-size", "32",
        "--no-enable-chunked-prefill", "--chat-template", str(template), "--disable-uvicorn-access-log", "--load-format", "safetensors",
    ]  # fmt: skip
    ours = ["-m", "ctrlrl.cli", "serve", arguments.model, "--dials", str(dials), "--port", str(ports[0]), "--name", "bench"]
    servers = {"ctrlrl": Server("ctrlrl", ours, ports[0], folder)}
    if not arguments.soak:
        servers["vllm"] = Server("vllm", vllm, ports[1], folder)
    for server in servers.values():
        server.wait()
    return servers


def requests(prompts: list[str], count: int, seed: int, name: str, **fields) -> list[dict]:
    """Requests of mixed lengths; the same for both servers but for the control, which one of them is given in the text."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        asked = " ".join(rng.choice(prompts) for _ in range(rng.choice((1, 1, 2, 4))))
        text = asked if name == "ctrlrl" else f"{asked} {CONTROL.spell()}"
        length = rng.choice((16, 32, 64, 128))
        made.append({"model": "bench", "messages": [{"role": "user", "content": text}], "max_tokens": length, "seed": seed * 10_000 + i,
                     "ignore_eos": True, "temperature": 0.7, "top_p": 0.95, **fields})  # fmt: skip
    return made


async def ask_all(url: str, bodies: list[dict], concurrent: int, ask) -> list:
    """`ask(session, body)` of all, so many at a time."""
    queue, found = iter(bodies), []

    async def work(session):
        for body in queue:
            found.append(await ask(session, body))

    headers = {"Authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession(url, headers=headers, connector=aiohttp.TCPConnector(limit=concurrent)) as session:
        await asyncio.gather(*(work(session) for _ in range(concurrent)))
    return found


async def whole(session, body) -> int:
    """Tokens of an answer."""
    async with session.post("/v1/chat/completions", json=body) as response:
        assert response.status == 200, await response.text()
        return (await response.json())["usage"]["completion_tokens"]


async def first_token(session, body) -> float:
    """Seconds to the first text of a stream, which is read to its end."""
    began, first = time.perf_counter(), None
    async with session.post("/v1/chat/completions", json={**body, "stream": True}) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if first is None and b'"content":"' in line and b'"content":""' not in line:
                first = time.perf_counter() - began
    return first if first is not None else time.perf_counter() - began


def speed(servers: dict[str, Server], prompts: list[str], count: int, rounds: int) -> None:
    """Tokens/s of both in turn."""
    rates: dict[str, list[float]] = {name: [] for name in servers}
    for turn in range(rounds + 1):
        for name, server in servers.items():
            bodies = requests(prompts, count if turn else 64, turn, name)
            began = time.perf_counter()
            tokens = sum(asyncio.run(ask_all(server.url, bodies, CONCURRENT, whole)))
            if turn:  # the first warms up
                rates[name].append(tokens / (time.perf_counter() - began))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print("tokens/s, 64 concurrent:", {name: [round(v) for v in values] for name, values in rates.items()})
    print(f"median ctrlrl / vllm: {medians['ctrlrl']:.0f} / {medians['vllm']:.0f} = {medians['ctrlrl'] / medians['vllm']:.2f}")


def latency(servers: dict[str, Server], prompts: list[str]) -> None:
    """Time to the first token of both, in turn, at several loads."""
    for concurrent in (1, 16, 64):
        found: dict[str, list[float]] = {name: [] for name in servers}
        for turn in range(4):
            for name, server in servers.items():
                bodies = requests(prompts, max(16, 2 * concurrent), 100 + turn, name)
                found[name] += asyncio.run(ask_all(server.url, bodies, concurrent, first_token))
        times = {name: [1000 * value for value in sorted(values)] for name, values in found.items()}
        shown = {name: f"{statistics.median(v):.0f} ms, 95 % in {v[int(0.95 * len(v))]:.0f} ms" for name, v in times.items()}
        print(f"first token at {concurrent}:", shown)


async def soaked(server: Server, prompts: list[str], seconds: float) -> tuple[dict, list[float]]:
    """What came of good and bad requests (kind and status -> count), and the memory by the minute."""
    counts: dict[str, int] = {}
    memory, end = [], time.monotonic() + seconds
    good = requests(prompts, 400, 7, "ctrlrl")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}

    async def client(session, seed):
        rng = random.Random(seed)
        while time.monotonic() < end:
            bad = rng.random() < 0.4
            body = rng.choice(BAD) if bad else json.dumps({**rng.choice(good), "stream": rng.random() < 0.5}).encode()
            leaves = not bad and rng.random() < 0.1
            try:
                timeout = aiohttp.ClientTimeout(total=0.05 if leaves else 120)
                async with session.post("/v1/chat/completions", data=body, headers=headers, timeout=timeout) as response:
                    text = await response.read()
                    whole = b'"usage"' in text or b"[DONE]" in text or response.status != 200
                    name = f"{'bad' if bad else 'good'} {response.status if whole else 'cut'}"
            except TimeoutError:
                name = "left" if leaves else "good lost"
            counts[name] = counts.get(name, 0) + 1

    async def watch():
        while time.monotonic() < end:
            await asyncio.sleep(min(30.0, seconds / 20))
            memory.append(round(server.memory(), 1))

    async with aiohttp.ClientSession(server.url) as session:
        await asyncio.gather(watch(), *(client(session, seed) for seed in range(24)))
    return counts, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--gib", type=float, default=0.5)
    parser.add_argument("--count", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--soak", type=float, default=0, metavar="SECONDS")
    arguments = parser.parse_args()
    prompts = [json.loads(line)["prompt"] for line in Path(arguments.prompts).read_text().splitlines()]
    prompts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
    with tempfile.TemporaryDirectory() as folder:
        servers = start(arguments, Path(folder))
        try:
            if arguments.soak:
                counts, memory = asyncio.run(soaked(servers["ctrlrl"], prompts, arguments.soak))
                print("answers:", dict(sorted(counts.items())), "\nMiB of the server and its engine:", memory)
            else:
                speed(servers, prompts, arguments.count, arguments.rounds)
                latency(servers, prompts)
        finally:
            codes = {name: server.stop() for name, server in servers.items()}
        print("exit codes:", codes)


if __name__ == "__main__":
    main()
