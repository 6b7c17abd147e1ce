"""How much one key, and all together, may ask at once and in a minute."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ctrlrl.serving.asked import Refused
from ctrlrl.serving.policies import Limits


class Gate:
    """Counts requests under way, and a bucket of requests for each key that fills with the minute. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._running: Counter[str] = Counter()
        self._buckets: dict[str, tuple[float, float]] = {}  # key's name -> requests that it has left, and when

    @property
    def running(self) -> int:
        """Requests under way."""
        return self._running.total()

    def spend(self, key: str, limits: Limits) -> None:
        """Count one request of a key; Refused (429) if its minute is spent."""
        most, now = limits.requests_per_minute, self._clock()
        if not most:
            return
        left, then = self._buckets.get(key, (float(most), now))
        left = min(float(most), left + (now - then) * most / 60)
        self._buckets[key] = (left - 1 if left >= 1 else left, now)
        if left < 1:
            raise Refused(429, f"this key has {most} requests a minute: wait {(1 - left) * 60 / most:.0f} s")

    @contextmanager
    def entered(self, key: str, limits: Limits) -> Iterator[None]:
        """Context of one request under way; Refused if there are as many as there may be: 429 of this key, 503 of all."""
        if limits.concurrent_per_key and self._running[key] >= limits.concurrent_per_key:
            raise Refused(429, f"this key has {limits.concurrent_per_key} requests at a time: wait for one to end")
        if self.running >= limits.max_concurrent:
            raise Refused(503, "the server has as many requests as it takes: try again soon")
        self._running[key] += 1
        try:
            yield
        finally:
            self._running[key] -= 1
            if not self._running[key]:
                del self._running[key]
