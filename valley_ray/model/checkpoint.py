"""Opens model folders strictly: every weight comes from the files, or a CheckpointError names what does not fit.

Two layouts: ours (written by save_pretrained: safetensors) and that of the original's released checkpoints (LLaMA's
keys with the tower and projector inside `model.`, pickled shards). The map between their keys lives only here.
"""

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, GenerationConfig, LlamaConfig, PreTrainedConfig

from valley_ray.errors import CheckpointError
from valley_ray.model.config import ID_FIELD_OF_TOKEN, ValleyConfig

MAX_NAMES = 5
"""Weight names listed in an error before the rest is only counted."""

UPSTREAM_PREFIXES = (
    ("model.vision_tower.vision_model.", "vision_tower."),
    ("model.mm_projector.", "core.mm_projector."),
    ("model.", "core.language_model.model."),
    ("lm_head.", "core.language_model.lm_head."),
)
"""Upstream's prefix and ours; the first that fits is taken."""

UPSTREAM_BUFFERS = (".rotary_emb.inv_freq", ".embeddings.position_ids")
"""Buffers in upstream's files that are computed today."""


def load_folder(load: Callable[..., Any], folder: Path) -> Any:
    """Open `folder` by `load`, transformers' from_pretrained with the caller's options; either layout.

    Raises:
        CheckpointError: no such folder or file, a damaged file, or a missing, unexpected or odd-shaped weight.
    """
    values = _read_config(folder)
    if "mm_vision_tower" not in values:
        _check_config(values, folder / "config.json")
        _check_weight_files(folder)
        return _load_strictly(partial(load, folder), folder, use_safetensors=True)
    state = {
        name: tensor
        for file in _upstream_files(folder)
        for name, tensor in _read_pickle(file).items()
        if not name.endswith(UPSTREAM_BUFFERS)
    }
    state = {_our_name(name): tensor for name, tensor in state.items()}
    config = _upstream_config(values, folder)
    model = _load_strictly(partial(load, None), folder, config=config, state_dict=state)
    model.generation_config = GenerationConfig(
        **{name: values.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    )
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Valley model of either layout."""
    if not folder.is_dir():
        raise CheckpointError(f"model folder {folder} does not exist; give a folder written by save_pretrained")
    path = folder / "config.json"
    config = _read_json(path)
    if config.get("model_type") != "valley":
        came = config.get("model_type")
        raise CheckpointError(f"{path}: expected model_type 'valley', got {came!r}; this is no Valley model folder")
    return config


def _check_config(values: dict[str, Any], path: Path) -> None:
    """Without a part's configuration its default would be built, which is a LLaMA of 7 billion random weights."""
    absent = [name for name in ("text_config", "vision_config") if not isinstance(values.get(name), dict)]
    if absent:
        raise CheckpointError(f"{path}: expected a mapping under {' and '.join(absent)}; copy the file again")
    try:
        config: Any = ValleyConfig.from_dict(values)
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises whatever an odd value leads to
        raise CheckpointError(f"{path} cannot be used ({' '.join(str(error).split())}); copy it again") from error
    num_layers = config.vision_config.num_hidden_layers
    if not -num_layers - 1 <= config.vision_layer <= num_layers:
        raise CheckpointError(f"{path}: vision_layer={config.vision_layer} of a tower with {num_layers} layers")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}; give a folder written by save_pretrained")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a mapping, got {type(values).__name__}")
    return values


def _load_strictly(load: Callable[..., Any], folder: Path, **kwargs: Any) -> Any:
    """Call `load`; refuse a missing, extra or odd-shaped weight, naming `folder`."""
    try:
        model, info = load(ignore_mismatched_sizes=True, output_loading_info=True, **kwargs)
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: a weight file is damaged ({error}); copy it again") from error
    problems = [
        *_listed("missing", info["missing_keys"]),
        *_listed("unexpected", info["unexpected_keys"]),
        *_listed("of another shape", [_mismatch(entry) for entry in info["mismatched_keys"]]),
    ]
    if problems:
        raise CheckpointError(f"{folder}: {'; '.join(problems)}; the weight files do not fit config.json")
    return model


def _check_weight_files(folder: Path) -> None:
    index_path = folder / "model.safetensors.index.json"
    if index_path.is_file():
        _shards_of_index(index_path)
    elif not (folder / "model.safetensors").is_file():
        raise CheckpointError(f"{folder} has no model.safetensors; give a folder written by save_pretrained")


def _upstream_files(folder: Path) -> list[Path]:
    index_path = folder / "pytorch_model.bin.index.json"
    if index_path.is_file():
        return _shards_of_index(index_path)
    path = folder / "pytorch_model.bin"
    if not path.is_file():
        raise CheckpointError(f"{folder} has neither {index_path.name} nor {path.name}; copy the weight files too")
    return [path]


def _shards_of_index(index_path: Path) -> list[Path]:
    """Weight files that an index names; raises CheckpointError where one is absent."""
    weight_map = _read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index_path} has no weight_map; copy it again")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index_path}: expected file names in weight_map; copy it again")
    shards = [index_path.parent / name for name in sorted(set(weight_map.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(
            f"{index_path.parent} lacks weight files named by {index_path.name}: {', '.join(missing)}; copy them too"
        )
    return shards


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .bin file, mapped rather than read; nothing but tensors is unpickled."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and is not opened, since that could run code") from error
    except (RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} is no PyTorch weight file or is damaged; copy it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected a mapping of names to tensors")
    return state


def _our_name(name: str) -> str:
    for theirs, ours in UPSTREAM_PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _upstream_config(values: dict[str, Any], folder: Path) -> ValleyConfig:
    """Our configuration from the original's flat one, its tower's and the ids of its added tokens."""
    for switch in ("use_patch_importance_pooling", "use_delta_transformer"):
        if values.get(switch):
            raise CheckpointError(f"{folder / 'config.json'}: {switch} is not supported yet; mean pooling is")
    added = _read_json(folder / "added_tokens.json")
    missing = [token for token in ID_FIELD_OF_TOKEN if token not in added]
    if missing:
        raise CheckpointError(f"{folder / 'added_tokens.json'} lacks {', '.join(missing)}; copy the tokenizer's files")
    known = LlamaConfig().to_dict().keys() - {"model_type", "transformers_version", "architectures", "dtype"}
    return ValleyConfig(
        text_config=LlamaConfig(**{name: value for name, value in values.items() if name in known}),
        vision_config=_tower_config(values["mm_vision_tower"]),
        vision_layer=values.get("mm_vision_select_layer", -2),
        **{field: added[token] for token, field in ID_FIELD_OF_TOKEN.items()},
    )


def _tower_config(name: str) -> PreTrainedConfig:
    """Configuration of the tower that a checkpoint names: a folder under the working directory, else a hub name."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint's vision tower {name!r} is out of reach; put its folder under the working directory"
        ) from error
    return getattr(config, "vision_config", config)


def _listed(what: str, names: Any) -> list[str]:
    ordered = sorted(names)
    if not ordered:
        return []
    more = f" and {len(ordered) - MAX_NAMES} more" if len(ordered) > MAX_NAMES else ""
    return [f"{len(ordered)} weights {what}: {', '.join(ordered[:MAX_NAMES])}{more}"]


def _mismatch(entry: Any) -> str:
    name, came, expected = entry
    return f"{name} (expected {list(expected)}, got {list(came)})"
