"""Runs of the tiny model, and the deaths that tests bring about in them; only processes of this process's own Ray."""

import json
import os
import random
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.train.config import DataConfig, TrainConfig
from valley_ray.train.metrics import StepMetrics, read_metrics
from valley_ray.train.run_folder import SNAPSHOT_FILE
from valley_ray.train.stage_config import StageConfig

STAGES = (
    StageConfig(name="stage1", trainable=("projector",), learning_rate=1e-2, max_steps=10),
    StageConfig(name="stage2", trainable=("projector", "language_model"), learning_rate=1e-2, max_steps=10),
)


def make_config(model: Path, store: Path, runs: Path, name: str, **changes: object) -> TrainConfig:
    """Two stages of ten steps, three slots a step; logged every step, no checkpoints."""
    values = {
        "model": model,
        "output": runs / f"{name}-model",
        "storage": runs,
        "run_name": name,
        "data": DataConfig(windows_dir=store),
        "stages": STAGES,
        "global_batch_size": 12,
        "micro_batch_size": 4,
        "log_every": 1,
        "checkpoint_every": None,
        "timeout_s": 60.0,
    }
    return TrainConfig(**{**values, **changes})


def losses(lines: list[StepMetrics]) -> list[float]:
    return [line.loss for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(ValleyForConditionalGeneration.from_pretrained(folder).core.named_parameters())


def largest_difference(first: Path, second: Path) -> float:
    ours, theirs = weights(first), weights(second)
    return max(float((ours[name] - theirs[name]).detach().abs().max()) for name in ours)


def attempts(run: Path) -> list[dict[str, int]]:
    """After which step every attempt began, with how many workers."""
    return [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]


def forget_last_checkpoint(run: Path) -> None:
    """Leave the run as a death before its newest checkpoint would have left it."""
    path = run / SNAPSHOT_FILE
    snapshot = json.loads(path.read_text())
    kept = sorted(snapshot["checkpoint_results"], key=lambda one: one["metrics"]["step"])[:-1]
    names = [one["checkpoint_dir_name"] for one in kept]
    indices = snapshot["checkpoint_report_indices"][: len(kept)]
    changed = {"checkpoint_results": kept, "checkpoint_report_indices": indices, "latest_checkpoint_result": kept[-1]}
    path.write_text(json.dumps(snapshot | changed))
    assert all((run / name).is_dir() for name in names)


@dataclass(frozen=True)
class Death:
    """A process that was killed."""

    step: int
    """Last step that was logged before it died."""
    recovery_s: float
    """Seconds to the first step that was made after it."""


class Killer(threading.Thread):
    """SIGKILLs a random worker (or the controller) once each of `steps` is logged. A context manager."""

    def __init__(self, metrics: Path, steps: tuple[int, ...], *, what: str = "RayTrainWorker", seed: int = 0) -> None:
        super().__init__(daemon=True)
        self._metrics = metrics
        self._steps = steps
        self._what = what
        self._random = random.Random(seed)
        self._ended = threading.Event()
        self.kills: list[int] = []
        """Last step that was logged before each kill."""
        self.deaths: list[Death] = []
        """Kills after which a new step was made."""

    def __enter__(self) -> "Killer":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        for step in self._steps:
            if not self._until(step):
                return
            victims = [child for child in psutil.Process().children(recursive=True) if self._is_victim(child)]
            num_attempts = len(attempts(self._metrics.parent))
            os.kill(self._random.choice(victims).pid, signal.SIGKILL)
            began_s = time.monotonic()
            self.kills.append(self._last())
            if self._until_attempt(num_attempts) and self._until(attempts(self._metrics.parent)[-1]["after_step"] + 1):
                self.deaths.append(Death(self.kills[-1], time.monotonic() - began_s))

    def _until_attempt(self, num_before: int) -> bool:
        """Metrics of steps that are made again are gone when an attempt is told of."""
        while len(attempts(self._metrics.parent)) == num_before:
            if self._ended.wait(0.005):
                return False
        return True

    def _until(self, step: int) -> bool:
        while self._last() < step:
            if self._ended.wait(0.005):
                return False
        return True

    def _last(self) -> int:
        lines = read_metrics(self._metrics)
        return lines[-1].step if lines else 0

    def _is_victim(self, process: psutil.Process) -> bool:
        try:
            return any(self._what in part for part in process.cmdline())
        except psutil.Error:
            return False
