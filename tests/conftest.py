"""Shared by all tests: a private Ray cluster for each process that runs some, tiny models, and a check that nothing is left running.

The environment is set before Ray is imported; logical CPUs are over-committed, since tiny workers mostly wait.
"""

import contextlib
import gc
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
from schedule import ByChain, in_order

# One for the session, made by the process that hands out the tests, and one in it for each process that runs some (pytest -n 3).
# Short, because Unix socket paths end at 107 bytes.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER")
_FOLDER = os.environ["CTRLRL_TESTS"] if _WORKER else tempfile.mkdtemp(prefix="ctrlrl")
_RAY_FOLDER = str(Path(_FOLDER, _WORKER or "r"))
os.makedirs(_RAY_FOLDER, exist_ok=True)
os.environ.update(
    CTRLRL_TESTS=_FOLDER,
    RAY_TMPDIR=_RAY_FOLDER,
    RAY_AUTH_MODE="disabled",
    RAY_memory_monitor_refresh_ms="0",  # other processes on the machine are not our tests' fault
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_LOG_MONITOR_MANY_FILES_THRESHOLD="0",  # nobody reads workers' output; to look for it ten times a second costs seconds a minute
    LOG_NAME_UPDATE_INTERVAL_S="60",
    REPORTER_UPDATE_INTERVAL_MS="60000",  # nor at a node's own figures
    RAY_DASHBOARD_AGENT_LOOP_MONITOR_INTERVAL_S="60",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.pop("RAY_ADDRESS", None)

TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
QUESTIONS = [f"How do I bake {count} loaves of bread?" for count in range(40)]


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray cluster for all tests that need one."""
    import ray

    from actors.nursery import executable

    ray.init(
        address="local",
        num_cpus=32,
        include_dashboard=False,
        object_store_memory=200 << 20,
        log_to_driver=False,
        logging_level="ERROR",
        namespace="ctrlrl",
        runtime_env={"py_executable": executable()},
    )
    yield ray
    ray.shutdown()


@pytest.fixture
def joining(ray_cluster):
    """Variables of the environment with which a process of its own joins the tests' cluster, and its workers are forked as ours are."""
    from actors.nursery import executable

    given = {"runtime_env": {"py_executable": executable()}}  # as Ray's job server gives it
    context = ray_cluster.get_runtime_context()
    yield {"RAY_ADDRESS": context.gcs_address, "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(given)}
    own = f"RAY_JOB_ID={context.get_job_id()}".encode()
    for pid in _ours():  # what its workers were forked from would stay, with its memory, as long as the cluster
        with contextlib.suppress(OSError):
            command, environment = (Path(f"/proc/{pid}/{name}").read_bytes().split(b"\0") for name in ("cmdline", "environ"))
            if b"--serve" in command and _RAY_FOLDER.encode() in b" ".join(command) and own not in environment:
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def engine_pids():
    """A function: process ids of the parts of the engines that a rollout pool's workers have, which answer when they have nothing to do."""
    import ray

    def pids(rollout) -> list[int]:
        return sum(ray.get([w.__ray_call__.remote(lambda worker: worker.sampler.pids) for w in rollout.pool.at_work()], timeout=60), [])

    return pids


@pytest.fixture
def cluster_config():
    """Deadlines that suit tiny models on a busy machine."""
    from actors.placement import ClusterConfig

    return ClusterConfig(placement_deadline_s=120, call_deadline_s=120, start_deadline_s=240)


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE with a chat template; pad, begin and end differ."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<pad>", "<s>", "<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(QUESTIONS + ["[helpful=0.2][harmless=1]", "user: assistant: Mix flour and water."], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="<end>")
    fast.chat_template = TEMPLATE
    return fast


def _llama(**changes):
    from transformers import LlamaConfig

    sizes = dict(
        vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    return LlamaConfig(**{**sizes, **changes})


@pytest.fixture(scope="session")
def models(tmp_path_factory, tokenizer) -> dict[str, str]:
    """Directories of tiny random models: policy (untied head), tied (tied head), helpful and harmless (reward models), two_labels."""
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    root, made = tmp_path_factory.mktemp("models"), {}
    kinds = {
        "policy": (LlamaForCausalLM, {}),
        "tied": (LlamaForCausalLM, {"tie_word_embeddings": True}),
        "helpful": (LlamaForSequenceClassification, {"num_labels": 1}),
        "harmless": (LlamaForSequenceClassification, {"num_labels": 1}),
        "two_labels": (LlamaForSequenceClassification, {"num_labels": 2}),
    }
    for seed, (name, (kind, changes)) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        kind(_llama(**changes)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        made[name] = str(root / name)
    return made


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory) -> str:
    """A JSONL file of the questions."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    return str(path)


@pytest.fixture(scope="session")
def ppo_overrides(models, prompt_file) -> list[str]:
    """Overrides that make PPO run on the tiny models within seconds."""
    settings = {
        "prompts": prompt_file, "steps": 2, "checkpoint_every": 1, "policy.model": models["policy"],
        "policy.train.dtype": "float32", "policy.train.learning_rate": 1e-3, "policy.train.zero_stage": 0,
        "value.train.dtype": "float32", "value.train.learning_rate": 1e-3, "value.train.zero_stage": 0,
        "reference.dtype": "float32", "reward.helpful.model": models["helpful"], "reward.harmless.model": models["harmless"],
        "rollout.chunk": 8, "rollout.engine.dtype": "float32", "rollout.engine.max_model_tokens": 128, "rollout.engine.kv_cache_gib": 0.05,
        "sampling.max_new_tokens": 12, "algorithm.queries_per_step": 24, "algorithm.minibatches": 2, "algorithm.truncated": "score",
        "policy.train.micro_batch_tokens": 2048, "value.train.micro_batch_tokens": 2048,  # as without a recipe
        "cluster.placement_deadline_s": 120, "cluster.start_deadline_s": 240, "cluster.call_deadline_s": 120,
    }  # fmt: skip
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


@pytest.fixture(scope="session")
def make_answers():
    """A function: a table of `prompts` prompts by a method, with random scores (few different ones, so that ties occur)."""
    import numpy as np

    from ctrlrl.control import ATTRIBUTES, CORNERS
    from ctrlrl.data.sources import Prompt
    from ctrlrl.evaluation.baselines import SYSTEM_CONTROLS
    from ctrlrl.evaluation.grid import make_cells, make_table

    def make(prompts=6, method="control", judges=("optimisation", "held_out"), seed=0, controls=None, responses=None, first=0):
        numbers = range(first, first + prompts)
        asked = [Prompt(f"p{i}", ({"role": "user", "content": f"Question {i} | <b>really</b>?"},), f"f:{i}") for i in numbers]
        templates = {"prompting": (1, 2, 3, 4), "reranking": (1,)}.get(method, (None,))
        controls = controls or (SYSTEM_CONTROLS if method == "system" else CORNERS)
        cells = make_cells(asked, controls, method, templates)
        rng = np.random.default_rng(seed)
        scores = {judge: {a: rng.choice([0.0, 0.25, 0.5, 0.75, 1.0], len(cells)) for a in ATTRIBUTES} for judge in judges}
        said = responses or [f"Answer {i} & more" for i in range(len(cells))]
        return make_table(cells, said, np.arange(len(cells)) % 7 + 1, np.arange(len(cells)) % 5 > 0, scores)

    return make


@pytest.fixture(scope="session")
def write_evaluation(make_answers):
    """A function: an evaluated directory with a table, metrics, details and costs; returns (metrics, details)."""
    import pyarrow.parquet as pq

    from ctrlrl.evaluation.results import MeasureConfig, results

    def write(path, **settings):
        path.mkdir(parents=True)
        table = make_answers(**settings)
        metrics, details = results(table, MeasureConfig(draws=20), 1)
        details["name"] = path.name
        pq.write_table(table, path / "table.parquet")
        cost = {"answers": len(table), "tokens": 1000, "start_s": 10.0, "wall_s": 30.0, "engine_s": 20.0}
        for name, content in (("metrics", metrics), ("details", details), ("cost", cost)):
            (path / f"{name}.json").write_text(json.dumps(content, sort_keys=name != "metrics"))
        return metrics, details

    return write


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """In the order of schedule.py; tests of one file stay together, in theirs."""
    items[:] = in_order(items)
    gc.freeze()  # imports and tests stay: garbage collections, which some engines and pytest ask for, pass over them


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With --dist loadfile, files that share something go to one process."""
    return ByChain(config, log) if config.getvalue("dist") == "loadfile" else None


def _ours() -> list[int]:
    """Processes that belong to our folder, by command line or environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            known = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if _FOLDER.encode() in known and int(entry.name) != os.getpid() and state != "Z":
            found.append(int(entry.name))
    return found


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """Fail the run if it leaves processes behind, and end those."""
    if _WORKER:
        return  # the process that handed out the tests looks after all
    end = time.monotonic() + 60
    while _ours() and time.monotonic() < end:
        time.sleep(0.2)
    left = _ours()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    if left and exitstatus == 0:
        print(f"\nprocesses were left running: {left}")
        session.exitstatus = 1
    shutil.rmtree(_FOLDER, ignore_errors=True)
