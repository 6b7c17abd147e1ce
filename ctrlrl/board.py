"""Scalars as TensorBoard's event file, written when they come: its own writers do so from a thread, where a full disk is nobody's error."""

import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from ctrlrl.data.atomic import append_whole


class Board:
    """An event file in `directory`, which TensorBoard shows with those of earlier writers. OSError where the disk refuses."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = (directory / name).open("ab", buffering=0)
        self._event(file_version="brain.Event:2")

    def add(self, step: int, values: dict[str, float]) -> None:
        """The values of one step."""
        self._event(step=step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()]))

    def write(self, record: bytes) -> None:
        """One encoded record, whole or not at all."""
        append_whole(self._file, record)

    def close(self) -> None:
        """Close the file; every record was written when it came."""
        self._file.close()

    def _event(self, **fields) -> None:
        RecordWriter(self).write(Event(wall_time=time.time(), **fields).SerializeToString())
