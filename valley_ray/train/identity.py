"""What a run is, as far as its weights depend on it: two runs of one identity come to the same loss curve."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from valley_ray.model.checkpoint import read_weight
from valley_ray.train.config import TrainConfig

Identity = dict[str, Any]
"""Plain JSON values by the name of the setting they come from."""

_DECIDING = {
    "seed",
    "global_batch_size",
    "stages",
    "lora",
    "pack_tokens",
    "length_grouping",
    "precision",
    "zero_stage",
    "offload",
}
"""Settings that decide what a step trains on and how. ZeRO stage and offload only decide how a checkpoint is laid out.
The number of workers, micro-batches, intervals and paths may change from one attempt to the next."""

_WEIGHT_FILES = ("*.safetensors", "*.bin")
NUM_SAMPLES, SAMPLE_BYTES = 64, 4096
"""Places of a weight file that are looked at."""


def run_identity(config: TrainConfig, store_fingerprint: str) -> Identity:
    """The identity of the run of `config` on the samples of a store; looks into the model folder's weights.

    Raises:
        CheckpointError: there are none, or damaged ones.
    """
    decides = config.model_dump(mode="json", include=_DECIDING)
    return {
        **decides,
        "data.weights": config.data.weights,
        "data": store_fingerprint,
        "model": _model_key(config.model),
    }


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What two identities do not share, as ``key=value (now value)``, in order."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*before, *now])
        pairs = [(f"{name}.{key}" if name else str(key), before.get(key), now.get(key)) for key in keys]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [(f"{name}.{number}", *both) for number, both in enumerate(zip(before, now, strict=True))]
    else:
        return [] if before == now else [f"{name}={before} (now {now})"]
    return [text for key, old, new in pairs for text in differences(old, new, key)]


def _model_key(folder: Path) -> str:
    """Of the configuration, the projector, which nearly every stage trains, and the weight files' sizes and some of
    their bytes: a copy of the folder has the same, another model of its shape has not."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(path for pattern in _WEIGHT_FILES for path in folder.glob(pattern)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            for place in range(NUM_SAMPLES):
                opened.seek(size * place // NUM_SAMPLES)
                digest.update(opened.read(SAMPLE_BYTES))
    for name in ("weight", "bias"):
        weight = read_weight(folder, f"core.mm_projector.{name}")
        if weight is not None:
            digest.update(weight.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
