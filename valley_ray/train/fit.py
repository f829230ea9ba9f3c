"""TrainConfig → one `TorchTrainer.fit`: what it is given, and what becomes of its end, in a person's words."""

import contextlib
import json
import logging
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import ray
import ray.train
from ray import PlacementGroupID
from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from valley_ray.errors import PreemptedError, TrainingError, ValleyError
from valley_ray.train.config import TrainConfig
from valley_ray.train.run_folder import SNAPSHOT_FILE, RunFolder, driven, remove_uncommitted
from valley_ray.train.validation import validation_config

logger = logging.getLogger(__name__)

RESIZE_INTERVAL_S = 60.0
"""How often a run with a range of workers looks for room for more of them; they begin anew, from a checkpoint."""

ELASTIC_START_TIMEOUT_S = 20.0
"""How long a run with a range of workers waits for room for a number of them before it counts the room anew. Ray
counts every 20 s, and notices a lost node after 15 s: what it asks for in between is too many, and would be waited for
in vain, 60 s long. For RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S where that is not set."""


def fit(config: TrainConfig, folder: RunFolder, windows_dir: Path) -> dict[str, Any]:
    """Train on the connected Ray until the model folder is written; returns rank 0's summary.

    Worker deaths are Ray Train's to handle; where its controller dies, the run is begun again, and both go on from
    the latest checkpoint.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the workers have ended, the message says how to go on.
        ValleyError: the user's mistake among the workers' errors, or another process trains the run.
        TrainingError: workers or the controller died more often than `max_failures`.
    """
    with driven(folder), _short_waits(config):
        remove_uncommitted(folder)
        return _fit(config, folder, windows_dir)


@contextlib.contextmanager
def _short_waits(config: TrainConfig) -> Iterator[None]:
    """Let a run with a range of workers wait for room as long as ELASTIC_START_TIMEOUT_S, or as the user says."""
    name = WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
    if config.min_workers == config.max_workers or name in os.environ:
        yield
        return
    os.environ[name] = f"{ELASTIC_START_TIMEOUT_S:g}"
    try:
        yield
    finally:
        del os.environ[name]


def _fit(config: TrainConfig, folder: RunFolder, windows_dir: Path) -> dict[str, Any]:
    failures = 0
    while failures <= config.max_failures:
        trainer = _trainer(config, folder, windows_dir)
        reserved = _placement_groups()
        try:
            summary: dict[str, Any] = trainer.fit().return_value
        except (ray.train.TrainingFailedError, RayActorError) as error:
            reason = _reason(error)
            if trainer.stopped_by is None and not (_is_lost_actor(error) or isinstance(reason, PreemptedError)):
                raise reason from error
            _free(_placement_groups() - reserved)
            if trainer.stopped_by is not None:
                raise KeyboardInterrupt(how_to_go_on(folder, trainer.stopped_by)) from error
            # Nodes that are taken away with notice may be many in a long run.
            failures += not isinstance(reason, PreemptedError)
            logger.warning("%s is begun again from its last checkpoint: %s", folder.name, reason)
            continue
        finally:
            trainer.restore_signals()
        if "error" in summary:
            raise summary["error"]
        return summary
    raise TrainingError(
        f"the controller of the run died more than max_failures={config.max_failures} times; "
        f"{how_to_go_on(folder, 'the run')}"
    )


def _is_lost_actor(error: Exception) -> bool:
    """Whether the controller died, or gave up on a process that died before its training began."""
    return isinstance(getattr(error, "controller_failure", error), RayActorError)


def how_to_go_on(folder: RunFolder, ended_by: str) -> str:
    """What a person does after an end that was not planned."""
    step = committed_step(folder)
    if step is None:
        return f"ended by {ended_by} before its first checkpoint; start it again"
    return f"ended by {ended_by}; run_name={folder.name} goes on from the checkpoint of step {step} in {folder.url}"


def committed_step(folder: RunFolder) -> int | None:
    """Steps behind the newest checkpoint that counts; None where there is none."""
    if not folder.has(SNAPSHOT_FILE):
        return None
    with folder.filesystem.open_input_stream(f"{folder.path}/{SNAPSHOT_FILE}") as stream:
        listed = stream.read()
    try:
        latest = json.loads(listed).get("latest_checkpoint_result")
    except json.JSONDecodeError:
        return None
    return None if latest is None else int(latest["metrics"]["step"])


class _Trainer(TorchTrainer):
    """Ray's, which also ends in order at SIGTERM, says which signal ended it and gives signals back.

    Without Ray's actor that frees what a dead controller had reserved: it asks the state API, which does not answer
    where the machine runs several Rays or no dashboard, and ends every run 12 s late then. `fit` does its work.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stopped_by: str | None = None
        self._handlers: dict[int, Any] = {}

    def _register_sigint_handler(self, controller: Any) -> None:
        def stop(number: int, frame: FrameType | None) -> None:
            is_first = self.stopped_by is None
            self.stopped_by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            if not is_first:
                raise KeyboardInterrupt
            # It ends itself, and so do its workers.
            with contextlib.suppress(RayActorError):
                ray.get(controller.abort.remote())

        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, stop)

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        return [one for one in callbacks if not isinstance(one, PlacementGroupCleanerCallback)]

    def restore_signals(self) -> None:
        """Give signals back to whom they belonged before `fit`."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()


def _placement_groups() -> set[str]:
    """Ids of this driver's placement groups; an id ends with its job's."""
    job = ray.get_runtime_context().get_job_id()
    table: dict[str, Any] = placement_group_table()
    return {name for name, row in table.items() if name.endswith(job) and row["state"] != "REMOVED"}


def _free(names: set[str]) -> None:
    """Give back what a controller reserved and cannot give back any more."""
    for name in names:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


def _trainer(config: TrainConfig, folder: RunFolder, windows_dir: Path) -> _Trainer:
    absolute = config.model_copy(update={"model": config.model.absolute(), "output": config.output.absolute()})
    resources = {"CPU": config.cpus_per_worker} | ({"GPU": 1} if config.use_gpu else {})
    return _Trainer(
        _train_loop,
        train_loop_config={"config": absolute, "windows_dir": windows_dir.absolute(), "folder": folder},
        torch_config=TorchConfig(backend="nccl" if config.use_gpu else "gloo", timeout_s=math.ceil(config.timeout_s)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
        ),
        run_config=ray.train.RunConfig(
            name=folder.name,
            storage_path=folder.storage,
            storage_filesystem=folder.filesystem,
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=checkpoint_config(config),
        ),
        validation_config=validation_config(config, folder),
    )


def checkpoint_config(config: TrainConfig) -> ray.train.CheckpointConfig:
    """Which checkpoints of a run Ray Train keeps."""
    if config.keep == "last":
        return ray.train.CheckpointConfig(num_to_keep=config.keep_checkpoints)
    by_loss = config.evaluation is None
    return ray.train.CheckpointConfig(
        num_to_keep=config.keep_checkpoints,
        checkpoint_score_attribute="loss" if config.evaluation is None else config.evaluation.best,
        checkpoint_score_order="min" if by_loss else "max",
    )


def _train_loop(values: dict[str, Any]) -> dict[str, Any]:
    """Runs in each worker; only there are torch's models and DeepSpeed imported."""
    from valley_ray.train.loop import WorkerTask, run_worker

    return run_worker(WorkerTask(**values))


def _reason(error: Exception) -> ValleyError:
    """The user's mistake among the workers' failures, else the first of them."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    causes = [getattr(failure, "cause", None) or failure for failure in failures]
    known = next((cause for cause in causes if isinstance(cause, ValleyError)), None)
    if known is not None:
        return known
    lines = str(causes[0]).strip().splitlines()
    return TrainingError(f"training workers failed: {type(causes[0]).__name__}: {lines[-1] if lines else 'no message'}")
