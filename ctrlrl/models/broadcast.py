"""Weights by broadcast: from the trainer's rank 0 to the rollout workers, bucket by bucket, through a process group of their own.

The group is apart from the one that the trainer's ranks are in: it is made anew whenever other workers are to be in it. Its members meet
at a store that the job keeps, where they also learn that one of them will not come. Each bucket says what is in it, so that nobody needs
to know the whole before it is there: with partitioned weights the trainer has one bucket's worth of them whole at a time. Rank 0 keeps
what it sent, on the host, for those that come later; a receiver has the whole message before its engine gets any of it, so that an
engine's weights are of one version however a broadcast ends.
"""

import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
from torch.distributed import PrefixStore, TCPStore

from ctrlrl.errors import GroupLost, WorkerLost
from ctrlrl.models.weights import Packed, WeightMessage, offsets

BUCKET = 64 << 20  # bytes that are sent at once, if no single tensor has more
_LOOK_S = 0.005
_HEED_S = 1.0  # at most, until a bucket that does not move is given up because the group was called off
_MEET_S = 30.0  # for all that have come to connect to each other
_STOP = "stop"  # at the store: why the group will not be

Values = TypeVar("Values", np.ndarray, torch.Tensor)
Row = tuple[str, tuple[int, ...], str, int]  # name, shape, numpy's name of the dtype, first byte in the bucket


@dataclass(frozen=True)
class Meeting:
    """Where the members of a group meet. session: of the store's, one for each group. size: members, rank 0 (the trainer's) included.

    patience_s: longest wait for one of them, and for one bucket.
    """

    address: str
    port: int
    session: str
    size: int
    patience_s: float
    backend: str = "gloo"


def meeting_store(address: str) -> TCPStore:
    """A store for meetings, kept by this process, at a port that is free here."""
    return TCPStore(address, 0, is_master=True, wait_for_workers=False)


def call_off(store: TCPStore, session: str, reason: str) -> None:
    """Tell those that wait for others in `session` that these will not come."""
    PrefixStore(session, store).set(_STOP, reason)


class Line:
    """One member's end of the group. WorkerLost if another is gone or does not come in time; then it is of no use any more."""

    def __init__(self, meeting: Meeting, rank: int):
        self.meeting = meeting
        self._device = torch.device("cuda" if meeting.backend == "nccl" else "cpu")
        patience = timedelta(seconds=meeting.patience_s)
        with _losses_told(meeting):
            kept = TCPStore(meeting.address, meeting.port, is_master=False, wait_for_workers=False, timeout=patience)
            self._store = PrefixStore(meeting.session, kept)
            _await_all(self._store, meeting, "here", rank)
            within = PrefixStore("group", self._store)
            within.set_timeout(timedelta(seconds=min(_MEET_S, meeting.patience_s)))
            if meeting.backend == "nccl":
                self._group = torch.distributed.ProcessGroupNCCL(within, rank, meeting.size, patience)
            else:
                self._group = torch.distributed.ProcessGroupGloo(within, rank, meeting.size, patience)
            # Nobody sends before all are connected: the end of one that dies is told to the others by their connections.
            _await_all(self._store, meeting, "connected", rank)

    def broadcast(self, array: np.ndarray) -> None:
        """Rank 0's array (uint8) into all others' of the same size."""
        with _losses_told(self.meeting):
            tensor = torch.from_numpy(array)
            there = tensor.to(self._device)
            work = self._group.broadcast(there, 0)
            while self.meeting.backend == "gloo" and not work.is_completed():
                with suppress(RuntimeError):  # it takes longer, or has failed: then it is completed
                    work.wait(timedelta(seconds=_HEED_S))
                if not work.is_completed() and self._store.check([_STOP]):
                    threading.Thread(target=_let_go, args=(self._group, work), daemon=True).start()
                    self._group = None
                    raise WorkerLost(_called_off(self._store, self.meeting))
            work.wait()
            if there is not tensor:
                tensor.copy_(there)


class Sender:
    """Rank 0's part. message: what it sent last, on the host."""

    def __init__(self):
        self.message: WeightMessage | None = None
        self._line: Line | None = None
        self._kept: list[tuple[bytes, np.ndarray]] = []  # of each bucket what it says of itself, and its bytes

    def send(self, weights: Packed, dtype: str, version: int, meeting: Meeting) -> str:
        """Broadcast `weights`; empty, or why not all members got them. They are read to their end all the same: other ranks take part."""
        line, reason = self._joined(meeting)
        used, self._kept, tensors = self._kept, [], []
        for number, rows in enumerate(bucketfuls(weights, BUCKET)):
            before = used[number][1] if number < len(used) else None
            head, content, arrays = _bucket(rows, before, version)
            self._kept.append((head, content))
            tensors += arrays
            reason = reason or self._sent(line, head, content)
        self.message = WeightMessage(version, dtype, *zip(*tensors, strict=True))
        return reason or self._sent(line, b"", None)

    def again(self, meeting: Meeting) -> str:
        """Broadcast what was sent last to a new group; empty, or why not all members got it."""
        line, reason = self._joined(meeting)
        for head, content in (*self._kept, (b"", None)):
            reason = reason or self._sent(line, head, content)
        return reason

    def _joined(self, meeting: Meeting) -> tuple[Line | None, str]:
        if meeting.size == 1:
            self._line = None
        elif self._line is None or self._line.meeting != meeting:
            self._line = None
            try:
                self._line = Line(meeting, 0)
            except WorkerLost as error:
                return None, str(error)
        return self._line, ""

    def _sent(self, line: Line | None, head: bytes, content: np.ndarray | None) -> str:
        if line is None:  # there is nobody else
            return ""
        try:
            line.broadcast(np.array([len(head), 0 if content is None else content.size], np.int64).view(np.uint8))
            if head:
                line.broadcast(np.frombuffer(head, np.uint8).copy())
                line.broadcast(content)
        except WorkerLost as error:
            self._line = None
            return str(error)
        return ""


def again(trainer, meeting: Meeting) -> str:
    """On every rank: rank 0 broadcasts what it sent last to another group."""
    return trainer.sender.again(meeting) if trainer.rank == 0 else ""


def kept(trainer, version: int) -> WeightMessage:
    """On rank 0: what it sent last; GroupLost if that is of another version."""
    message = trainer.sender.message
    if message is None or message.version != version:
        raise GroupLost(f"the weights of version {version} are gone: others were published since")
    return message


class Receiver:
    """A rollout worker's part."""

    def __init__(self):
        self._line: Line | None = None
        self._buffers: list[np.ndarray] = []  # of the last message, to be filled again

    def receive(self, dtype: str, version: int, meeting: Meeting, rank: int) -> WeightMessage:
        """The next message, valid until the one after it; WorkerLost if it does not come whole, or is of another version."""
        if self._line is None or self._line.meeting != meeting:
            self._line = None
            self._line = Line(meeting, rank)
        line, self._line = self._line, None  # of no use after an error
        buffers, self._buffers = self._buffers, []  # nor are these: what was given up may still be written to
        tensors = []
        for number in range(2**31):
            sizes = np.zeros(2, np.int64)
            line.broadcast(sizes.view(np.uint8))
            if not sizes[0]:
                break
            head = np.empty(sizes[0], np.uint8)
            line.broadcast(head)
            content = _buffer(buffers[number] if number < len(buffers) else None, int(sizes[1]))
            buffers[number : number + 1] = [content]
            line.broadcast(content)
            told = json.loads(head.tobytes())
            if told["version"] != version:
                raise WorkerLost(f"weights of version {told['version']} came where version {version} was to come")
            tensors += [(name, tuple(shape), _view(content, kind, shape, first)) for name, shape, kind, first in told["rows"]]
        self._line, self._buffers = line, buffers
        return WeightMessage(version, dtype, *zip(*tensors, strict=True))


def _await_all(store: PrefixStore, meeting: Meeting, where: str, rank: int) -> None:
    """Say that member `rank` is there, and return when all are."""
    store.set(f"{where}/{rank}", "")
    end, expected = time.monotonic() + meeting.patience_s, [f"{where}/{other}" for other in range(meeting.size)]
    while not store.check(expected):
        if store.check([_STOP]):
            raise WorkerLost(_called_off(store, meeting))
        if time.monotonic() > end:
            missing = [name.removeprefix(f"{where}/") for name in expected if not store.check([name])]
            raise WorkerLost(f"members {', '.join(missing)} of the group did not come within {meeting.patience_s:g} s")
        time.sleep(_LOOK_S)


def _let_go(group: torch.distributed.Backend, work: torch.distributed.Work) -> None:
    """End a group with an operation that nobody waits for; by a thread, since gloo ends neither before the operation's own time is over."""
    with suppress(RuntimeError):
        work.wait()


def _called_off(store: PrefixStore, meeting: Meeting) -> str:
    return f"the group of {meeting.size} was called off: {store.get(_STOP).decode()}"


class _losses_told:
    """Whatever torch raises about the other members is one WorkerLost."""

    def __init__(self, meeting: Meeting):
        self._meeting = meeting

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, RuntimeError) and not isinstance(error, WorkerLost):
            reason = (str(error).strip().splitlines() or [kind.__name__])[0].partition(" This is typically")[0]  # advice of gloo's
            raise WorkerLost(f"a member of the group of {self._meeting.size} is gone or late: {reason[:300]}") from error


def bucketfuls(weights: Iterable[tuple[str, tuple[int, ...], Values]], most: int) -> Iterator[list[tuple]]:
    """Rows (name, shape, values) that have up to `most` bytes together, or one that has more."""
    rows, size = [], 0
    for row in weights:
        if rows and size + row[2].nbytes > most:
            yield rows
            rows, size = [], 0
        rows.append(row)
        size += row[2].nbytes
    if rows:
        yield rows


def _bucket(rows: list[tuple[str, tuple[int, ...], np.ndarray]], used: np.ndarray | None, version: int) -> tuple[bytes, np.ndarray, list]:
    """What a bucket says of itself, its bytes (in the buffer `used` before, if they fit), and its tensors as views of these."""
    firsts, size = offsets(row[2] for row in rows)
    told = [(name, shape, array.dtype.str, first) for (name, shape, array), first in zip(rows, firsts, strict=True)]
    content, tensors = _buffer(used, size), []
    for (name, shape, kind, first), (_, _, array) in zip(told, rows, strict=True):
        tensors.append((name, shape, _view(content, kind, shape, first)))
        tensors[-1][2][:] = array
    return json.dumps({"version": version, "rows": told}).encode(), content, tensors


def _buffer(used: np.ndarray | None, size: int) -> np.ndarray:
    """Bytes; those that were used before if they are as many: memory that is there already is filled much faster."""
    return used if used is not None and used.size == size else np.empty(size, np.uint8)


def _view(content: np.ndarray, kind: str, shape: Iterable[int], first: int) -> np.ndarray:
    count = int(np.prod(tuple(shape), dtype=np.int64))
    return content[first : first + count * np.dtype(kind).itemsize].view(kind)
