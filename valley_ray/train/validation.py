"""Checkpoints evaluated beside the training: Ray Train's validation task → model folder → metrics of held-out data."""

import functools
import tempfile
from pathlib import Path

from ray.train import Checkpoint
from ray.train.v2.api.validation_config import ValidationConfig
from safetensors.torch import load_file

from valley_ray.train import universal
from valley_ray.train.checkpoint import EARLIER_FILE, ENGINE_TAG
from valley_ray.train.config import TrainConfig
from valley_ray.train.run_folder import RunFolder


def validation_config(config: TrainConfig, folder: RunFolder) -> ValidationConfig | None:
    """What `TorchTrainer` takes for the evaluation of `config`, None where there is none."""
    if config.evaluation is None:
        return None
    task = functools.partial(evaluate_one, config=config, folder=folder)
    return ValidationConfig(fn=task, ray_remote_kwargs=config.evaluation.resources)


def evaluate_one(checkpoint: Checkpoint, *, step: int, config: TrainConfig, folder: RunFolder) -> dict[str, float]:
    """Metrics of the model in `checkpoint`; runs in a task of its own, with what the evaluation reserves."""
    from valley_ray.evaluate.evaluation import EVALUATION_FILE, evaluate_checkpoint
    from valley_ray.train.export import export_model

    settings = config.evaluation
    assert settings is not None, "only a run with an evaluation is evaluated"
    if not folder.is_local and settings.shards_dir is None:
        # Decoded clips stay on this machine; the folder's other files are copied to where the run is kept.
        settings = settings.model_copy(update={"shards_dir": folder.local.with_name(f"{folder.local.name}-shards")})
    with checkpoint.as_directory() as opened, tempfile.TemporaryDirectory(prefix="valley-evaluate-") as name:
        trained = load_file(Path(opened) / EARLIER_FILE)
        trained |= universal.trained_values(Path(opened), tag=ENGINE_TAG)
        model = Path(name) / "model"
        export_model(config.model, model, trained, lora=config.lora)
        folder.pull(EVALUATION_FILE)
        metrics = evaluate_checkpoint(model, settings, output=folder.local, step=step)
        folder.push()
    return metrics
