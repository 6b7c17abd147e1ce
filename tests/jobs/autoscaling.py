"""A private, real autoscaling Ray cluster on this machine: a head in a process of its own, and raylets as nodes that come and go."""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_HEAD = "f" * 51 + "00000"  # the id by which Ray's test provider knows the head
_HEAD_TYPE = "ray.head.default"  # the name that Ray's fake provider gives the head's type
_STORE = 80 << 20
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
# A node whose raylet is killed is declared dead after about two seconds, not fourteen.
_HEALTH = {"initial_delay_ms": 0, "period_ms": 500, "timeout_ms": 2000, "failure_threshold": 3}


def end_with_parent() -> None:
    """For preexec_fn: a head in a session of its own must not outlive tests that were killed."""
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class AutoscalingCluster:
    """As a context: the head runs. types: node type -> {"resources": …, "max_workers": n}."""

    def __init__(self, types: dict[str, dict], head_cpus: int, idle_s: float):
        self.folder = tempfile.mkdtemp(prefix="a", dir=os.environ["RAY_TMPDIR"])
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        for kind in types.values():
            kind["resources"].setdefault("object_store_memory", _STORE)
        settings = Path(self.folder) / "autoscaling.json"
        settings.write_text(json.dumps(self._settings(types, head_cpus, idle_s)))
        environment = {
            "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_TMPDIR": self.folder, "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": _HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD, "RAY_NODE_TYPE_NAME": _HEAD_TYPE,
            "PYTHONPATH": str(Path(__file__).parent), **{f"RAY_health_check_{name}": str(value) for name, value in _HEALTH.items()},
        }  # fmt: skip
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1",
            f"--num-cpus={head_cpus}", "--num-gpus=0", f"--object-store-memory={_STORE}", f"--temp-dir={self.folder}",
            f"--autoscaling-config={settings}", "--include-dashboard=false", "--dashboard-agent-listen-port=0",
            f"--ray-client-server-port={free_port()}", "--disable-usage-stats",
        ]  # fmt: skip
        self._log = open(Path(self.folder) / "head.log", "w+")
        self._head = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )

    def _settings(self, types: dict[str, dict], head_cpus: int, idle_s: float) -> dict:
        empty = dict.fromkeys(
            ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands",
             "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter"), []
        )  # fmt: skip
        provider = {
            "type": "external", "module": "localprovider.LocalProvider", "gcs_address": self.address, "use_node_id_as_ip": True,
            "disable_node_updaters": True, "disable_launch_config_check": True, "launch_multiple": True, "head_node_id": _HEAD,
        }  # fmt: skip
        head = {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0}
        return {
            **empty, "cluster_name": "test", "max_workers": 8, "provider": provider, "head_node_type": _HEAD_TYPE, "upscaling_speed": 1000,
            "available_node_types": {
                _HEAD_TYPE: head, **{name: {"node_config": {}, "min_workers": 0, **kind} for name, kind in types.items()},
            },
            "idle_timeout_minutes": idle_s / 60, "auth": {}, "file_mounts": {}, "file_mounts_sync_continuously": False, "docker": {},
        }  # fmt: skip

    def __enter__(self) -> "AutoscalingCluster":
        end = time.monotonic() + 240
        while "Ray runtime started" not in self.log():
            assert self._head.poll() is None and time.monotonic() < end, self.log()
            time.sleep(0.1)
        return self

    def __exit__(self, *_) -> None:
        if self._head.poll() is None:
            self._head.terminate()
        try:
            self._head.wait(15)
        except subprocess.TimeoutExpired:
            self._head.kill()
        for pid in self._processes():  # nodes outlive their head
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def log(self) -> str:
        """What the head said."""
        return Path(self._log.name).read_text()

    def nodes(self) -> dict[str, int]:
        """Node id -> process id of the raylet, of the nodes beside the head."""
        found = {}
        for pid in self._processes():
            try:
                command, environment = (Path(f"/proc/{pid}/{name}").read_bytes().split(b"\0") for name in ("cmdline", "environ"))
            except OSError:
                continue
            known = dict(entry.split(b"=", 1) for entry in environment if b"=" in entry)
            if command[0].endswith(b"/raylet") and (number := known.get(b"RAY_OVERRIDE_NODE_ID_FOR_TESTING", b"").decode()) != _HEAD:
                found[number] = pid
        return found

    def _processes(self) -> list[int]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if self.folder.encode() in (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return [pid for pid in found if pid != os.getpid()]
