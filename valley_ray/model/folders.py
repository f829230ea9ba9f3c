"""Finds the folders that a model folder names (its tower, its base) and reads their JSON files. Knows no weights."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from valley_ray.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; raises CheckpointError where there is none."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}; give a folder written by save_pretrained")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a mapping, got {type(values).__name__}")
    return values


def find_beside(name: str, folder: Path) -> Path | None:
    """The folder called `name`: under the working directory, else under `folder` or one of its parents.

    The original looks under the working directory alone; a checkpoint moved together with what it names is opened
    from anywhere.
    """
    if not name:
        return None
    resolved = folder.resolve()
    for root in (Path.cwd(), resolved, *resolved.parents):
        candidate = root / name
        if candidate.is_dir() and candidate.resolve() != resolved:
            return candidate
    return None


def find_in_hub_cache(name: str) -> Path | None:
    """The snapshot folder of the hub repository `name` on this disk; nothing is fetched."""
    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def base_folder(folder: Path) -> Path | None:
    """The folder that an adapter folder names as its base; None where it names none or that is out of reach.

    The name stands in adapter_config.json, else in config.json.
    """
    if not (folder / "adapter_config.json").is_file():
        return None
    names = [read_json(folder / "adapter_config.json").get("base_model_name_or_path")]
    if (folder / "config.json").is_file():
        names.append(read_json(folder / "config.json").get("_name_or_path"))
    for name in names:
        if isinstance(name, str) and name:
            found = find_beside(name, folder) or find_in_hub_cache(name)
            if found is not None:
                return found
    return None
