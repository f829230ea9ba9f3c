"""Committed windows → the usable samples by number, what is known of them, and those that are not used and why."""

import dataclasses
import json
import logging
import threading
import time
from bisect import bisect_right
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from valley_ray.data.shards import Sample, StoreInfo, Window, WindowStore
from valley_ray.errors import DataError, PromptTooLongError, TrainingError
from valley_ray.train.order import KnownSamples

logger = logging.getLogger(__name__)

POLL_S = 0.1

LEFT_OUT_FILE = "left_out.jsonl"
"""Beside a run's metrics: samples that were not trained on, and why."""

ClipKey = tuple[str, int]
"""Shard and row of a clip."""


class RunEndedError(TrainingError):
    """An end that every rank comes to by itself, and would come to again: the run stops without another attempt."""


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A sample that the training does not use: the pipeline could not make it, or it is too long for a packed row."""

    window: int
    row: int
    sample_id: str
    error_class: str
    error: str


class SampleIndex:
    """The usable samples of a store by their number in the plan; grows while the pipeline commits windows.

    A sample is never cut: one of more than `pack_tokens` tokens has no number. It is a row of `left_out`, like those
    that failed in the pipeline, from the moment its window is read, which is before any step with that window.
    """

    def __init__(self, directory: Path, *, pack_tokens: int | None = None) -> None:
        self._store = WindowStore(directory)
        self._pack_tokens = pack_tokens
        self._windows: list[Window] = []
        self._rows: list[NDArray[np.int64]] = []
        self._starts: list[int] = []
        self._source_ids: dict[str, int] = {}
        self._sources: list[NDArray[np.int64]] = []
        self._known: KnownSamples | None = None
        self._num_known = 0
        self._complete = False
        self.left_out: list[LeftOut] = []
        """Of the windows read so far, in order."""

    @property
    def known(self) -> KnownSamples:
        """What the windows read so far say; the same object until there is another."""
        if self._known is None:
            windows = list(zip(self._windows, self._rows, strict=True))
            empty = np.zeros(0, np.int64)
            self._known = KnownSamples(
                num_tokens=np.concatenate([empty, *(window.num_tokens[rows] for window, rows in windows)]),
                num_label_tokens=np.concatenate([empty, *(window.num_label_tokens[rows] for window, rows in windows)]),
                sources=np.concatenate([empty, *self._sources]),
                source_names=tuple(self._source_ids),
                window_ends=np.cumsum([len(rows) for rows in self._rows], dtype=np.int64),
                complete=self._complete,
            )
        return self._known

    def grow(self, *, timeout_s: float, stop: threading.Event) -> None:
        """Read the next window, waiting until it is committed; there must be one to come.

        All ranks come to the same end: a failed pipeline counts only after every window it committed has been seen.

        Raises:
            RunEndedError: the pipeline failed, or the store holds no usable sample.
            DataError: no window came for `timeout_s`, or the store is damaged.
        """
        assert not self._complete, "all windows have been read"
        try:
            manifest = self._store.wait(len(self._windows), timeout_s=timeout_s, poll_s=POLL_S, stop=stop)
        except DataError as error:
            if self._store.failure() is None:
                raise
            raise RunEndedError(str(error)) from error
        window = self._store.read(manifest)
        rows = self._usable(window)
        self._starts.append(self._num_known)
        self._windows.append(window)
        self._rows.append(rows)
        self._sources.append(
            np.array(
                [self._source_ids.setdefault(name, len(self._source_ids)) for name in window.sources[rows]], np.int64
            )
        )
        self._num_known += len(rows)
        self._complete = manifest.is_last
        self._known = None
        if self._complete and not self._num_known:
            raise RunEndedError(f"no sample of {self._store.directory} is usable: {self._reasons()}")

    def info(self, *, timeout_s: float) -> StoreInfo:
        """What the store will hold: known before its first window. Raises as `grow` does."""
        deadline = time.monotonic() + timeout_s
        while (info := self._store.info()) is None:
            failure = self._store.failure()
            if failure is not None:
                raise RunEndedError(f"the data pipeline failed before its first window: {failure}")
            if time.monotonic() > deadline:
                raise DataError(f"{self._store.directory}: no data pipeline began within {timeout_s:g} s")
            time.sleep(POLL_S)
        return info

    @property
    def shards_dir(self) -> Path:
        """Folder of the shards that the samples point into; known once `info` is."""
        return self._store.shards_dir

    def sample(self, number: int) -> tuple[Sample, list[ClipKey]]:
        """A sample and the keys of its clips."""
        place = bisect_right(self._starts, number) - 1
        window, row = self._windows[place], int(self._rows[place][number - self._starts[place]])
        clips = window.table["clips"][row].as_py()
        return window[row], [(clip["shard"], clip["row"]) for clip in clips]

    def write_left_out(self, path: Path) -> None:
        """Write `left_out` as JSON lines to `path`, replacing what is there; nothing where all samples are used."""
        if not self.left_out:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(dataclasses.asdict(one)) for one in self.left_out]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _usable(self, window: Window) -> NDArray[np.int64]:
        """Rows of the samples that get numbers; the others go to `left_out`."""
        is_usable = window.is_ok.copy()
        if self._pack_tokens is not None:
            is_usable &= window.num_tokens <= self._pack_tokens
        before = len(self.left_out)
        self.left_out += [self._reason(window, int(row)) for row in np.flatnonzero(~is_usable)]
        num_long = sum(one.error_class == PromptTooLongError.code for one in self.left_out[before:])
        if num_long:
            logger.warning(
                "window %d: %d samples are too long and left out (pack_tokens=%s)",
                window.manifest.index,
                num_long,
                self._pack_tokens,
            )
        return np.flatnonzero(is_usable)

    def _reason(self, window: Window, row: int) -> LeftOut:
        values = window.table.slice(row, 1).select(["sample_id", "error_class", "error"]).to_pylist()[0]
        if window.is_ok[row]:
            values |= {
                "error_class": PromptTooLongError.code,
                "error": f"{window.num_tokens[row]} tokens do not fit pack_tokens={self._pack_tokens}; raise it",
            }
        return LeftOut(window=window.manifest.index, row=row, **values)

    def _reasons(self) -> str:
        counts: dict[str, int] = {}
        for one in self.left_out:
            counts[one.error_class] = counts.get(one.error_class, 0) + 1
        return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
