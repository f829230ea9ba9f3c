"""Checkpoints of a run through `ray.train.report`: written to a local disk at once, uploaded while training goes on.

A checkpoint holds what the current stage trains with its optimizer state (DeepSpeed's files, each rank its part), what
earlier stages trained, and where the run stands. Weights that no stage has touched are in the model folder already.
It counts once Ray Train's controller has committed it: whatever dies later goes on from there.
"""

import hashlib
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import ray.train
import torch
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode
from ray.train.v2.api.validation_config import ValidationTaskConfig
from safetensors.torch import load_file, save_file

from valley_ray.errors import ConfigError
from valley_ray.evaluate.config import EvaluationConfig
from valley_ray.train import universal
from valley_ray.train.config import TrainConfig
from valley_ray.train.identity import Identity, differences
from valley_ray.train.run_folder import RunFolder, keep_snapshot
from valley_ray.train.sample_index import RunEndedError
from valley_ray.train.zero import ZeroEngine

PROGRESS_FILE = "progress.json"
EARLIER_FILE = "earlier.safetensors"
ENGINE_TAG = "engine"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: everything that was done before is done, nothing after."""

    stage: int
    stage_step: int
    """Steps made in this stage."""
    step: int
    """Steps made in all stages."""
    world: int
    """Ranks that wrote the checkpoint."""
    identity: Identity
    """Of the run; one with another identity cannot go on from here."""
    plan_hash: str
    """Of the stage's batches up to here, `valley_ray.train.feed.StepBatches.plan_hash`."""


@dataclass(frozen=True)
class Restored:
    """An opened checkpoint."""

    progress: Progress
    earlier: dict[str, torch.Tensor]
    """Parameters that finished stages trained."""
    folder: Path
    is_universal: bool
    """Whether `folder` is DeepSpeed's universal form, because another number of ranks wrote the checkpoint."""

    def load(self, engine: ZeroEngine) -> None:
        """Put the stage's parameters and optimizer state into its engine; collective."""
        engine.load(self.folder, tag=ENGINE_TAG, universal=self.is_universal)


class Checkpoints:
    """Writes the checkpoints of one worker, one after the other; never are two of them on their way."""

    def __init__(self, config: TrainConfig, folder: RunFolder, *, rank: int) -> None:
        self._config = config
        self._run_folder = folder
        self._rank = rank
        self._watch: threading.Thread | None = None
        self._num_saved = 0
        self.upload_s = 0.0
        """Seconds that the last upload took, until it counted."""
        key = hashlib.sha256(folder.url.encode()).hexdigest()[:16]
        # Of this name alone, so that what a killed worker has left goes when its successor starts.
        self._scratch = Path(tempfile.gettempdir()) / f"valley-checkpoint-{key}-{rank}"
        shutil.rmtree(self._scratch, ignore_errors=True)

    def save(self, engine: ZeroEngine, progress: Progress, earlier: Mapping[str, torch.Tensor], *, loss: float) -> None:
        """Checkpoint the run; collective. Returns once the local disk has it; it is uploaded meanwhile."""
        self.wait()
        folder = self._scratch / f"step-{progress.step}"
        engine.save(folder, tag=ENGINE_TAG)
        if self._rank == 0:
            save_file(dict(earlier), folder / EARLIER_FILE)
            (folder / PROGRESS_FILE).write_text(json.dumps(asdict(progress)), encoding="utf-8")
        self._num_saved += 1
        ray.train.report(
            reported_metrics(progress.step, loss, self._config.evaluation),
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            validation=self._validation(progress.step),
        )
        self._watch = threading.Thread(target=self._wait_for_commit, name="checkpoint-watch", daemon=True)
        self._watch.start()

    @property
    def is_committed(self) -> bool:
        """Whether this rank knows that the last checkpoint counts."""
        return self._watch is None or not self._watch.is_alive()

    def wait(self) -> None:
        """Return once the last checkpoint counts: what dies after this call goes on from it."""
        if self._watch is not None:
            self._watch.join()
            self._watch = None

    def _wait_for_commit(self) -> None:
        began_s = time.perf_counter()
        # report() returns before the files are stored, and they are before the controller knows of them.
        ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
        self.upload_s = time.perf_counter() - began_s
        if self._rank == 0:
            keep_snapshot(self._run_folder)

    def _validation(self, step: int) -> ValidationTaskConfig | bool:
        """The evaluation of every so manieth checkpoint of this attempt."""
        evaluation = self._config.evaluation
        if evaluation is None or self._num_saved % evaluation.every_checkpoints:
            return False
        return ValidationTaskConfig(fn_kwargs={"step": step}, timeout_s=evaluation.timeout_s)


def reported_metrics(step: int, loss: float, evaluation: EvaluationConfig | None) -> dict[str, float]:
    """What a checkpoint is reported with, and judged by until its evaluation has ended."""
    # So that one whose evaluation has not ended, or failed, is not the best. Finite: Ray Train writes an infinity to
    # its list as null, and cannot sort the list that it reads then.
    best = {} if evaluation is None else {evaluation.best: -sys.float_info.max}
    return {"step": step, "loss": loss, **best}


@contextmanager
def restore(*, world: int, identity: Identity) -> Iterator[Restored | None]:
    """Open the latest checkpoint of this run for the time of the `with` block, or None if there is none.

    Raises:
        ConfigError: it was written by a run with other data, batches or stages.
        RunEndedError: it is damaged.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as name:
        folder = Path(name)
        progress = read_progress(folder)
        if changed := differences(progress.identity, identity):
            raise ConfigError(
                f"the run has a checkpoint at step {progress.step} that was made with {', '.join(changed)}; set it "
                "back to go on, or take a new run_name"
            )
        earlier = load_file(folder / EARLIER_FILE)
        if progress.world == world or universal.is_any_world(folder, ENGINE_TAG):
            yield Restored(progress, earlier, folder, is_universal=False)
            return
        with universal.on_this_node(folder, tag=ENGINE_TAG) as converted:
            yield Restored(progress, earlier, converted, is_universal=True)


def read_progress(folder: Path) -> Progress:
    """Where the run stood that wrote the checkpoint in `folder`.

    Raises:
        ConfigError: another version of valley_ray wrote it.
        RunEndedError: it is damaged.
    """
    try:
        values = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunEndedError(
            f"the checkpoint that the run would go on from is damaged ({folder.name}: {error}); take a new run_name"
        ) from error
    try:
        return Progress(**values)
    except TypeError as error:
        raise ConfigError(
            "the run's checkpoint was written by another version of valley_ray; finish it there or take a new run_name"
        ) from error
