"""How far a run of downloads is: counts and rates in one line."""

import time
from collections import Counter

from valley_ray.data.schema import OK


class Progress:
    """Counts of a run; `line` shows them."""

    def __init__(self, *, num_files: int, taken_over: int) -> None:
        self.num_files = num_files
        self.taken_over = taken_over
        self.ended: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.found = 0
        self.retries = 0
        self.fetched_bytes = 0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return max(1e-3, time.monotonic() - self._started)

    @property
    def num_ended(self) -> int:
        """Downloads that this run ended."""
        return self.ended.total()

    def line(self, *, num_running: int, num_bytes_received: int) -> str:
        """One line: how many, how fast, what failed, how long yet (at the rate so far)."""
        done, failed = self.taken_over + self.num_ended, self.num_ended - self.ended[OK]
        rate = self.num_ended / self.seconds
        why = ", ".join(f"{name} {count}" for name, count in self.errors.most_common(3))
        megabytes = max(num_bytes_received, self.fetched_bytes) / 1e6
        left_s = (self.num_files - done) / rate if rate else None
        return (
            f"{done:,}/{self.num_files:,} files  {rate:.1f} files/s  {megabytes / self.seconds:.1f} MB/s  "
            f"{failed:,} failed{f' ({why})' if why else ''}  {num_running} under way  ETA {_clock(left_s)}"
        )


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
