"""Opens model folders strictly: every weight comes from the files, or a CheckpointError names what does not fit."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from valley_ray.errors import CheckpointError

MAX_NAMES = 5
"""Weight names listed in an error before the rest is only counted."""


def check_folder(folder: Path) -> None:
    """Raise CheckpointError unless `folder` holds a config.json of a Valley model and safetensors weights."""
    if not folder.is_dir():
        raise CheckpointError(f"model folder {folder} does not exist; give a folder written by save_pretrained")
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(f"{folder} has no config.json; give a folder written by save_pretrained")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{config_path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("model_type") != "valley":
        came = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(
            f"{config_path}: expected model_type 'valley', got {came!r}; this is no Valley model folder"
        )
    _check_weight_files(folder)


def load_strictly(load: Any, folder: Path) -> Any:
    """Call `load` (transformers' from_pretrained) on `folder`; refuse a missing, extra or odd-shaped weight."""
    check_folder(folder)
    try:
        model, info = load(folder, ignore_mismatched_sizes=True, output_loading_info=True, use_safetensors=True)
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: a weight file is damaged ({error}); copy it again") from error
    problems = [
        *_listed("missing", info["missing_keys"]),
        *_listed("unexpected", info["unexpected_keys"]),
        *_listed("of another shape", [_mismatch(entry) for entry in info["mismatched_keys"]]),
    ]
    if problems:
        raise CheckpointError(
            f"{folder / 'model.safetensors'}: {'; '.join(problems)}; the weights do not fit config.json"
        )
    return model


def _check_weight_files(folder: Path) -> None:
    index_path = folder / "model.safetensors.index.json"
    if not index_path.is_file():
        if not (folder / "model.safetensors").is_file():
            raise CheckpointError(f"{folder} has no model.safetensors; give a folder written by save_pretrained")
        return
    shards = sorted(set(json.loads(index_path.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks weight files named by {index_path.name}: {', '.join(missing)}; copy them too"
        )


def _listed(what: str, names: Any) -> list[str]:
    ordered = sorted(names)
    if not ordered:
        return []
    more = f" and {len(ordered) - MAX_NAMES} more" if len(ordered) > MAX_NAMES else ""
    return [f"{len(ordered)} weights {what}: {', '.join(ordered[:MAX_NAMES])}{more}"]


def _mismatch(entry: Any) -> str:
    name, came, expected = entry
    return f"{name} (expected {list(expected)}, got {list(came)})"
