"""What a run has trained → a model folder: trained parameters go back into the model that they came from."""

import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from valley_ray.config import validate_config
from valley_ray.errors import CheckpointError, ConfigError
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.processor import ValleyProcessor
from valley_ray.train.stages import TOWER_PREFIX

ADAPTER_FOLDER = "adapter"


def put_trained(
    model: ValleyForConditionalGeneration,
    trained: Mapping[str, torch.Tensor],
    *,
    lora: Mapping[str, Any] | None,
    adapt: bool,
) -> None:
    """Bring `model`, as its folder has it, to where the finished stages left it.

    With `adapt`, or where `trained` holds an adapter, the language model gets one of the settings `lora`, since an
    adapted layer has other parameter names.

    Raises:
        ConfigError: `lora` is not what `LoraSettings` takes, or does not fit the model.
    """
    known = set(_parameters(model))
    _copy(model, {name: value for name, value in trained.items() if name in known})
    if not adapt and trained.keys() <= known:
        return
    from valley_ray.model.lora import LoraSettings, add_lora  # seconds of import that only a run with LoRA pays

    settings = validate_config(LoraSettings, dict(lora or {}), source="lora")
    try:
        add_lora(model.core, settings, quantized=adapt)
    except CheckpointError as error:
        raise ConfigError(f"lora: {error}") from error
    _copy(model, {name: value for name, value in trained.items() if name not in known})


def export_model(
    source: Path, output: Path, trained: Mapping[str, torch.Tensor], *, lora: Mapping[str, Any] | None = None
) -> None:
    """Write the model of folder `source` with `trained` (parameters by the names of `prepare_stage`) to folder
    `output`, whole or not at all; a model folder that was there is replaced.

    A trained adapter is merged into the model, and stands alone in `output`/adapter beside it, where that folder and
    `source` together are the same model.
    """
    model = ValleyForConditionalGeneration.from_pretrained(source)
    put_trained(model, trained, lora=lora, adapt=False)
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.tmp")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        if any(".lora_" in name for name in trained):
            from valley_ray.model.lora import merge_lora, save_adapter

            if _is_all_in_adapter(model, trained):
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


def _is_all_in_adapter(model: ValleyForConditionalGeneration, trained: Mapping[str, torch.Tensor]) -> bool:
    """Whether an adapter's folder holds all of `trained`: it takes in projector, pooling and input table, and neither
    the language model's own weights nor the tower."""
    table = model.core.get_input_embeddings().weight
    held = {name for name, parameter in model.core.named_parameters() if parameter is table or ".lora_" in name}
    return not any(name.startswith(("language_model.", TOWER_PREFIX)) for name in trained.keys() - held)


def _parameters(model: ValleyForConditionalGeneration) -> dict[str, torch.nn.Parameter]:
    of_tower = {f"{TOWER_PREFIX}{name}": parameter for name, parameter in model.vision_tower.named_parameters()}
    return dict(model.core.named_parameters()) | of_tower


def _copy(model: ValleyForConditionalGeneration, values: Mapping[str, torch.Tensor]) -> None:
    parameters = _parameters(model)
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value.view_as(parameters[name]))
