"""One training process: an engine that is kept through all rounds, fed from a store or decoding by itself.

The step is the platform's own (`Stepper`), whoever feeds it. Knows no pipeline; becomes an actor in feeding.py.
"""

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import torch
import torch.distributed

from valley_ray.benchmarks.decode_cost import reference_chain
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.processor import ValleyProcessor
from valley_ray.train.config import TrainConfig
from valley_ray.train.feed import FeatureCache, Feeder, FeedSettings, StepBatches
from valley_ray.train.packing import Clip, MicroBatch, collate
from valley_ray.train.plan import StagePlan, StepPlan
from valley_ray.train.sample_index import SampleIndex
from valley_ray.train.stages import prepare_stage
from valley_ray.train.step import Stepper
from valley_ray.train.trainable import trainable_module
from valley_ray.train.zero import build_engine

TIMEOUT_S = 120.0


@dataclass(frozen=True)
class RunCost:
    """Steps over some samples in one mode."""

    num_samples: int
    num_tokens: int
    seconds: float
    """Wall time of the loop, its waits included."""
    cpu_s: float
    """Of the training process: its loop, its feeder and its decoding."""
    wait_s: float
    """Wall time that the loop waited for data, or decoded itself."""
    ended_at: float
    """`time.time` after the last step."""

    @property
    def tokens_per_s(self) -> float:
        """Text and visual tokens per second of wall time."""
        return self.num_tokens / self.seconds


class Trainee:
    """Trains a model folder on batches of one store after another."""

    def __init__(self, config: TrainConfig) -> None:
        torch.set_num_threads(config.threads_per_worker)
        start_alone("gloo")
        self._config = config
        self._plan = StagePlan.of_stage(config, 0)
        self._processor = ValleyProcessor.from_pretrained(config.model)
        model = ValleyForConditionalGeneration.from_pretrained(config.model, dtype=torch.float32)
        stage = config.stages[0]
        groups = prepare_stage(model.core, stage, tower=model.vision_tower)
        engine = build_engine(trainable_module(model, stage, config), groups, config, stage, world=1)
        self._cache = FeatureCache(0)
        self._stepper = Stepper(
            model, engine, self._cache, device=torch.device("cpu"), rank=0, world=1, seed=0, precision="fp32"
        )

    def is_ready(self) -> bool:
        """Answers once the engine is built."""
        return True

    def from_store(self, windows_dir: Path) -> RunCost:
        """One epoch from a store, which may still be in the making."""
        settings = FeedSettings(
            rank=0,
            world=1,
            pad_token_id=self._processor.pad_token_id,
            pixel_values=self._processor.pixel_values,
            prefetch_steps=self._config.prefetch_steps,
            timeout_s=TIMEOUT_S,
        )
        with Feeder(self._plan, SampleIndex(windows_dir), self._cache, settings) as feeder:
            return self._train(iter(feeder), feeder)

    def in_process(self, windows_dir: Path, media: Path, num_samples: int) -> RunCost:
        """The first batches of the same store, their videos decoded inside the loop as the original does."""
        decoding = Decoding(self._plan, windows_dir, media, pad_token_id=self._processor.pad_token_id)
        return self._train(itertools.islice(decoding, num_samples // self._plan.global_batch_size), decoding)

    def _train(self, steps: Iterator[StepBatches], waits: "Feeder | Decoding") -> RunCost:
        num_samples = num_tokens = 0
        cpu, wall = time.process_time(), time.perf_counter()
        for batches in steps:
            self._stepper.train(batches, step=batches.index, scale=1.0)
            num_samples += batches.num_samples
            num_tokens += batches.num_tokens
        seconds = time.perf_counter() - wall
        return RunCost(num_samples, num_tokens, seconds, time.process_time() - cpu, waits.wait_s, time.time())


class Decoding:
    """Iterates over the steps of a complete store, decoding each sample's video when its step has come."""

    def __init__(self, plan: StagePlan, windows_dir: Path, media: Path, *, pad_token_id: int) -> None:
        self._index = SampleIndex(windows_dir)
        while not self._index.known.complete:
            self._index.grow(timeout_s=TIMEOUT_S, stop=Event())
        self._plan = plan
        self._media = media
        self._pad_token_id = pad_token_id
        self.wait_s = 0.0
        """Seconds spent in decoding and collating so far."""

    def __iter__(self) -> Iterator[StepBatches]:
        stream = self._plan.stream(self._index.known)
        for number in itertools.count():
            start = time.perf_counter()
            step = self._plan.step(number, stream)
            assert step is not None, "the store is complete"
            batches = self._batches(step)
            self.wait_s += time.perf_counter() - start
            yield batches

    def _batches(self, step: StepPlan) -> StepBatches:
        known, samples = self._index.known, list(step.samples)
        return StepBatches(
            index=step.index,
            micro_batches=tuple(self._micro_batch(slot) for slot in step.slots),
            num_samples=len(samples),
            num_tokens=int(known.num_tokens[samples].sum()),
            num_label_tokens=int(known.num_label_tokens[samples].sum()),
            plan_hash="",
        )

    def _micro_batch(self, numbers: tuple[int, ...]) -> MicroBatch:
        samples = [self._index.sample(number)[0] for number in numbers]
        pixels = [torch.from_numpy(reference_chain(self._media / f"{sample.sample_id}.mp4")) for sample in samples]
        clips = [Clip(number, pixel_values=one) for number, one in zip(numbers, pixels, strict=True)]
        return collate(samples, clips, pad_token_id=self._pad_token_id)


def start_alone(backend: str) -> None:
    """A process group of this process alone, which DeepSpeed asks for."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
