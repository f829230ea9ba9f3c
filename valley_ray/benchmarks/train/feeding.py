"""Tokens per second of one worker in three modes: decoding in its own loop, from shards, beside the pipeline.

in_process  the reference chain (decord, PIL, numpy) inside the step loop, as the original's trainer does
shards      the same samples from a store that was made before
overlap     the pipeline decodes on the same two cores; the clock runs from its start to the end of the last step

All train the same steps of the same model in the same process; the modes take turns. Clips are chosen so that decoding
is about three quarters of an in-process step on this machine.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray

from valley_ray.benchmarks.decode_cost import our_chain, reference_chain
from valley_ray.benchmarks.long_clips import write_long_clip
from valley_ray.benchmarks.process_cost import TreeWatch
from valley_ray.benchmarks.train.config import TrainCost
from valley_ray.benchmarks.train.models import make_small_model, random_text
from valley_ray.benchmarks.train.trainee import RunCost, Trainee
from valley_ray.data.config import PipelineConfig
from valley_ray.data.pipeline import run_pipeline
from valley_ray.session import quiet_ray_data
from valley_ray.storage import storage_root
from valley_ray.train.config import DataConfig, TrainConfig
from valley_ray.train.order import epoch_order
from valley_ray.train.stage_config import StageConfig

NUM_CPUS = 2
WORKER_CPUS, TASK_CPUS = 0.5, 0.5
"""Fractions, or whoever starts first would keep the other from starting."""
CLIP_SECONDS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
NUM_CLIPS = 4
"""Different videos; the samples have them under names of their own."""
WANTED_SHARE = 0.73
"""Of decoding in an in-process step; 0.6 to 0.8 is what the comparison is meant for."""
NUM_WARM = 32
GLOBAL_BATCH, MICRO_BATCH, WINDOW = 16, 8, 32


@dataclass(frozen=True)
class Round:
    """One run of each mode."""

    in_process: RunCost
    shards: RunCost
    overlap: RunCost
    overlap_s: float
    """From the start of the pipeline to the end of the last step."""
    overlap_cpu_s: float
    """Of the pipeline and the training process meanwhile, Ray's own servers aside."""


def feeding_numbers(config: TrainCost, *, say: Callable[[str], None]) -> dict[str, object]:
    """What benchmark_train reports of feeding, on a Ray of its own."""
    folder = (storage_root() / config.clips).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    model = make_small_model(work / "model")
    os.environ["OMP_NUM_THREADS"] = "1"
    ray.init(address="local", num_cpus=NUM_CPUS, include_dashboard=False, log_to_driver=False)
    quiet_ray_data()
    try:
        trainee = ray.remote(Trainee).options(num_cpus=WORKER_CPUS).remote(_train_config(work, model))
        videos = _videos(folder, 1, CLIP_SECONDS[0])
        ray.get(trainee.is_ready.remote())
        warm = _Set(work / "warm", model, videos, NUM_WARM)
        warm.overlap(trainee)
        steps: RunCost = ray.get(trainee.from_store.remote(warm.windows(0)))
        clip_s = _choose(folder, steps.cpu_s / steps.num_samples, say)
        samples = _Set(work / "set", model, _videos(folder, NUM_CLIPS, clip_s), config.num_samples)
        rounds = [_round(samples, trainee, number, config, say) for number in range(config.num_rounds)]
    finally:
        ray.shutdown()
        shutil.rmtree(work, ignore_errors=True)
    return _numbers(rounds) | {"clip_s": clip_s}


def _numbers(rounds: Sequence[Round]) -> dict[str, object]:
    rates = {
        "in_process": [one.in_process.tokens_per_s for one in rounds],
        "shards": [one.shards.tokens_per_s for one in rounds],
        "overlap": [one.overlap.num_tokens / one.overlap_s for one in rounds],
    }

    def versus(mode: str) -> float:
        return median(ours / theirs for ours, theirs in zip(rates[mode], rates["in_process"], strict=True))

    cpu_s = {
        "in_process": [one.in_process.cpu_s / one.in_process.num_samples for one in rounds],
        "shards": [one.shards.cpu_s / one.shards.num_samples for one in rounds],
        "overlap": [one.overlap_cpu_s / one.overlap.num_samples for one in rounds],
    }
    return {
        "shards_vs_in_process": versus("shards"),
        "overlap_vs_in_process": versus("overlap"),
        "stall_share_shards": median(one.shards.wait_s / one.shards.seconds for one in rounds),
        "stall_share_overlap": median(1 - (one.overlap.seconds - one.overlap.wait_s) / one.overlap_s for one in rounds),
        "decode_share": median(one.in_process.wait_s / one.in_process.seconds for one in rounds),
        "tokens_per_s": {mode: median(values) for mode, values in rates.items()},
        "cpu_ms_per_sample": {mode: 1e3 * median(values) for mode, values in cpu_s.items()},
        "rounds": [asdict(one) for one in rounds],
    }


def _round(samples: "_Set", trainee: Any, number: int, config: TrainCost, say: Callable[[str], None]) -> Round:
    overlap, overlap_s, overlap_cpu_s = samples.overlap(trainee, number)
    windows = samples.windows(number)
    shards = ray.get(trainee.from_store.remote(windows))
    in_process = ray.get(trainee.in_process.remote(windows, samples.media, config.num_samples_in_process))
    shutil.rmtree(windows)
    one = Round(in_process, shards, overlap, overlap_s, overlap_cpu_s)
    say(
        f"round {number + 1}: tokens/s in process {in_process.tokens_per_s:.0f} (decoding "
        f"{in_process.wait_s / in_process.seconds:.2f} of it), shards {shards.tokens_per_s:.0f} (waiting "
        f"{shards.wait_s / shards.seconds:.3f}), overlap {overlap.num_tokens / overlap_s:.0f}"
    )
    return one


class _Set:
    """Samples with a video each; makes a new store of them whenever asked to."""

    def __init__(self, folder: Path, model: Path, videos: Sequence[Path], num_samples: int) -> None:
        self._folder = folder
        self._model = model
        self._num_samples = num_samples
        self.media = folder / "media"
        self.media.mkdir(parents=True)
        random = np.random.default_rng(0)
        records = []
        for number in range(num_samples):
            os.link(videos[number % len(videos)], self.media / f"{number:05d}.mp4")
            turns = [
                {"from": "human", "value": "<video>\nWhat is moving?"},
                {"from": "gpt", "value": random_text(random)},
            ]
            records.append({"id": f"{number:05d}", "video": f"{number:05d}.mp4", "conversations": turns})
        (folder / "records.json").write_text(json.dumps(records), encoding="utf-8")

    def windows(self, number: int) -> Path:
        """Store `number`."""
        return self._folder / f"windows-{number}"

    def overlap(self, trainee: Any, number: int = 0) -> tuple[RunCost, float, float]:
        """Make store `number` while `trainee` trains on it: its cost, wall and CPU seconds of both together."""
        config = PipelineConfig(
            records=(self._folder / "records.json",),
            media_root=(self.media,),
            model=self._model,
            windows_dir=self.windows(number),
            window_size=WINDOW,
            block_size=WINDOW,
            decode_cpus=TASK_CPUS,
        )
        with TreeWatch() as watch:
            training = trainee.from_store.remote(self.windows(number))
            before, start = watch.cpu_s(), time.time()
            summary = run_pipeline(config, order=lambda count: epoch_order(count, 0, 0))
            cost: RunCost = ray.get(training)
            after = watch.cpu_s()
        assert summary.ok == cost.num_samples == self._num_samples, f"every sample is trained on once, got {summary}"
        cpu_s = sum(after[kind] - before[kind] for kind in ("driver", "worker", "decoder"))
        return cost, cost.ended_at - start, cpu_s


def _choose(folder: Path, step_s: float, say: Callable[[str], None]) -> float:
    """Length of the clips whose decoding is nearest to WANTED_SHARE of a step that takes `step_s` per sample itself.

    In CPU time: this is no measurement yet, and must come out the same whatever else the machine does.
    """
    shares = {}
    for clip_s in CLIP_SECONDS:
        [video] = _videos(folder, 1, clip_s)
        assert np.array_equal(our_chain(video), reference_chain(video)), f"other pixels than the reference's in {video}"
        times = []
        for _ in range(3):
            start = time.process_time()
            reference_chain(video)
            times.append(time.process_time() - start)
        shares[clip_s] = min(times) / (min(times) + step_s)
        if shares[clip_s] > WANTED_SHARE:
            break
    chosen = min(shares, key=lambda clip_s: abs(shares[clip_s] - WANTED_SHARE))
    step_ms, share = round(1e3 * step_s), shares[chosen]
    say(f"a step takes {step_ms} ms per sample; decoding a clip of {chosen:g} s is {share:.2f} of both together")
    return chosen


def _videos(folder: Path, count: int, clip_s: float) -> list[Path]:
    """Generated clips, encoded where they are missing (about two seconds of CPU per second of clip)."""
    paths = [folder / f"{clip_s:g}s-{seed}.mp4" for seed in range(count)]
    for seed, path in enumerate(paths):
        if not path.is_file():
            write_long_clip(path, seed=seed, num_bframes=2, seconds=clip_s)
    return paths


def _train_config(work: Path, model: Path) -> TrainConfig:
    return TrainConfig(
        model=model,
        output=work / "output",
        data=DataConfig(windows_dir=work),
        stages=(StageConfig(name="stage2", trainable=("valley-stage2",), learning_rate=1e-5, epochs=1),),
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=MICRO_BATCH,
        num_workers=1,
        zero_stage=2,
    )
