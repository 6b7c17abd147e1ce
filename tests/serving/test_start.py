"""`ctrlrl serve` at its start and at its end: a model that cannot answer is refused before anybody can ask, and no engine is left over."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ctrlrl.models.sampler import EngineConfig, environment
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


def started(servers: dict[str, str], folder: Path) -> subprocess.Popen:
    """A process whose forks serve these models, by name; what it tells of them is in the folder, and what each says."""
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    commands = {name: [str(folder / name), ["serve", model, "--port", "0", *settings]] for name, model in servers.items()}
    script = str(Path(__file__).with_name("several.py"))
    known = os.environ | environment(EngineConfig()) | serve._ENVIRONMENT  # as `ctrlrl serve` has it before its imports
    with (folder / "told").open("w") as told, (folder / "beginning").open("w") as rest:
        return subprocess.Popen([sys.executable, script, json.dumps(commands)], stdout=told, stderr=rest, env=known)


def told(folder: Path) -> dict[tuple[str, str], int]:
    """The process id and, once it has ended, the exit code of each server."""
    lines = (folder / "told").read_text().rpartition("\n")[0].splitlines()  # some imports print, too
    return {(name, what): number for name, what, number in (json.loads(line) for line in lines if line.startswith('["'))}


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
    mother, end = started({**unfit, "fit": models["policy"]}, tmp_path), time.monotonic() + 400

    def said(name: str) -> str:
        return "".join(path.read_text() for path in (tmp_path / "beginning", tmp_path / name) if path.exists())

    try:
        while " on http://" not in said("fit"):
            assert mother.poll() is None and ("fit", "code") not in told(tmp_path) and time.monotonic() < end, said("fit")
            time.sleep(0.1)
        fit = told(tmp_path)["fit", "pid"]
        (engine,) = processes_of(fit)  # a fork, without what starts and tends processes that import for themselves
        assert processes_of(engine) == []
        os.kill(fit, signal.SIGKILL)
        end = time.monotonic() + 60
        while alive(engine):
            assert time.monotonic() < end, "the engine outlives its server"
            time.sleep(0.05)
        mother.wait(400)
        for name, words in (("narrow", "cannot run"), ("broken", "are not finite")):
            assert told(tmp_path)[name, "code"] == 2, said(name)
            assert words in said(name) and unfit[name] in said(name) and " on http://" not in said(name), said(name)
    finally:
        mother.kill()
        for (name, what), number in told(tmp_path).items():
            if what == "pid" and (name, "code") not in told(tmp_path):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)


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
