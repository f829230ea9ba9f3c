"""The worker loop: one for every stage, the same on every rank. Knows no data pipeline and no driver.

A stage opens the model folder, puts in what earlier stages trained, wraps its core in a DeepSpeed engine and steps
through the plan. The tower stays outside the engine; its features are computed here, without gradients.
"""

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import transformers

from valley_ray.errors import ConfigError, PreemptedError, TrainingError
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.processor import ValleyProcessor
from valley_ray.train.attention import use_packed_attention
from valley_ray.train.cadence import Cadence
from valley_ray.train.checkpoint import Checkpoints, Progress, restore
from valley_ray.train.config import TrainConfig
from valley_ray.train.export import export_model, put_trained
from valley_ray.train.feed import FeatureCache, Feeder, FeedSettings, RunEndedError, SampleIndex, StepBatches
from valley_ray.train.flops import count_flops, known_peak_flops
from valley_ray.train.identity import run_identity
from valley_ray.train.metrics import METRICS_FILE, Meter, MetricsLog, StepMetrics, peak_rss_bytes
from valley_ray.train.order import check_weights
from valley_ray.train.plan import StagePlan
from valley_ray.train.requests import Request, Requests
from valley_ray.train.run_folder import RunFolder, record_attempt
from valley_ray.train.sample_index import LEFT_OUT_FILE
from valley_ray.train.stage_config import StageConfig
from valley_ray.train.stages import learning_rate_scale, prepare_stage
from valley_ray.train.step import Stepper
from valley_ray.train.stored_features import stored_features
from valley_ray.train.trackers import Tracker, open_trackers
from valley_ray.train.trainable import trainable_module
from valley_ray.train.zero import ZeroEngine, build_engine


@dataclass(frozen=True)
class WorkerTask:
    """What the driver hands to every worker."""

    config: TrainConfig
    windows_dir: Path
    folder: RunFolder
    """Of metrics, curve and checkpoints."""


def run_worker(task: WorkerTask) -> dict[str, Any]:
    """Train all stages on this rank; rank 0 writes the model folder.

    Returns a summary (steps, seconds per stage, last loss), or ``{"error": ValleyError}`` for an end that
    another attempt would only repeat. Anything else is raised, and Ray Train starts another attempt.
    """
    # A bar per loaded file and worker would bury the progress lines.
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(task.config.threads_per_worker)
    torch.manual_seed(task.config.seed)
    try:
        return _Worker(task).run()
    except RunEndedError as error:
        return {"error": TrainingError(str(error))}
    except ConfigError as error:
        return {"error": error}


@dataclass(frozen=True)
class _Stage:
    """A stage that is being trained."""

    number: int
    config: StageConfig
    plan: StagePlan
    planned_steps: int
    """Over all rows of the store, known before the first window; failed rows make the stage end earlier."""
    model: ValleyForConditionalGeneration
    engine: ZeroEngine
    stepper: Stepper
    began_s: float
    """Clock (`time.perf_counter`) at which it was opened."""


class _Worker:
    def __init__(self, task: WorkerTask) -> None:
        self._task = task
        self._config = task.config
        context = ray.train.get_context()
        self._rank, self._world = context.get_world_rank(), context.get_world_size()
        self._device = ray.train.torch.get_device()
        self._processor = ValleyProcessor.from_pretrained(task.config.model)
        self._index = SampleIndex(task.windows_dir, pack_tokens=task.config.pack_tokens)
        info = self._index.info(timeout_s=task.config.timeout_s)
        check_weights(task.config.data.weights, info.sources)
        self._num_rows = info.sources or info.num_samples
        self._identity = run_identity(task.config, info.fingerprint)
        self._checkpoints = Checkpoints(task.config, task.folder, rank=self._rank)
        self._requests = Requests(task.folder, rank=self._rank, device=self._device)
        self._cache = FeatureCache(task.config.feature_cache_bytes)
        self._num_encoded = 0
        peak = self._config.peak_flops or known_peak_flops(self._device, precision=self._config.precision)
        self._meter = Meter(peak_flops=peak * self._world if peak else None)
        self._log: MetricsLog | None = None
        self._trained: dict[str, torch.Tensor] = {}
        self._step = 0
        self._cadence = Cadence(task.config.checkpoint_every, step=0)
        self._step_s = 0.0
        self._plan_hash: str | None = None
        self._loss = float("nan")
        self._seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        with restore(world=self._world, identity=self._identity) as restored:
            number, stage_step = (restored.progress.stage, restored.progress.stage_step) if restored else (0, 0)
            if restored is not None:
                self._go_on(restored.progress, restored.earlier)
            stage = self._open_stage(number)
            if restored is not None:
                restored.load(stage.engine)
        if self._rank == 0:
            self._task.folder.pull(METRICS_FILE)
            self._log = MetricsLog(self._task.folder.local, last_step=self._step, trackers=self._open_trackers())
            record_attempt(self._task.folder, after_step=self._step, workers=self._world)
        self._run_stage(stage, stage_step)
        for later in range(number + 1, len(self._config.stages)):
            self._plan_hash = None
            self._run_stage(self._open_stage(later), 0)
        self._checkpoints.wait()
        if self._log is not None:
            self._index.write_left_out(self._task.folder.local / LEFT_OUT_FILE)
            export_model(self._config.model, self._config.output, self._trained, lora=self._config.lora)
            self._log.plot()
            self._log.close()
            self._task.folder.push()
        return {"num_steps": self._step, "loss": self._loss, "seconds": self._seconds}

    def _open_trackers(self) -> list[Tracker]:
        folder, config = self._task.folder, self._config
        facts = config.model_dump(mode="json", exclude={"data", "evaluation"})
        return open_trackers(config.trackers, folder.local, run_name=folder.name, config=facts, last_step=self._step)

    def _go_on(self, progress: Progress, earlier: dict[str, torch.Tensor]) -> None:
        self._trained.update(earlier)
        self._step, self._plan_hash = progress.step, progress.plan_hash
        self._cadence = Cadence(self._config.checkpoint_every, step=progress.step)
        if self._rank == 0:
            name = self._config.stages[progress.stage].name
            sys.stdout.write(
                f"going on after step {progress.step} ({name} step {progress.stage_step}) with {self._world} workers"
                + (f", it was checkpointed by {progress.world}\n" if progress.world != self._world else "\n")
            )

    def _run_stage(self, stage: _Stage, stage_step: int) -> None:
        self._meter.start_stage()
        began_s = time.perf_counter()
        with Feeder(stage.plan, self._index, self._cache, self._feed_settings(stage), first_step=stage_step) as feeder:
            for batches in feeder:
                self._train(stage, batches, feeder)
                stage_step = batches.index + 1
                self._step_s += 0.2 * (time.perf_counter() - began_s - self._step_s)
                self._after_step(stage, stage_step)
                began_s = time.perf_counter()
        if stage.number < len(self._config.stages) - 1 and not self._cadence.is_saved(self._step):
            self._checkpoint(stage, stage_step)
        self._trained.update(stage.engine.trained_parameters())
        stage.engine.close()
        self._num_encoded += stage.stepper.num_encoded
        self._seconds[stage.config.name] = time.perf_counter() - stage.began_s

    def _after_step(self, stage: _Stage, stage_step: int) -> None:
        """Checkpoint and export, where it is time for it or asked for."""
        cadence, checkpoints, every = self._cadence, self._checkpoints, self._config.export_every
        lead = cadence.lead_of(upload_s=checkpoints.upload_s, step_s=self._step_s)
        requests, cadence.lead = self._requests.poll(is_committed=checkpoints.is_committed, lead=lead)
        if Request.COMMITTED in requests:
            cadence.committed()
        if cadence.is_due(self._step) or Request.LEAVE in requests:
            self._checkpoint(stage, stage_step)
        if Request.LEAVE in requests:
            self._checkpoints.wait()
            raise PreemptedError(f"a node is about to be taken away; the checkpoint of step {self._step} is committed")
        if Request.EXPORT in requests or (every is not None and self._step % every == 0):
            self._export(stage)
        if cadence.must_wait(self._step):
            checkpoints.wait()
            cadence.committed()

    def _export(self, stage: _Stage) -> None:
        """A model folder of this step beside `output`."""
        trained = {**self._trained, **stage.engine.trained_parameters()}
        if self._rank == 0:
            output = self._config.output.with_name(f"{self._config.output.name}-step-{self._step}")
            export_model(self._config.model, output, trained, lora=self._config.lora)
            sys.stdout.write(f"model folder of step {self._step}: {output}\n")

    def _open_stage(self, number: int) -> _Stage:
        began_s = time.perf_counter()
        config, stage = self._config, self._config.stages[number]
        trains_tower = "tower" in stage.parts
        plan = StagePlan.of_stage(config, number)
        model = ValleyForConditionalGeneration.from_pretrained(config.model, dtype=torch.float32)
        put_trained(model, self._trained, lora=config.lora, adapt="lora" in stage.parts)
        model.to(self._device)
        if config.pack_tokens is not None:
            use_packed_attention(model.core, self._device, precision=config.precision)
        if trains_tower or (number and "tower" in config.stages[number - 1].parts):
            # Features of a tower that changes are of no use, nor are those that it made before.
            self._cache = FeatureCache(0 if trains_tower else config.feature_cache_bytes)
        groups = prepare_stage(model.core, stage, tower=model.vision_tower)
        flops = count_flops(model)
        engine = build_engine(trainable_module(model, stage, config), groups, config, stage, world=self._world)
        ranks = {"device": self._device, "rank": self._rank, "world": self._world}
        stepper = Stepper(
            model, engine, self._cache, **ranks, seed=config.seed, precision=config.precision, flops=flops
        )
        return _Stage(number, stage, plan, plan.num_steps(self._num_rows), model, engine, stepper, began_s)

    def _train(self, stage: _Stage, batches: StepBatches, feeder: Feeder) -> None:
        scale = learning_rate_scale(batches.index, stage.planned_steps, stage.config)
        result = stage.stepper.train(batches, step=self._step, scale=scale)
        self._loss = result.loss
        if not result.is_finite:
            self._stop_nonfinite(stage, batches)
        self._step += 1
        self._plan_hash = batches.plan_hash
        self._meter.add(
            samples=batches.num_samples, tokens=batches.num_tokens, flops=result.flops, is_skipped=result.is_skipped
        )
        if self._log is not None and (self._step % self._config.log_every == 0 or batches.index == 0):
            self._log.write(self._metrics(stage, batches, scale, result.grad_norm, feeder.wait_s))

    def _metrics(
        self, stage: _Stage, batches: StepBatches, scale: float, grad_norm: float, wait_s: float
    ) -> StepMetrics:
        return StepMetrics(
            step=self._step,
            stage=stage.config.name,
            stage_step=batches.index + 1,
            stage_steps=stage.planned_steps,
            loss=self._loss,
            learning_rate=scale * stage.config.learning_rate,
            grad_norm=grad_norm,
            rss_bytes=peak_rss_bytes(),
            cuda_bytes=torch.cuda.max_memory_allocated() if self._device.type == "cuda" else 0,
            clips_encoded=self._num_encoded + stage.stepper.num_encoded,
            **self._meter.rates(wait_s=wait_s),
        )

    def _checkpoint(self, stage: _Stage, stage_step: int) -> None:
        assert self._plan_hash is not None, "a step was made"
        progress = Progress(
            stage=stage.number,
            stage_step=stage_step,
            step=self._step,
            world=self._world,
            identity=self._identity,
            plan_hash=self._plan_hash,
        )
        self._checkpoints.save(stage.engine, progress, self._trained, loss=self._loss)
        self._cadence.saved(self._step)
        if self._log is not None:
            self._task.folder.push()

    def _stop_nonfinite(self, stage: _Stage, batches: StepBatches) -> None:
        """Leave the sample ids of the step and end the run, on every rank alike."""
        path = self._task.folder.local / f"nonfinite-rank{self._rank}.json"
        ids = [name for micro_batch in batches.micro_batches for name in micro_batch.sample_ids]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"step": self._step, "sample_ids": ids}), encoding="utf-8")
        self._task.folder.push()
        what = "has gradients that are not finite" if math.isfinite(self._loss) else f"is {self._loss}"
        raise RunEndedError(
            f"the loss {what} at step {batches.index + 1} of {stage.config.name}; its samples are in "
            f"{self._task.folder.url}/nonfinite-rank*.json; lower learning_rate or remove them"
        )

    def _feed_settings(self, stage: _Stage) -> FeedSettings:
        is_wanted = self._config.data.features == "stored" and "tower" not in stage.config.parts
        stored = stored_features(stage.model, self._processor, self._index.shards_dir) if is_wanted else None
        return FeedSettings(
            rank=self._rank,
            world=self._world,
            pad_token_id=self._processor.pad_token_id,
            pixel_values=self._processor.pixel_values,
            prefetch_steps=self._config.prefetch_steps,
            timeout_s=self._config.timeout_s,
            stored=stored,
            plan_hash=self._plan_hash,
        )
