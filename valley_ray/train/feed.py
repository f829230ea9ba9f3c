"""Committed windows → the micro-batches of one rank, made ready on a thread while earlier steps are trained.

Knows the plan, the store and the rank; knows no engine and no Ray.
"""

import queue
import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from valley_ray.data.feature_store import FeatureStore
from valley_ray.data.shards import Sample, StoreInfo, Window, WindowStore
from valley_ray.errors import DataError, TrainingError, ValleyError
from valley_ray.train.packing import MicroBatch, collate, make_clip
from valley_ray.train.plan import StagePlan, StepPlan

POLL_S = 0.1

ClipKey = tuple[str, int]
"""Shard and row of a clip."""


@dataclass(frozen=True)
class StepBatches:
    """What one rank needs for one step."""

    index: int
    micro_batches: tuple[MicroBatch, ...]
    num_samples: int
    """Samples of the global batch."""
    num_tokens: int
    """Tokens of the global batch, visual ones included, without padding."""
    num_label_tokens: int
    """Label tokens of the global batch, by which the loss is divided on every rank."""


class RunEndedError(TrainingError):
    """An end that every rank comes to by itself, and would come to again: the run stops without another attempt."""


class SampleIndex:
    """The ok samples of a store by their number in the plan; grows while the pipeline commits windows."""

    def __init__(self, directory: Path) -> None:
        self._store = WindowStore(directory)
        self._windows: list[Window] = []
        self._rows: list[NDArray[np.int64]] = []
        self._starts: list[int] = []
        self.num_known = 0
        """Ok samples committed so far."""
        self.complete = False
        """Whether these are all."""

    def wait_for(self, num_samples: int, *, timeout_s: float, stop: threading.Event) -> None:
        """Return once `num_samples` ok samples are known, or all windows are.

        All ranks come to the same end: a failed pipeline counts only after every window it committed has been seen.

        Raises:
            RunEndedError: the pipeline failed, or the store holds no ok sample.
            DataError: no window came for `timeout_s`, or the store is damaged.
        """
        while self.num_known < num_samples and not self.complete:
            try:
                manifest = self._store.wait(len(self._windows), timeout_s=timeout_s, poll_s=POLL_S, stop=stop)
            except DataError as error:
                if self._store.failure() is None:
                    raise
                raise RunEndedError(str(error)) from error
            window = self._store.read(manifest)
            self._starts.append(self.num_known)
            self._windows.append(window)
            self._rows.append(np.flatnonzero(window.is_ok))
            self.num_known += manifest.num_ok
            self.complete = manifest.is_last
        if self.complete and not self.num_known:
            raise RunEndedError(f"no sample of {self._store.directory} is ok; see error_class in its windows")

    def info(self, *, timeout_s: float) -> StoreInfo:
        """What the store will hold: known before its first window. Raises as `wait_for` does."""
        deadline = time.monotonic() + timeout_s
        while (info := self._store.info()) is None:
            failure = self._store.failure()
            if failure is not None:
                raise RunEndedError(f"the data pipeline failed before its first window: {failure}")
            if time.monotonic() > deadline:
                raise DataError(f"{self._store.directory}: no data pipeline began within {timeout_s:g} s")
            time.sleep(POLL_S)
        return info

    def num_tokens(self, numbers: tuple[int, ...]) -> tuple[int, int]:
        """Tokens of these samples together, and how many of them are labels."""
        places = [self._place(number) for number in numbers]
        tokens = sum(int(self._windows[window].num_tokens[row]) for window, row in places)
        return tokens, sum(int(self._windows[window].num_label_tokens[row]) for window, row in places)

    @property
    def shards_dir(self) -> Path:
        """Folder of the shards that the samples point into; known once `info` is."""
        return self._store.shards_dir

    def sample(self, number: int) -> tuple[Sample, list[ClipKey]]:
        """A sample and the keys of its clips."""
        window, row = self._place(number)
        clips = self._windows[window].table["clips"][row].as_py()
        return self._windows[window][row], [(clip["shard"], clip["row"]) for clip in clips]

    def _place(self, number: int) -> tuple[int, int]:
        window = bisect_right(self._starts, number) - 1
        return window, int(self._rows[window][number - self._starts[window]])


class FeatureCache:
    """Tower features of the clips used last, up to `limit_bytes`. Written by the loop, read by the feeder's thread."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._size_bytes = 0
        self._entries: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> torch.Tensor | None:
        """Features of one clip, or None."""
        with self._lock:
            features = self._entries.get(key)
            if features is not None:
                self._entries.move_to_end(key)
            return features

    def put(self, key: Hashable, features: torch.Tensor) -> None:
        """Keep `features` (a copy of its own memory), dropping the least recently used ones."""
        size = features.numel() * features.element_size()
        if size > self._limit_bytes:
            return
        with self._lock:
            if key in self._entries:
                return
            self._entries[key] = features.clone()
            self._size_bytes += size
            while self._size_bytes > self._limit_bytes:
                _, dropped = self._entries.popitem(last=False)
                self._size_bytes -= dropped.numel() * dropped.element_size()


@dataclass(frozen=True)
class FeedSettings:
    """How samples become micro-batches of one rank."""

    rank: int
    world: int
    pad_token_id: int
    pixel_values: Callable[[NDArray[np.uint8]], torch.Tensor]
    """uint8 [T, S, S, 3] → float32 [T, 3, S, S]"""
    prefetch_steps: int
    timeout_s: float
    stored: FeatureStore | None = None
    """Features that lie beside the shards."""


class Feeder:
    """Iterates over the steps of a stage, from `first_step` to its end, ahead of the caller. A context manager."""

    def __init__(
        self, plan: StagePlan, index: SampleIndex, cache: FeatureCache, settings: FeedSettings, *, first_step: int = 0
    ) -> None:
        self._plan = plan
        self._index = index
        self._cache = cache
        self._settings = settings
        self._queue: queue.Queue[StepBatches | ValleyError | None] = queue.Queue(settings.prefetch_steps)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(first_step,), name="feeder", daemon=True)
        self.wait_s = 0.0
        """Seconds that the caller has waited for data so far."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        while self._thread.is_alive():
            # Makes room for a put that the thread may be blocked in.
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.05)

    def __iter__(self) -> Iterator[StepBatches]:
        while True:
            start = time.perf_counter()
            item = self._queue.get()
            self.wait_s += time.perf_counter() - start
            if item is None:
                return
            if isinstance(item, ValleyError):
                raise item
            yield item

    def _run(self, first_step: int) -> None:
        try:
            for step in self._steps(first_step):
                self._queue.put(self._batches(step))
                if self._stop.is_set():
                    return
        except ValleyError as error:
            self._queue.put(error)
        except BaseException as error:
            # A bug of ours must not leave the loop waiting for ever; it is shown with its trace by the thread's hook.
            self._queue.put(TrainingError(f"the feeder died: {type(error).__name__}: {error}"))
            raise
        else:
            self._queue.put(None)

    def _steps(self, first_step: int) -> Iterator[StepPlan]:
        plan, index = self._plan, self._index
        number = first_step
        while plan.max_steps is None or number < plan.max_steps:
            needed = plan.samples_needed(number)
            index.wait_for(needed, timeout_s=self._settings.timeout_s, stop=self._stop)
            if index.complete and number >= plan.num_steps(index.num_known):
                return
            step = plan.step(number, num_known=index.num_known, complete=index.complete)
            assert step is not None, f"step {number} is undecided although {index.num_known} samples are known"
            yield step
            number += 1

    def _batches(self, step: StepPlan) -> StepBatches:
        settings = self._settings
        count = self._plan.num_micro_batches(settings.world)
        slots = step.of_rank(settings.rank, settings.world, count)
        samples = step.samples
        num_tokens, num_label_tokens = self._index.num_tokens(samples)
        return StepBatches(
            index=step.index,
            micro_batches=tuple(self._micro_batch(slot) for slot in slots),
            num_samples=len(samples),
            num_tokens=num_tokens,
            num_label_tokens=num_label_tokens,
        )

    def _micro_batch(self, numbers: tuple[int, ...]) -> MicroBatch:
        samples, clips = [], []
        for number in numbers:
            sample, keys = self._index.sample(number)
            samples.append(sample)
            for key, frames in zip(keys, sample.frames, strict=True):
                clips.append(
                    make_clip(key, frames, pixel_values=self._settings.pixel_values, features=self._features(key))
                )
        return collate(samples, clips, pad_token_id=self._settings.pad_token_id)

    def _features(self, key: ClipKey) -> torch.Tensor | None:
        """Features of a clip from memory or from beside the shards, read here rather than in the loop's time."""
        features, stored = self._cache.get(key), self._settings.stored
        if features is None and stored is not None and (array := stored.features(*key)) is not None:
            features = torch.from_numpy(array.copy())
        return features
