"""Which download may begin when: so many at once and so many requests per second for each host, pauses, second tries.

The one driver decides for all nodes, so limits hold over the cluster without a service to ask, and a worker that dies
takes no permit with it. Pure: time comes in as an argument (seconds of any clock that only goes forward).
"""

import heapq
import itertools
import math
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from valley_ray.data.download.config import HostLimits

JobT = TypeVar("JobT")


@dataclass
class _Host(Generic[JobT]):
    waiting: list[tuple[float, int, JobT]] = field(default_factory=list)
    """Heap of (not before, order, job)."""
    num_running: int = 0
    free_at: float = 0.0
    """When the next request may be sent."""
    queued_at: float = math.inf
    """Its valid place in the schedule's heap; entries of another time are left over."""


class Schedule(Generic[JobT]):
    """Jobs in the order given, as far as their hosts allow."""

    def __init__(self, limits: HostLimits) -> None:
        self._limits = limits
        self._hosts: dict[str, _Host[JobT]] = {}
        self._queue: list[tuple[float, int, str]] = []
        self._order = itertools.count()
        self._num_waiting = 0

    @property
    def num_waiting(self) -> int:
        """Jobs that have been added and not taken."""
        return self._num_waiting

    def add(self, host: str, job: JobT, *, not_before: float = 0.0) -> None:
        """Put a job in the queue of its host; later ones with an earlier time go before it."""
        entry = self._hosts.setdefault(host, _Host())
        heapq.heappush(entry.waiting, (not_before, next(self._order), job))
        self._num_waiting += 1
        self._enqueue(host, entry)

    def take(self, now: float) -> JobT | None:
        """The next job that may begin, which counts as begun; None: nothing may begin at `now`."""
        while self._queue and self._queue[0][0] <= now:
            queued_at, _, host = heapq.heappop(self._queue)
            entry = self._hosts[host]
            if queued_at != entry.queued_at:
                continue
            entry.queued_at = math.inf
            if entry.num_running >= self._limits.concurrency or self._ready_at(entry) > now:
                self._enqueue(host, entry)
                continue
            _, _, job = heapq.heappop(entry.waiting)
            self._num_waiting -= 1
            entry.num_running += 1
            entry.free_at = max(entry.free_at, now) + 1 / self._limits.requests_per_s
            self._enqueue(host, entry)
            return job
        return None

    def finish(self, host: str, *, num_requests: int = 1) -> None:
        """A job of this host has ended, after `num_requests` requests; those after the first are counted now."""
        entry = self._hosts[host]
        entry.num_running -= 1
        entry.free_at += max(0, num_requests - 1) / self._limits.requests_per_s
        self._enqueue(host, entry)

    def pause(self, host: str, until: float) -> None:
        """Begin nothing for this host before `until`."""
        self._hosts[host].free_at = max(self._hosts[host].free_at, until)

    def next_at(self) -> float | None:
        """When something may begin at the earliest, as far as is known; None: not before a running job ends."""
        return self._queue[0][0] if self._queue else None

    def _ready_at(self, entry: _Host[JobT]) -> float:
        return max(entry.free_at, entry.waiting[0][0])

    def _enqueue(self, host: str, entry: _Host[JobT]) -> None:
        if entry.waiting and entry.num_running < self._limits.concurrency:
            ready_at = self._ready_at(entry)
            if ready_at < entry.queued_at:
                entry.queued_at = ready_at
                heapq.heappush(self._queue, (ready_at, next(self._order), host))
