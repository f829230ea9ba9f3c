"""How decoding goes, for those who watch: numbers on Ray's dashboard, and a progress line in a terminal or a log."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, TextIO

from ray.util import metrics

from valley_ray.data.schema import OK

LINE_EVERY_S = 5.0
"""Seconds between two lines where the output is no terminal."""


class DecodeMetrics:
    """valley_data_clips_total by status and error class, valley_data_clips_left, valley_data_clips_per_second."""

    def __init__(self, num_clips: int) -> None:
        self._total = metrics.Counter(
            "valley_data_clips_total", "Clips decoded or failed.", tag_keys=("status", "error_class")
        )
        self._left = metrics.Gauge("valley_data_clips_left", "Clips that are still to be decoded.")
        self._rate = metrics.Gauge("valley_data_clips_per_second", "Clips decoded or failed, per second of the run.")
        self._num_left = num_clips
        self._num_done = 0
        self._start = time.monotonic()
        self._left.set(num_clips)

    def count(self, outcomes: Sequence[dict[str, Any]]) -> None:
        """Take in the outcomes of a block."""
        for (status, error_class), number in Counter((o["status"], o["error_class"]) for o in outcomes).items():
            self._total.inc(number, {"status": status, "error_class": error_class})
        self._num_left -= len(outcomes)
        self._num_done += len(outcomes)
        self._left.set(self._num_left)
        self._rate.set(self._num_done / max(1e-3, time.monotonic() - self._start))


class DecodeProgress:
    """Videos per second, failures and the time that is left: a bar in a terminal, else a line every few seconds."""

    def __init__(self, num_clips: int, num_known: int, *, what: str = "videos", stream: TextIO | None = None) -> None:
        self._what = what
        self._stream = stream if stream is not None else sys.stderr
        self._num_clips, self._num_known = num_clips, num_known
        self._num_done = num_known
        self._failed: Counter[str] = Counter()
        self._start = self._shown = time.monotonic()
        self._bar = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=num_clips, initial=num_known, unit=f" {what}", file=self._stream, dynamic_ncols=True)

    def count(self, outcomes: Sequence[dict[str, Any]]) -> None:
        """Take in the outcomes of a block."""
        self._num_done += len(outcomes)
        self._failed.update(outcome["error_class"] for outcome in outcomes if outcome["status"] != OK)
        if self._bar is not None:
            self._bar.set_postfix_str(self._failures(), refresh=False)
            self._bar.update(len(outcomes))
        elif time.monotonic() - self._shown >= LINE_EVERY_S:
            self._shown = time.monotonic()
            print(self.line(), file=self._stream, flush=True)

    def close(self) -> None:
        """Show where it ended."""
        if self._bar is not None:
            self._bar.close()
        else:
            print(self.line(), file=self._stream, flush=True)

    def line(self) -> str:
        """One line: how many, how fast, what failed, how long yet at the rate so far."""
        seconds = max(1e-3, time.monotonic() - self._start)
        rate = (self._num_done - self._num_known) / seconds
        left = self._num_clips - self._num_done
        eta = f"  ETA {_clock(left / rate)}" if left and rate else ""
        return (
            f"{self._num_done:,}/{self._num_clips:,} {self._what}  {rate:.1f} {self._what}/s  {self._failures()}{eta}"
        )

    def _failures(self) -> str:
        most = ", ".join(f"{name} {count}" for name, count in self._failed.most_common(3))
        more = ", ..." if len(self._failed) > 3 else ""
        return f"{self._failed.total():,} failed" + (f" ({most}{more})" if most else "")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
