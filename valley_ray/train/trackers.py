"""Trackers that hear of every logged step: TensorBoard, Weights & Biases, MLflow. Knows no torch and no Ray.

TensorBoard's writer comes with Ray Train; the others are extras. Where they send to is theirs to know (WANDB_MODE,
MLFLOW_TRACKING_URI and the like); by default all of them write into the run's folder.
"""

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from valley_ray.errors import ConfigError

logger = logging.getLogger(__name__)

MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
"""What each tracker imports."""

PROJECT = "valley_ray"
"""Project (W&B) or experiment (MLflow) that runs belong to where the environment names none."""


class Tracker(Protocol):
    """Something that keeps numbers over steps."""

    name: str

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Keep the numbers of one step."""

    def close(self) -> None:
        """Write out what is still held."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError, with the fix, where a tracker's package is not installed."""
    for name in names:
        if importlib.util.find_spec(MODULES[name]) is None:
            package = "tensorboardX" if name == "tensorboard" else f"'valley-ray[{name}]'"
            raise ConfigError(f"trackers: {name} needs {MODULES[name]}, which is not installed; pip install {package}")


def open_trackers(
    names: Sequence[str], folder: Path, *, run_name: str, config: Mapping[str, Any], last_step: int
) -> list[Tracker]:
    """The trackers of a run that goes on after `last_step`, 0 for a new one.

    One that does not open (no network, no login) is left out with a warning; `check_trackers` has spoken before.
    """
    opened: list[Tracker] = []
    for name in names:
        try:
            opened.append(_OPENERS[name](folder, run_name, config, last_step))
        except Exception as error:
            logger.warning("%s does not open and is left out: %s: %s", name, type(error).__name__, error)
    return opened


class TensorBoard:
    """Event files in `folder`/tensorboard."""

    name = "tensorboard"

    def __init__(self, folder: Path, run_name: str, config: Mapping[str, Any], last_step: int) -> None:
        from tensorboardX import SummaryWriter

        # Steps that a killed attempt made after its last checkpoint are made again.
        purge = last_step + 1 if last_step else None
        self._writer = SummaryWriter(
            str(folder / "tensorboard"), purge_step=purge, filename_suffix=f".after-step-{last_step}"
        )

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """One scalar per number, under train/."""
        for key, value in values.items():
            self._writer.add_scalar(f"train/{key}", value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of the same name in W&B, its files in `folder`."""

    name = "wandb"

    def __init__(self, folder: Path, run_name: str, config: Mapping[str, Any], last_step: int) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_name,
            id=run_name,
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """The numbers of one step. W&B takes no step below its last: what a killed attempt told first stays."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflow:
    """A run of the same name in MLflow; in `folder`/mlflow where MLFLOW_TRACKING_URI names no other place."""

    name = "mlflow"

    def __init__(self, folder: Path, run_name: str, config: Mapping[str, Any], last_step: int) -> None:
        import mlflow

        if "MLFLOW_TRACKING_URI" not in os.environ:
            # MLflow 3 wants a database by itself, for which the small client would need many packages more.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            mlflow.set_tracking_uri(f"file://{(folder / 'mlflow').absolute()}")
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        self._client = mlflow.MlflowClient()
        earlier = self._client.search_runs(
            [experiment.experiment_id], filter_string=f"tags.mlflow.runName = '{run_name}'", max_results=1
        )
        run = earlier[0] if earlier else self._client.create_run(experiment.experiment_id, run_name=run_name)
        self._run_id = run.info.run_id
        if not earlier:
            for key, value in config.items():
                self._client.log_param(self._run_id, key, value)

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """One metric per number."""
        for key, value in values.items():
            self._client.log_metric(self._run_id, key, value, step=step)

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run_id)


_OPENERS: dict[str, Callable[[Path, str, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
