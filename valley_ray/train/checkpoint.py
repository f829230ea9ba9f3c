"""What a run keeps: checkpoints through `ray.train.report`, and the model folder at its end.

A checkpoint holds what the current stage trains with its optimizer state (DeepSpeed's files, each rank its part), what
earlier stages trained, and where the run stands. Weights that no stage has touched are in the model folder already.
"""

import json
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointConsistencyMode
from safetensors.torch import load_file, save_file

from valley_ray.config import validate_config
from valley_ray.errors import CheckpointError, ConfigError
from valley_ray.model import ValleyCore, ValleyForConditionalGeneration
from valley_ray.processor import ValleyProcessor
from valley_ray.train.zero import ZeroEngine, load_parameters

PROGRESS_FILE = "progress.json"
EARLIER_FILE = "earlier.safetensors"
ENGINE_TAG = "engine"
ADAPTER_FOLDER = "adapter"


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
    run_key: str
    """Names everything that decides which samples a step trains on; a run with another key cannot go on from here."""


@dataclass(frozen=True)
class Restored:
    """An opened checkpoint."""

    progress: Progress
    earlier: dict[str, torch.Tensor]
    """Parameters that finished stages trained."""
    folder: Path


def save(
    engine: ZeroEngine, progress: Progress, earlier: Mapping[str, torch.Tensor], *, rank: int, loss: float
) -> None:
    """Checkpoint the run; collective. Returns once the controller has committed it: what dies after this call
    resumes from here."""
    with tempfile.TemporaryDirectory(prefix="valley-checkpoint-") as name:
        folder = Path(name)
        engine.save(folder, tag=ENGINE_TAG)
        if rank == 0:
            save_file(dict(earlier), folder / EARLIER_FILE)
            (folder / PROGRESS_FILE).write_text(json.dumps(asdict(progress)), encoding="utf-8")
        metrics = {"step": progress.step, "loss": loss}
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))
        # report() returns as soon as the files are stored; the controller may not know of them yet.
        ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)


@contextmanager
def restore(*, world: int, run_key: str) -> Iterator[Restored | None]:
    """Open the latest checkpoint of this run, or None if there is none.

    Raises:
        ConfigError: it was written by a run with other data, batches or stages, or by another number of workers.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as name:
        folder = Path(name)
        progress = Progress(**json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8")))
        if progress.world != world:
            raise ConfigError(
                f"the checkpoint at step {progress.step} was written by {progress.world} workers, this run has "
                f"{world}; set num_workers={progress.world} or take a new run_name"
            )
        if progress.run_key != run_key:
            raise ConfigError(
                f"the checkpoint at step {progress.step} belongs to a run with other data, batch sizes, seed or "
                "stages; take a new run_name"
            )
        yield Restored(progress=progress, earlier=load_file(folder / EARLIER_FILE), folder=folder)


def put_trained(
    core: ValleyCore, trained: Mapping[str, torch.Tensor], *, lora: Mapping[str, Any] | None, adapt: bool
) -> None:
    """Bring `core`, as its folder has it, to where the finished stages left it.

    With `adapt`, or where `trained` holds an adapter, the language model gets one of the settings `lora`, since an
    adapted layer has other parameter names.

    Raises:
        ConfigError: `lora` is not what `LoraSettings` takes, or does not fit the model.
    """
    known = {name for name, _ in core.named_parameters()}
    load_parameters(core, {name: value for name, value in trained.items() if name in known})
    if not adapt and trained.keys() <= known:
        return
    from valley_ray.model.lora import LoraSettings, add_lora  # seconds of import that only a run with LoRA pays

    settings = validate_config(LoraSettings, dict(lora or {}), source="lora")
    try:
        add_lora(core, settings)
    except CheckpointError as error:
        raise ConfigError(f"lora: {error}") from error
    load_parameters(core, {name: value for name, value in trained.items() if name not in known})


def export_model(
    source: Path, output: Path, trained: Mapping[str, torch.Tensor], *, lora: Mapping[str, Any] | None = None
) -> None:
    """Write the model of folder `source` with `trained` (parameters of its core) to folder `output`, whole or not
    at all; a model folder that was there is replaced.

    A trained adapter is merged into the model, and stands alone in `output`/adapter beside it.
    """
    model = ValleyForConditionalGeneration.from_pretrained(source)
    put_trained(model.core, trained, lora=lora, adapt=False)
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.tmp")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        if any(".lora_" in name for name in trained):
            from valley_ray.model.lora import merge_lora, save_adapter

            save_adapter(model.core, temporary / ADAPTER_FOLDER)
            merge_lora(model.core)
        model.save_pretrained(temporary)
        ValleyProcessor.from_pretrained(source).save_pretrained(temporary)
        if output.exists():
            replaced = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.old")
            output.rename(replaced)
            temporary.rename(output)
            shutil.rmtree(replaced)
        else:
            temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
