"""A machine that is short of memory, as its /proc says."""

import os

import pytest

from actors.memory import shortage_on_machine


@pytest.fixture
def machine(tmp_path):
    """A function: a machine with so many GiB in all and left, a container's limit and use, and three processes."""

    def make(total, left, limit="max", used=0):
        proc, group = tmp_path / "proc", tmp_path / "group"
        group.mkdir(parents=True)
        for pid, title, gib in ((11, "ray::RolloutWorker.generate", 6), (12, "ray::TrainerRank", 1.5), (13, "bash", 9)):
            (proc / str(pid)).mkdir(parents=True)
            (proc / str(pid) / "cmdline").write_bytes(title.encode() + b"\0\0\0")
            (proc / str(pid) / "statm").write_text(f"999 {int(gib * 2**30 / os.sysconf('SC_PAGE_SIZE'))} 3 4\n")
        (proc / "meminfo").write_text(f"MemTotal: {total << 20} kB\nMemAvailable: {int(left * 2**20)} kB\n")
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        return proc, group

    return make


def test_each_workers_memory_is_named_and_what_to_lower(machine):
    assert shortage_on_machine("rollout worker 0", False, *machine(24, 0.5)) == (
        "the machine is short of memory: 0.5 of 24.0 GiB are left; RolloutWorker.generate (pid 11) 6.0 GiB, TrainerRank (pid 12) 1.5 GiB. "
        "Lower rollout.engine.kv_cache_gib, rollout.engine.max_concurrent or rollout.workers, or use more machines"
    )


def test_a_machine_with_memory_left_is_not_blamed_unless_it_is_known(machine):
    enough = machine(24, 8)
    assert shortage_on_machine("policy rank 0", False, *enough) == ""
    assert "Lower policy.train.micro_batch_tokens" in shortage_on_machine("policy rank 0", True, *enough)


def test_a_containers_limit_counts(machine):
    assert "0.2 of 8.0 GiB are left" in shortage_on_machine("reward.helpful worker 1", False, *machine(24, 8, 8 << 30, int(7.8 * 2**30)))
