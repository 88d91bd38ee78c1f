"""How fast one key may ask: a token bucket for each, in this process."""

import threading
import time
from collections import OrderedDict
from math import ceil

from api.problems import Problem

__all__ = ["RateLimit"]

MOST_KEYS = 10_000
"""Buckets kept; the one unused for longest goes first."""


class RateLimit:
    """``per_minute`` requests on average, a minute's worth at once. Several API processes each count for themselves."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def spend(self, key_id: str, now: float | None = None) -> None:
        """One request of ``key_id``; raises 429 when its bucket is empty. ``now``: monotonic seconds."""
        now = time.monotonic() if now is None else now
        pace = self.per_minute / 60
        with self._lock:
            tokens, since = self._buckets.pop(key_id, (float(self.per_minute), now))
            tokens = min(float(self.per_minute), tokens + (now - since) * pace)
            allowed = tokens >= 1
            self._buckets[key_id] = (tokens - 1 if allowed else tokens, now)
            if len(self._buckets) > MOST_KEYS:
                self._buckets.popitem(last=False)
        if not allowed:
            wait = ceil((1 - tokens) / pace)
            raise Problem(
                429,
                "too_many_requests",
                f"This key may ask {self.per_minute} times a minute: try again in {wait} s, or poll with ?wait=30.",
                headers={"Retry-After": str(wait)},
            )
