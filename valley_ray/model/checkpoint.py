"""Opens model folders strictly: every weight comes from the files, or a CheckpointError names what does not fit.

Layouts: ours (written by save_pretrained), that of the original's released checkpoints (LLaMA's keys with the tower
and projector inside `model.`), the original's LoRA folders (both in one) and adapter folders on a base of either
layout. The map between their keys lives only here.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, LlamaConfig

from valley_ray.errors import CheckpointError
from valley_ray.model.adapter_files import merge_adapter, read_adapter, split_adapter
from valley_ray.model.claims import check_claims
from valley_ray.model.config import ID_FIELD_OF_TOKEN, ValleyConfig
from valley_ray.model.folders import base_folder, read_json
from valley_ray.model.towers import read_tower
from valley_ray.model.weight_files import find_files, listed, read_weights

__all__ = ["base_folder", "load_folder", "our_name", "read_config", "read_model_config", "read_weight", "their_name"]

UPSTREAM_PREFIXES = (
    ("model.vision_tower.vision_model.", "vision_tower."),
    ("model.mm_projector.", "core.mm_projector."),
    ("model.pooling_layer.", "core.pooling.score."),
    ("model.transformer_delta_encoder.", "core.pooling.encoder."),
    ("model.position_matrix", "core.pooling.position_encoding"),
    ("model.", "core.language_model.model."),
    ("lm_head.", "core.language_model.lm_head."),
)
"""Upstream's prefix and ours; the first that fits is taken."""

UPSTREAM_BUFFERS = (".rotary_emb.inv_freq", ".embeddings.position_ids")
"""Buffers in upstream's files that are computed today."""

DEAD_LAYER = "model.transforemr_adding_layer."
"""Upstream's delta encoder runs a deep copy of this layer; the layer itself is never run."""

POOLING_SWITCHES = {"use_patch_importance_pooling": "importance", "use_delta_transformer": "delta"}
"""Upstream's switches in config.json and our names of the poolings; mean where none is on."""

UPSTREAM_VISION_LAYER = -1
"""Where config.json lacks mm_vision_select_layer (valley/model/valley.py); released checkpoints say -2."""


@dataclass(frozen=True)
class _Opened:
    """What a folder says, in our names."""

    config: ValleyConfig
    state: dict[str, torch.Tensor]
    generation_config: GenerationConfig


def load_folder(load: Callable[..., Any], folder: Path, *, allow_bin: bool = True, base: Path | None = None) -> Any:
    """Open `folder` by `load`, transformers' from_pretrained with the caller's options; any layout.

    `allow_bin` off refuses pickled weights. `base` is the folder under an adapter, or the one that has the tokenizer
    of a LoRA folder, where the name in adapter_config.json is out of reach.

    Raises:
        CheckpointError: no such folder or file, a damaged file, or a missing, unexpected or odd-shaped weight.
    """
    if not folder.is_dir():
        raise CheckpointError(f"model folder {folder} does not exist; give a folder written by save_pretrained")
    if base is not None and not (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} is a whole model (it has no adapter_config.json); leave the base {base} out")
    if _is_plain(folder):
        config = _read_our_config(folder)
        files = find_files(folder, {".safetensors": "model"})
        check_claims(config, read_weights(files), folder / "config.json")
        return _load_strictly(partial(load, folder), folder, files, use_safetensors=True)
    opened = _open(folder, allow_bin=allow_bin, base=base)
    check_claims(opened.config, opened.state, folder / "config.json")
    files = find_files(folder) if (folder / "config.json").is_file() else [folder / "adapter_config.json"]
    model = _load_strictly(partial(load, None), folder, files, config=opened.config, state_dict=opened.state)
    model.generation_config = opened.generation_config
    model.config._name_or_path = str(folder)
    return model


def read_model_config(folder: Path) -> ValleyConfig:
    """The configuration of a whole model's folder of either layout; of its weights at most shapes are read.

    Raises:
        CheckpointError: no Valley model's config.json, one that cannot be used, or a tower that cannot be told.
    """
    values = read_config(folder)
    return _upstream_config(values, folder, None) if "mm_vision_tower" in values else _read_our_config(folder)


def read_weight(folder: Path, name: str, *, allow_bin: bool = True) -> torch.Tensor | None:
    """The weight that we call `name` in a whole model's folder of either layout, mapped; None where it is not there.

    Raises:
        CheckpointError: no weight files, damaged ones, or only pickles where `allow_bin` is off.
    """
    state = read_weights(find_files(folder, allow_bin=allow_bin))
    return state.get(name, state.get(their_name(name)))


def our_name(name: str) -> str:
    """Our name of an upstream weight."""
    return _renamed(name, UPSTREAM_PREFIXES)


def their_name(name: str) -> str:
    """Upstream's name of one of our weights."""
    return _renamed(name, [(ours, theirs) for theirs, ours in UPSTREAM_PREFIXES])


def _renamed(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _is_plain(folder: Path) -> bool:
    """Whether the folder is of our layout, without an adapter."""
    if (folder / "adapter_config.json").is_file():
        return False
    return "mm_vision_tower" not in read_config(folder)


def _open(folder: Path, *, allow_bin: bool, base: Path | None) -> _Opened:
    if not (folder / "config.json").is_file():
        return _open_adapter(folder, allow_bin=allow_bin, base=base)
    values = read_config(folder)
    state = read_weights(find_files(folder, allow_bin=allow_bin))
    is_ours = "mm_vision_tower" not in values
    if not is_ours:
        state = {
            our_name(name): tensor
            for name, tensor in state.items()
            if not name.endswith(UPSTREAM_BUFFERS) and not name.startswith(DEAD_LAYER)
        }
    if (folder / "adapter_config.json").is_file():
        state, pairs = split_adapter(state)
        state = merge_adapter(state, read_adapter(folder, pairs or None, allow_bin=allow_bin))
    if is_ours:
        return _Opened(_read_our_config(folder), state, _generation_config(folder))
    ids = {name: values.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return _Opened(_upstream_config(values, folder, base), state, GenerationConfig(**ids))


def _open_adapter(folder: Path, *, allow_bin: bool, base: Path | None) -> _Opened:
    """An adapter folder merged into its base."""
    base = base or base_folder(folder)
    if base is None:
        named = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise CheckpointError(
            f"{folder / 'adapter_config.json'}: the base model {named!r} is out of reach; put its folder under the "
            "working directory or beside the adapter, or give base"
        )
    if not (base / "config.json").is_file():
        raise CheckpointError(f"{base}, the base of {folder}, has no config.json; give a whole model's folder as base")
    opened = _open(base, allow_bin=allow_bin, base=None)
    return replace(opened, state=merge_adapter(opened.state, read_adapter(folder, allow_bin=allow_bin)))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Valley model of either layout."""
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") != "valley":
        came = config.get("model_type")
        raise CheckpointError(f"{path}: expected model_type 'valley', got {came!r}; this is no Valley model folder")
    return config


def _read_our_config(folder: Path) -> ValleyConfig:
    """Without a part's configuration its default would be built, which is a LLaMA of 7 billion random weights."""
    path = folder / "config.json"
    values = read_config(folder)
    absent = [name for name in ("text_config", "vision_config") if not isinstance(values.get(name), dict)]
    if absent:
        raise CheckpointError(f"{path}: expected a mapping under {' and '.join(absent)}; copy the file again")
    try:
        config: Any = ValleyConfig.from_dict(values)
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises whatever an odd value leads to
        raise CheckpointError(f"{path} cannot be used ({' '.join(str(error).split())}); copy it again") from error
    _check_vision_layer(config, path)
    return config  # type: ignore[no-any-return]


def _check_vision_layer(config: Any, path: Path) -> None:
    num_layers = config.vision_config.num_hidden_layers
    if not -num_layers - 1 <= config.vision_layer <= num_layers:
        raise CheckpointError(f"{path}: vision_layer={config.vision_layer} of a tower with {num_layers} layers")


def _generation_config(folder: Path) -> GenerationConfig:
    path = folder / "generation_config.json"
    return GenerationConfig.from_dict(read_json(path)) if path.is_file() else GenerationConfig()


def _load_strictly(load: Callable[..., Any], folder: Path, files: list[Path], **kwargs: Any) -> Any:
    """Call `load`; refuse a missing, extra or odd-shaped weight, naming `folder` and its weight `files`."""
    report = logging.getLogger("transformers.modeling_utils")
    report.addFilter(_is_no_load_report)
    try:
        model, info = load(ignore_mismatched_sizes=True, output_loading_info=True, **kwargs)
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: a weight file is damaged ({error}); copy it again") from error
    except CheckpointError:
        raise
    except (RuntimeError, ArithmeticError, AssertionError, LookupError, ValueError, ImportError) as error:
        # What torch and transformers raise for numbers and names in config.json that no module can be built from.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(f"{folder / 'config.json'} describes no model that can be built ({reason})") from error
    finally:
        report.removeFilter(_is_no_load_report)
    is_ours = "state_dict" not in kwargs
    named = (lambda name: name) if is_ours else their_name
    problems = [
        *listed("missing", map(named, info["missing_keys"])),
        *listed("unexpected", map(named, info["unexpected_keys"])),
        *listed("of another shape", [_mismatch(named(entry[0]), entry) for entry in info["mismatched_keys"]]),
    ]
    if problems:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{folder}: {'; '.join(problems)}; the weight files ({names}) do not fit config.json")
    return model


def _is_no_load_report(record: logging.LogRecord) -> bool:
    """transformers' table of what does not fit, which the error says in one line."""
    return "LOAD REPORT" not in record.getMessage()


def _mismatch(name: str, entry: Any) -> str:
    _, came, expected = entry
    return f"{name} (expected {list(expected)}, got {list(came)})"


def _upstream_config(values: dict[str, Any], folder: Path, base: Path | None) -> ValleyConfig:
    """Our configuration from the original's flat one, its tower's and the ids of its added tokens."""
    path = folder / "config.json"
    poolings = [name for switch, name in POOLING_SWITCHES.items() if values.get(switch)]
    if len(poolings) > 1:
        raise CheckpointError(f"{path}: {' and '.join(POOLING_SWITCHES)} are both true; switch one of them off")
    added = _added_tokens(folder, base)
    known = LlamaConfig().to_dict().keys() | {"rope_theta", "rope_scaling"}
    known -= {"model_type", "transformers_version", "architectures", "dtype", "_name_or_path"}
    try:
        config = ValleyConfig(
            text_config=LlamaConfig(**{name: value for name, value in values.items() if name in known}),
            vision_config=read_tower(folder).config,
            vision_layer=values.get("mm_vision_select_layer", UPSTREAM_VISION_LAYER),
            pooling=poolings[0] if poolings else "mean",
            **{field: added[token] for token, field in ID_FIELD_OF_TOKEN.items()},
        )
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises whatever an odd value leads to
        raise CheckpointError(f"{path} cannot be used ({' '.join(str(error).split())}); copy it again") from error
    _check_vision_layer(config, path)
    return config


def _added_tokens(folder: Path, base: Path | None) -> dict[str, Any]:
    """Ids of the seven added tokens; a LoRA folder as the original writes it has them in its base."""
    path = folder / "added_tokens.json"
    if not path.is_file():
        base = base or base_folder(folder)
        path = base / path.name if base is not None else path
    if not path.is_file():
        raise CheckpointError(f"{folder} has no added_tokens.json; copy the tokenizer's files, or give base")
    added = read_json(path)
    missing = [token for token in ID_FIELD_OF_TOKEN if token not in added]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; copy the tokenizer's files")
    return added
