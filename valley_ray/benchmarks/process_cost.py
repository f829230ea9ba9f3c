"""CPU time and memory of a process and all that it has started, by what they do, from procfs. Knows Ray by name only.

A process may end between two looks; what it had used at the last look before still counts.
"""

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

Kind = Literal["driver", "worker", "decoder", "pool", "ray"]
"""worker: of Ray, runs our tasks. decoder: a decoding child. pool: of multiprocessing. ray: Ray's own servers. driver:
the root, and what is none of these."""

LOOK_EVERY_S = 0.5
_PROC = Path("/proc")
_PARENT, _FIRST_TIME, _LAST_TIME, _RSS = 1, 11, 15, 21
"""Places in /proc/PID/stat behind the name: parent, user to children's system time in ticks, pages in memory."""
_NAMES: tuple[tuple[str, Kind], ...] = (
    ("valley_ray.media.sandbox_child", "decoder"),
    ("multiprocessing", "pool"),
    ("/raylet/raylet ", "ray"),
    ("/gcs_server ", "ray"),
    ("/ray/dashboard/", "ray"),
    ("/ray/autoscaler/", "ray"),
    ("ray::DashboardAgent", "ray"),
    ("ray::RuntimeEnvAgent", "ray"),
    ("ray::", "worker"),
    ("/ray/_private/workers/", "worker"),
    ("/ray/_private/", "ray"),
)
"""Part of the command line -> what it is; the first that fits."""


@dataclass(frozen=True)
class ProcessCost:
    """What one process has used until now."""

    pid: int
    kind: Kind
    cpu_s: float
    """User and system time, that of the children it has waited for included."""
    rss_bytes: int


class TreeWatch:
    """Looks at a tree of processes every LOOK_EVERY_S while it is open; a context manager. Linux only."""

    def __init__(self, root: int | None = None) -> None:
        self._root = root if root is not None else os.getpid()
        self._seen: dict[int, ProcessCost] = {}
        self._own_s = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tree-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def cpu_s(self) -> dict[Kind, float]:
        """CPU seconds until now by kind, of the processes that are there and of those that were.

        The time of a child that was waited for counts twice, its own and its parent's: never too little. What looking
        costs is taken off where it is the root itself that looks.
        """
        with self._lock:
            start_s = time.thread_time()
            self._seen.update((cost.pid, cost) for cost in process_tree(self._root))
            totals: dict[Kind, float] = dict.fromkeys(("driver", "worker", "decoder", "pool", "ray"), 0.0)
            for cost in self._seen.values():
                totals[cost.kind] += cost.cpu_s
            if self._root == os.getpid():
                totals["driver"] -= self._own_s
            self._own_s += time.thread_time() - start_s
        return totals

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            self.cpu_s()


def process_tree(root: int) -> Iterator[ProcessCost]:
    """`root` and all its descendants that are alive, the root first."""
    stats = {
        int(entry.name): fields for entry in _PROC.iterdir() if entry.name.isdecimal() and (fields := _stat(entry))
    }
    children: dict[int, list[int]] = {}
    for pid, fields in stats.items():
        children.setdefault(int(fields[_PARENT]), []).append(pid)
    waiting = [root]
    while waiting:
        pid = waiting.pop(0)
        waiting += children.get(pid, [])
        if pid in stats:
            ticks = sum(int(field) for field in stats[pid][_FIRST_TIME:_LAST_TIME])
            rss_bytes = int(stats[pid][_RSS]) * os.sysconf("SC_PAGE_SIZE")
            yield ProcessCost(pid, _kind(pid, root), ticks / os.sysconf("SC_CLK_TCK"), rss_bytes)


def _stat(process: Path) -> list[str]:
    """The fields behind the name, which may itself hold spaces and brackets; none where the process has gone."""
    try:
        return (process / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _kind(pid: int, root: int) -> Kind:
    if pid == root:
        return "driver"
    try:
        command = (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "driver"
    return next((kind for part, kind in _NAMES if part in command), "driver")
