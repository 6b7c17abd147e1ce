"""A disk that refuses, at every place where something is written: one typed error that names the file, and nothing half-written.

The disks are real: a small tmpfs that is filled up, or mounted read-only. Where nothing may be mounted, a limit on the size of files stands
in for it, and the tests that need a mount are skipped.
"""
import json
import os
import resource
import subprocess
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ray.exceptions import RayTaskError
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from ctrlrl.config import Section
from ctrlrl.data.atomic import write_atomically, write_directory, write_json
from ctrlrl.data.calibration import Calibration
from ctrlrl.data.critique import CritiqueLayout
from ctrlrl.data.disk import storage_error
from ctrlrl.data.distill import distill
from ctrlrl.data.dpo import write_reference
from ctrlrl.data.generation import Layout
from ctrlrl.data.lock import DirectoryLock
from ctrlrl.data.rejects import Reject, write_rejects
from ctrlrl.data.shards import ShardStore
from ctrlrl.data.sources import Prompt
from ctrlrl.errors import CtrlrlError, DataError, RunError, StorageError
from ctrlrl.evaluation.exhibits import Exhibits
from ctrlrl.evaluation.plots import score_distribution
from ctrlrl.evaluation.report import write_report
from ctrlrl.runs import Run, read_metrics
from jobs.parts.launch import mistakes_told
from tests.data.test_distill import some_rows, written

BIG = "x" * (1 << 20)
_NUMBERS = np.arange(4000)[:, None]
TABLE = pa.table({"text": [row.tobytes().decode() for row in (33 + (7 * _NUMBERS**2 + 13 * np.arange(200)) % 90).astype(np.uint8)]})


class Recipe(Section):
    """A recipe of one key."""

    steps: int = 1


def mounted(folder, *options):
    folder.mkdir(exist_ok=True)
    found = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"NO TMPFS CAN BE MOUNTED HERE, full disks are not tried: {found.stderr.strip()}")


@pytest.fixture
def small(tmp_path):
    """A disk of 1 MiB."""
    folder = tmp_path / "small"
    mounted(folder, "size=1m")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder, left=0):
    """Use the disk up to `left` bytes."""
    with open(folder / "filler", "wb", buffering=0) as file:
        with pytest.raises(OSError):
            while file.write(b"x" * 65536):
                pass
    os.truncate(folder / "filler", max(0, os.path.getsize(folder / "filler") - left))


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.name != "filler")


WRITERS = {
    "record": lambda d: write_json(d / "000000.json", {"facts": BIG}),
    "prompts": lambda d: Layout(d).write_prompts([Prompt("0" * 16, ({"role": "user", "content": str(os.urandom(1 << 20))},), "f:1")]),
    "rejects": lambda d: write_rejects(d, [Reject("f:1", "bad", BIG)]),
    "table": lambda d: write_atomically(d / "table.parquet", partial(pq.write_table, TABLE, compression="none", use_dictionary=False)),
    "reference": lambda d: write_reference(d / "reference.parquet", np.random.default_rng(0).random((90_000, 2)), {}),
    "calibration": lambda d: Calibration("quantile", tuple(range(60_000)), tuple(k / 70_000 for k in range(60_000))).save(d / "c.json"),
    "report": lambda d: write_report(Exhibits(), d, BIG),
    "picture": lambda d: score_distribution(np.ones((50, 50)), d / "scores.png", extremes={}),
    "torch": lambda d: write_directory(d / "step-000001", lambda folder: torch.save(torch.zeros(1 << 19), folder / "weights.pt")),
    "safetensors": lambda d: write_directory(d / "model", save_safetensors),
    "text": lambda d: write_directory(d / "step-000001", lambda folder: (folder / "state.json").write_text(BIG)),
    "lock": lambda d: [DirectoryLock(d / f"{i}").take() for i in range(5000)],
}


def save_safetensors(folder):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1 << 19)}, folder / "model.safetensors")


@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk_is_told_and_nothing_half_written_stays(small, what):
    fill(small, left=4096 if what == "lock" else 8192)
    with pytest.raises(StorageError, match=rf"{small}.* cannot be written: No space left on device \(0\.\d of 1\.0 MiB free on {small}\)"):
        WRITERS[what](small)
    if what != "lock":
        assert names(small) == []


def test_a_shard_that_did_not_fit_is_made_when_there_is_room(small):
    with ShardStore(small / "s").open_or_create({"x": 1}, shards=2) as store:
        store.commit(0, pa.table({"x": [1]}), {})
        fill(small, left=20_000)
        with pytest.raises(StorageError, match=r"000001.parquet cannot be written: No space left .*: free space there, and run the same"):
            store.commit(1, TABLE, {})
        assert store.missing() == [1] and store.strays() == ()
        (small / "filler").unlink()
        store.commit(1, pa.table({"x": [2]}), {})
        store.finish({})
        fill(small)
        assert store.finished and ShardStore(small / "s").verify().ok


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread meets the full disk too
def test_a_run_on_a_full_disk_resumes_exactly(small, capfd):
    def write(folder):
        (folder / "weights").write_text("w" * 200_000)

    with Run.open(str(small / "run"), Recipe(), resume=False) as run:
        run.begin()
        run.log(0, {"loss": 0.0})
        run.checkpoint(1, write)
        fill(small, left=100_000)
        run.log(1, {"loss": 1.0})
        with pytest.raises(StorageError, match="checkpoints/step-000002 cannot be written: No space left"):
            run.checkpoint(2, write)
        fill(small)
        with pytest.raises(StorageError, match="metrics.jsonl cannot be written: No space left"):
            for step in range(2, 200):
                run.log(step, {f"loss{k}": 1.0 for k in range(50)})
    rows = (small / "run" / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert all(json.loads(row) and row.endswith(b"\n") for row in rows)  # no row is half there
    for file in (small / "run" / "tensorboard").iterdir():
        assert [event.step for event in EventFileLoader(str(file)).Load()][:3] == [0, 0, 1]  # nor an event: its own start, two steps
    assert "Traceback" not in capfd.readouterr().err  # of a thread that writes
    with Run.open(str(small / "run"), Recipe(), resume=True) as run, pytest.raises(StorageError, match="No space left"):
        run.begin()
        run.latest()
        fill(small)
        run.log(1, {f"loss{k}": 1.0 for k in range(9000)})
    (small / "filler").unlink()
    with Run.open(str(small / "run"), Recipe(), resume=True) as run:
        run.begin()
        assert run.latest()[0] == 1 and [row["step"] for row in read_metrics(small / "run")] == [0]
        run.checkpoint(2, write)
        run.whole_directory("model", write)
    assert not [name for name in names(small) if "/." in name]


def test_a_distillation_on_a_full_disk_leaves_its_scratch_to_nobody(small, tmp_path):
    rows = some_rows({(p, 0, i): (0.1 + 0.8 * (i % 2), 0.9) for p in range(8) for i in range(100)})
    (tmp_path / "source").mkdir()
    source = written(tmp_path / "source", rows, 100)
    fill(small, left=12_000)
    with pytest.raises(StorageError, match="small/out.* cannot be written: No space left"):
        distill(source, small / "out", method="moec", seed=0)
    assert names(small) == ["out"]


def test_pairs_and_what_was_set_aside_on_a_full_disk(small, monkeypatch):
    monkeypatch.setattr("ctrlrl.data.critique._set_aside", lambda store: [{"reason": "r", "y0": BIG}])
    monkeypatch.setattr(Layout, "messages", lambda layout: {})
    with ShardStore(small / "critiques").open_or_create({"x": 1}, shards=1):
        pass
    fill(small, left=16_384)
    with pytest.raises(StorageError, match="aside.jsonl cannot be written: No space left"):
        CritiqueLayout(small).write_results()


def test_a_read_only_disk_is_told(tmp_path):
    folder = tmp_path / "fixed"
    mounted(folder, "size=1m")
    try:
        Run.open(str(folder / "run"), Recipe(), resume=False).begin()
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        said = "cannot be written: Read-only file system: have it mounted for writing, or choose another directory"
        for write in (
            lambda: Run.open(str(folder / "run"), Recipe(), resume=True),
            lambda: Run.open(str(folder / "new"), Recipe(), resume=False),
            lambda: ShardStore(folder / "s").open_or_create({}, shards=1),
            lambda: write_json(folder / "x.json", {}),
            lambda: write_directory(folder / "model", lambda folder: None),
        ):
            with pytest.raises(StorageError, match=said):
                write()
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("what", ["record", "table", "torch", "safetensors", "text"])
def test_a_file_that_is_too_large_is_told(tmp_path, what):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot be written: File too large: raise the limit on a file's size \(ulimit -f"):
            WRITERS[what](tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(122, "Disk quota exceeded", "/data/x"), "/data/x .* quota exceeded .*: free some of your quota there"),
        (PermissionError(13, "Permission denied", "/data/x"), "/data/x .* Permission denied: have its permissions"),
        (OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"), "No space left on device"),
        (RayTaskError("do", "OSError: [Errno 28] No space left on device: '/data/y'", KeyError("lost")), "/data/y .*: No"),
        (RayTaskError("do", "", OSError(30, "Read-only file system", "/data/z")).as_instanceof_cause(), "/data/z .*: Read-only"),
        (RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/3"), "space"),
        (ValueError('SafetensorError: IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'), "No space left"),
    ],
)
def test_a_refusal_is_known_however_it_is_wrapped_and_ends_with_exit_code_2(error, said, capsys):
    with pytest.raises(SystemExit) as ended, mistakes_told():
        try:
            raise error
        except Exception as inner:
            raise RuntimeError("something else failed") from inner
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("ctrlrl: ") and told.count("\n") == 1
    with pytest.raises(StorageError, match=said):
        raise storage_error(error)


def test_what_is_no_refusal_of_a_disk_stays_what_it_is():
    for error in (ConnectionResetError(104, "Connection reset"), FileNotFoundError(2, "No such file", "x"), TimeoutError(), KeyError("x")):
        assert storage_error(error) is None
    wrapped = DataError("the rows are wrong")
    wrapped.__context__ = OSError(28, "No space left on device")
    assert storage_error(wrapped) is None  # said in its own words already
    with pytest.raises(ZeroDivisionError), mistakes_told():
        raise ZeroDivisionError
    assert issubclass(StorageError, RunError) and issubclass(StorageError, CtrlrlError)
