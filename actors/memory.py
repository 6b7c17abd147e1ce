"""Whether a machine is short of memory, what each worker on it takes, and what to lower."""

import os
from pathlib import Path

_SHORT = 0.1  # of all memory: below this share left, the system or Ray may have ended a worker for it
_GIB = 2.0**30
_SHOWN = 8
# beginning of a worker's name -> recipe keys on which its memory depends
_LOWER = {
    "rollout": "rollout.engine.kv_cache_gib, rollout.engine.max_concurrent or rollout.workers",
    "reward_model": "reward_model.train.micro_batch_tokens or reward_model.ranks",
    "reward": "batch_tokens or workers of the reward models",
    "judges": "batch_tokens or workers of the judges",
    "evaluation": "batch_tokens or workers of evaluation.judges",
    "reference": "reference.batch_tokens or reference.workers",
    "policy": "policy.train.micro_batch_tokens, or set policy.train.gradient_checkpointing",
    "value": "value.train.micro_batch_tokens, or set value.train.gradient_checkpointing",
}


def shortage_on_machine(worker: str, sure: bool, proc: Path = Path("/proc"), group: Path = Path("/sys/fs/cgroup")) -> str:
    """Of the machine where this is called: what is left, what each of Ray's workers takes, what to lower for one of the name `worker`;
    empty if it is not short of memory. sure: it is known that a worker was ended for it."""
    left, total = _left(proc, group)
    if left >= _SHORT * total and not sure:
        return ""
    taken = sorted(_workers(proc), reverse=True)[:_SHOWN]
    listed = ", ".join(f"{name} (pid {pid}) {size / _GIB:.1f} GiB" for size, name, pid in taken) or "no worker is left"
    lower = next((keys for name, keys in _LOWER.items() if worker.startswith(name)), "the sizes of the largest of them")
    said = f"the machine is short of memory: {left / _GIB:.1f} of {total / _GIB:.1f} GiB are left; {listed}"
    return f"{said}. Lower {lower}, or use more machines"


def _left(proc: Path, group: Path) -> tuple[float, float]:
    """Bytes that are left, and of all: of the container where it has a limit, else of the machine."""
    lines = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if ":" in line)
    total, left = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
    except OSError:
        return left, total
    return (left, total) if limit == "max" else (min(left, max(0, int(limit) - used)), min(total, int(limit)))


def _workers(proc: Path) -> list[tuple[int, str, int]]:
    """Resident bytes, title and process id of each of Ray's workers."""
    found = []
    for folder in proc.glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")[0]
            pages = int((folder / "statm").read_text().split()[1])
        except OSError:
            continue
        if title.startswith("ray::"):
            found.append((pages * os.sysconf("SC_PAGE_SIZE"), title.removeprefix("ray::").strip(), int(folder.name)))
    return found
