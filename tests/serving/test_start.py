"""`ctrlrl serve` at its start and at its end: a model that cannot answer is refused before anybody can ask, and no engine is left over."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import serve

SETTINGS = ("engine.dtype=float32", "engine.kv_cache_gib=0.05")


@pytest.fixture(scope="module")
def unfit(models, tokenizer, tmp_path_factory) -> dict[str, str]:
    """Models that load and cannot answer: heads of a width that the engine has no attention for, and a weight that is no number."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    root = tmp_path_factory.mktemp("unfit")
    narrow = Qwen2Config(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    broken = AutoModelForCausalLM.from_pretrained(models["policy"])
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    for name, model in (("narrow", Qwen2ForCausalLM(narrow)), ("broken", broken)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: str(root / name) for name in ("narrow", "broken")}


def started(model: str, log: Path) -> subprocess.Popen:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [sys.executable, "-m", "ctrlrl.cli", "serve", model, "--port", "0", *settings]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log.open("w"), env={**os.environ})


def processes_of(parent: int) -> list[int]:
    """Children of a process that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, above = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if int(above) == parent and state != "Z":
                found.append(int(entry.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_who_cannot_answer_is_refused_and_a_killed_server_leaves_no_engine(unfit, models, tmp_path):
    """Three at once, since starting is what takes the time."""
    logs = {name: tmp_path / name for name in (*unfit, "fit")}
    servers = {name: started({**unfit, "fit": models["policy"]}[name], logs[name]) for name in logs}
    try:
        end = time.monotonic() + 400
        while " on http://" not in logs["fit"].read_text():
            assert servers["fit"].poll() is None and time.monotonic() < end, logs["fit"].read_text()
            time.sleep(0.1)
        (engine,) = processes_of(servers["fit"].pid)  # a fork, without what starts and tends processes that import for themselves
        assert processes_of(engine) == []
        servers["fit"].kill()
        end = time.monotonic() + 60
        while alive(engine):
            assert time.monotonic() < end, "the engine outlives its server"
            time.sleep(0.05)
        for name, words in (("narrow", "cannot run"), ("broken", "are not finite")):
            assert servers[name].wait(400) == 2, logs[name].read_text()
            said = logs[name].read_text()
            assert words in said and unfit[name] in said and " on http://" not in said, said
    finally:
        for server in servers.values():
            server.kill()


def test_an_engine_that_is_forked_leaves_the_server_its_port_and_its_signals():
    sock, (ours, theirs) = serve._bound("127.0.0.1", 0), socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno())
    child = os.fork()
    if not child:
        serve._part_from(sock)
        signal.signal(signal.SIGUSR1, lambda *_: None)
        os.kill(os.getpid(), signal.SIGUSR1)
        os._exit(int(sock.fileno() != -1))
    signal.set_wakeup_fd(before)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with pytest.raises(BlockingIOError):
        ours.recv(1)
    for end in (ours, theirs, sock):
        end.close()
