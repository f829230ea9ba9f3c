"""Committed windows → the micro-batches of one rank, made ready on a thread while earlier steps are trained.

Knows the plan, the store and the rank; knows no engine and no Ray.
"""

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from valley_ray.data.feature_store import FeatureStore
from valley_ray.errors import TrainingError, ValleyError
from valley_ray.train.packing import MicroBatch, collate, collate_packed, make_clip
from valley_ray.train.plan import PlanDigest, StagePlan, StepPlan
from valley_ray.train.sample_index import ClipKey
from valley_ray.train.sample_index import RunEndedError as RunEndedError
from valley_ray.train.sample_index import SampleIndex as SampleIndex


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
    plan_hash: str
    """Of all global batches up to this one; a run that goes on behind it must come to the same."""


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
    plan_hash: str | None = None
    """Where the stage goes on from a checkpoint: `StepBatches.plan_hash` of the last step before it."""


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
            for step, plan_hash in self._steps(first_step):
                self._queue.put(self._batches(step, plan_hash))
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

    def _steps(self, first_step: int) -> Iterator[tuple[StepPlan, str]]:
        """The steps from `first_step` on, each with the hash of the plan up to it."""
        plan, index, settings = self._plan, self._index, self._settings
        digest = PlanDigest(plan, index.info(timeout_s=settings.timeout_s).fingerprint)
        stream = plan.stream(index.known)
        number = 0
        while (num_steps := plan.steps_in(stream)) is None or number < num_steps:
            batch = plan.batch(number, stream)
            if batch is None:
                index.grow(timeout_s=settings.timeout_s, stop=self._stop)
                stream = plan.stream(index.known)
                continue
            plan_hash = digest.add(batch, stream.known)
            if number == first_step - 1:
                self._check(plan_hash)
            if number >= first_step:
                yield StepPlan(number, plan.cut(batch, stream.known)), plan_hash
            number += 1
        if not num_steps:
            raise RunEndedError(f"data.weights draw no sample in {plan.epochs} epochs; raise one of the two")

    def _check(self, plan_hash: str) -> None:
        wanted = self._settings.plan_hash
        if wanted is not None and wanted != plan_hash:
            raise RunEndedError(
                f"the batches up to the checkpoint are others than those it was made of (plan {plan_hash}, checkpoint "
                f"{wanted}); give the data and settings of that run, or another run_name"
            )

    def _batches(self, step: StepPlan, plan_hash: str) -> StepBatches:
        settings, known = self._settings, self._index.known
        samples = list(step.samples)
        return StepBatches(
            index=step.index,
            micro_batches=tuple(self._micro_batch(slot) for slot in step.of_rank(settings.rank, settings.world)),
            num_samples=len(samples),
            num_tokens=int(known.num_tokens[samples].sum()),
            num_label_tokens=int(known.num_label_tokens[samples].sum()),
            plan_hash=plan_hash,
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
        if self._plan.pack_tokens is not None and samples:
            return collate_packed(samples, clips)
        return collate(samples, clips, pad_token_id=self._settings.pad_token_id)

    def _features(self, key: ClipKey) -> torch.Tensor | None:
        """Features of a clip from memory or from beside the shards, read here rather than in the loop's time."""
        features, stored = self._cache.get(key), self._settings.stored
        if features is None and stored is not None and (array := stored.features(*key)) is not None:
            features = torch.from_numpy(array.copy())
        return features
