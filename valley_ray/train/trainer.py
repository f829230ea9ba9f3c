"""TrainConfig → one `TorchTrainer.fit` for all stages, with the data pipeline beside it where the config says so.

The driver's half: checks what can be checked before any worker starts, never opens the model, never starts or joins a
Ray cluster (the caller does).
"""

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import ray
from numpy.typing import NDArray

from valley_ray.data.shards import WindowManifest, WindowStore
from valley_ray.errors import ConfigError, TrainingError, ValleyError
from valley_ray.train.check import check_batch, check_draws, check_run, pipeline_config
from valley_ray.train.config import TrainConfig
from valley_ray.train.fit import fit
from valley_ray.train.metrics import CURVE_FILE, METRICS_FILE, read_metrics
from valley_ray.train.plan import epoch_order
from valley_ray.train.run_folder import RunFolder, run_folder
from valley_ray.train.sample_index import LEFT_OUT_FILE

if TYPE_CHECKING:
    from valley_ray.data.pipeline import PipelineSummary

logger = logging.getLogger(__name__)

POLL_S = 0.05


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves."""

    model_folder: Path
    run_folder: str
    """Path or URL of the folder with metrics, curve and checkpoints."""
    metrics_path: Path
    """JSONL of `valley_ray.train.metrics.StepMetrics`."""
    curve_path: Path
    """PNG of the loss."""
    left_out_path: Path | None
    """JSON lines, one for every sample that was not trained on (a corrupt clip, too long a text), and why; None where
    all were."""
    num_steps: int
    loss: float
    """Of the last step."""
    seconds: dict[str, float]
    """Per stage, by its name, engine building included."""
    data: "PipelineSummary | None"
    """What the pipeline made beside the training; None in mode shards, or if the training needed no more of it."""

    def text(self) -> str:
        """Where everything is."""
        lines = [
            f"model folder  {self.model_folder}",
            f"run folder    {self.run_folder}",
            f"metrics       {self.metrics_path}",
            f"loss curve    {self.curve_path}",
            f"steps         {self.num_steps:,}, the last one at loss {self.loss:.4f}",
        ]
        if self.left_out_path is not None:
            with self.left_out_path.open(encoding="utf-8") as file:
                lines.append(f"left out      {self.left_out_path} ({sum(1 for _ in file):,} samples)")
        return "\n".join(lines)


def train(config: TrainConfig) -> TrainResult:
    """Run all stages of `config` on the Ray cluster that is connected, and return once the model folder is written.

    Raises:
        ConfigError: the configuration cannot work; said before any worker starts.
        TrainingError: Ray is not connected, the data pipeline failed, the loss is not finite, or workers died more
            often than `max_failures`.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the message says how to go on.
    """
    if not ray.is_initialized():
        raise TrainingError("training needs a connected Ray; call ray.init(address=...) first")
    check_config(config)
    name = config.run_name or time.strftime("train-%Y%m%d-%H%M%S")
    folder = run_folder(config.storage, name)
    pipeline = None
    if config.data.mode == "overlap":
        with _Pipeline(config) as pipeline:
            check_batch(config, pipeline.num_samples, what="records")
            check_draws(config, pipeline.sources)
            summary = fit(config, folder, pipeline.windows_dir)
    else:
        assert config.data.windows_dir is not None, "mode shards has a windows_dir"
        summary = fit(config, folder, config.data.windows_dir)
    files = _files_to_look_at(config, folder)
    return TrainResult(
        model_folder=config.output.absolute(),
        run_folder=folder.url,
        metrics_path=files / METRICS_FILE,
        curve_path=files / CURVE_FILE,
        left_out_path=files / LEFT_OUT_FILE if (files / LEFT_OUT_FILE).exists() else None,
        num_steps=summary["num_steps"],
        loss=last_loss(summary["loss"], files / METRICS_FILE),
        seconds=summary["seconds"],
        data=pipeline.summary if pipeline is not None else None,
    )


def last_loss(loss: float, metrics: Path) -> float:
    """`loss` of a run's last step; of one that had made all its steps before, what its metrics say."""
    if not math.isnan(loss):
        return loss
    return next((line.loss for line in reversed(read_metrics(metrics))), loss)


def _files_to_look_at(config: TrainConfig, folder: RunFolder) -> Path:
    """Local folder of metrics and curve: that of the run, or copies beside the model folder."""
    if folder.is_local:
        return folder.local
    here = replace(folder, local=config.output.absolute().with_name(f"{config.output.name}-run"))
    here.pull(METRICS_FILE, CURVE_FILE, LEFT_OUT_FILE)
    return here.local


def check_config(config: TrainConfig) -> None:
    """Raise ConfigError, with the fix, for what cannot work on this machine's files and Ray's resources."""
    run_folder(config.storage, "any")
    for warning in check_run(config):
        logger.warning("%s", warning)
    _check_resources(config)


class _Pipeline:
    """The data pipeline on a thread, for the time of a `with` block; the block ends after it has ended.

    Its own failure is raised instead of what the trainers made of it; when the training ends first, it stops at its
    next window.
    """

    def __init__(self, config: TrainConfig) -> None:
        settings = pipeline_config(config)
        assert settings is not None, "only mode overlap has a pipeline"
        self._settings = settings
        self._seed = config.seed
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="data-pipeline", daemon=True)
        self.windows_dir = self._settings.windows_dir.absolute()
        self.summary: PipelineSummary | None = None
        self.num_samples = 0
        """Rows of the store, known once it is laid out."""
        self.sources: Mapping[str, int] = {}
        """The same by source."""

    def __enter__(self) -> Self:
        """Returns once the store is laid out, so that what cannot be read at all is said before any worker starts."""
        self._thread.start()
        store = WindowStore(self.windows_dir)
        while self._thread.is_alive() and store.info() is None:
            self._thread.join(POLL_S)
        self._raise()
        info = store.info()
        assert info is not None, "a pipeline that ends well has laid out its store"
        self.num_samples, self.sources = info.num_samples, info.sources
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread.is_alive():
            self._stop.set()
            logger.info("the training has ended, the data pipeline stops at its next window")
        self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is None or isinstance(self._error, _StoppedError):
            return
        if isinstance(self._error, ValleyError):
            raise self._error
        raise TrainingError(f"the data pipeline failed: {type(self._error).__name__}: {self._error}") from self._error

    def _run(self) -> None:
        try:
            from valley_ray.data.pipeline import run_pipeline

            self.summary = run_pipeline(self._settings, order=self._order, on_window=self._on_window)
        except BaseException as error:
            # Kept for the main thread, which raises it; run_pipeline has told the trainers through its store.
            self._error = error

    def _order(self, num_samples: int) -> NDArray[np.int64]:
        return epoch_order(num_samples, self._seed, 0)

    def _on_window(self, manifest: WindowManifest) -> None:
        if self._stop.is_set() and not manifest.is_last:
            raise _StoppedError(f"stopped after window {manifest.index}: the training had ended")


class _StoppedError(Exception):
    """Ends the pipeline's thread between two windows."""


def _check_resources(config: TrainConfig) -> None:
    have = ray.cluster_resources()
    if config.evaluation is not None:
        for name, amount in (("CPU", config.evaluation.actor_cpus), ("GPU", config.evaluation.actor_gpus)):
            if amount > have.get(name, 0.0):
                raise ConfigError(
                    f"evaluation.actor_{name.lower()}s={amount:g}, Ray has {have.get(name, 0.0):g} {name}; lower it"
                )
    wanted = {"CPU": config.min_workers * config.cpus_per_worker, "GPU": float(config.min_workers * config.use_gpu)}
    for kind, amount in wanted.items():
        if amount > have.get(kind, 0.0):
            raise ConfigError(
                f"num_workers={config.min_workers} need {amount:g} {kind}, Ray has {have.get(kind, 0.0):g}; lower "
                f"num_workers or {'cpus_per_worker' if kind == 'CPU' else 'set use_gpu=false'}"
            )
    room = num_placeable(config, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    if room < config.min_workers:
        raise ConfigError(
            f"num_workers={config.min_workers} with {config.cpus_per_worker:g} CPU{' and a GPU' * config.use_gpu} "
            f"each: the nodes of Ray have room for {room}, a worker stands on one of them; lower num_workers or "
            "cpus_per_worker"
        )


def num_placeable(config: TrainConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many workers of `config` fit on nodes with such resources, each on one node."""
    of_one = {"CPU": config.cpus_per_worker} | ({"GPU": 1.0} if config.use_gpu else {})
    # Ray counts in ten-thousandths: 0.3 CPU are room for three workers of 0.1.
    return sum(
        min(int(round(node.get(kind, 0.0) * 1e4) // round(amount * 1e4)) for kind, amount in of_one.items())
        for node in nodes
    )
