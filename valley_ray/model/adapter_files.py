"""LoRA adapters on disk, in peft's layout: read, checked against their configuration, merged into weights.

Knows no module. Names of adapted layers are relative to the language model (`model.layers.0.mlp.up_proj`).
D_in, D_out: a layer's widths; r: the rank.
"""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from valley_ray.errors import CheckpointError
from valley_ray.model.folders import read_json
from valley_ray.model.weight_files import ADAPTER_STEMS, find_files, listed, read_weights

logger = logging.getLogger(__name__)

LANGUAGE_MODEL = "core.language_model."
"""In front of the language model's weights in our names."""

EXTRAS = "non_lora_trainables.safetensors"
"""File of what is trained beside the adapter; names are relative to the core."""

BASE_LAYER = ".base_layer."
"""What peft since 0.6 puts into the name of a weight under an adapter."""

MAGNITUDE = "magnitude_vector"
"""DoRA's part of a pair."""

Pairs = dict[str, dict[str, torch.Tensor]]
"""`{"A": [r, D_in], "B": [D_out, r]}` by the name of the layer, and with DoRA `"magnitude_vector": [D_out]`."""

_PART = re.compile(
    r"^(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?:(?P<part>[AB])(?:\.default)?\.weight"
    rf"|(?P<{MAGNITUDE}>{MAGNITUDE})(?:\.default)?(?:\.weight)?)$"
)

_UNSUPPORTED = ("fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias")


@dataclass(frozen=True)
class Adapter:
    """A checked adapter."""

    folder: Path
    config: dict[str, Any]
    """adapter_config.json."""
    pairs: Pairs
    extras: dict[str, torch.Tensor]
    """Weights trained beside it, by their names in the core."""

    @property
    def scaling(self) -> float:
        """Factor of B A in the merged weight."""
        rank = int(self.config["r"])
        return float(self.config["lora_alpha"]) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def split_adapter(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Pairs]:
    """The weights of `state` that are no LoRA matrices, and the matrices; names as before peft put its layers in."""
    rest = {}
    pairs: Pairs = {}
    for name, tensor in state.items():
        match = _PART.match(name.removeprefix(LANGUAGE_MODEL))
        if match is None:
            rest[name.replace(BASE_LAYER, ".")] = tensor
        else:
            pairs.setdefault(match["layer"], {})[match["part"] or MAGNITUDE] = tensor
    return rest, pairs


def read_adapter(folder: Path, pairs: Pairs | None = None, *, allow_bin: bool = True) -> Adapter:
    """The adapter of `folder`; `pairs` are its matrices where they stand among a model's weights already.

    Raises:
        CheckpointError: no adapter, a kind of it that is not supported, or matrices that are not of its rank.
    """
    path = folder / "adapter_config.json"
    config = read_json(path)
    _check_config(config, path)
    source = folder
    if pairs is None:
        files = find_files(folder, ADAPTER_STEMS, allow_bin=allow_bin)
        source = files[0]
        others, pairs = split_adapter(read_weights(files))
        if others:
            raise CheckpointError(f"{source}: {listed('unexpected', others)[0]}; expected LoRA matrices alone")
    _check_pairs(pairs, int(config["r"]), source, has_magnitudes=bool(config.get("use_dora")))
    extras = read_weights([folder / EXTRAS]) if (folder / EXTRAS).is_file() else {}
    return Adapter(folder, config, pairs, extras)


def merge_adapter(state: dict[str, torch.Tensor], adapter: Adapter) -> dict[str, torch.Tensor]:
    """`state` (a whole model, our names) with `adapter` merged into the weights and its extras put in.

    Raises:
        CheckpointError: the adapter is not one of this model.
    """
    shapes = {
        name.removeprefix(LANGUAGE_MODEL).removesuffix(".weight"): tensor.shape
        for name, tensor in state.items()
        if name.startswith(LANGUAGE_MODEL) and name.endswith(".weight") and tensor.dim() == 2
    }
    check_fit(adapter, shapes)
    merged = dict(state)
    for layer, pair in adapter.pairs.items():
        weight = state[f"{LANGUAGE_MODEL}{layer}.weight"]
        whole = weight.float() + adapter.scaling * (pair["B"].float() @ pair["A"].float())
        if MAGNITUDE in pair:
            whole *= (pair[MAGNITUDE].float() / whole.norm(dim=1))[:, None]
        merged[f"{LANGUAGE_MODEL}{layer}.weight"] = whole.to(weight.dtype)
    if not adapter.extras and not (adapter.folder / "config.json").is_file():
        logger.warning("%s has no %s: projector and token table are those of its base", adapter.folder, EXTRAS)
    return merged | {f"core.{name}": tensor for name, tensor in adapter.extras.items()}


def check_fit(adapter: Adapter, shapes: dict[str, torch.Size]) -> None:
    """Raise CheckpointError unless `adapter` has a pair of fitting matrices for each layer that it names.

    `shapes` are [D_out, D_in] of the language model's layers by name.
    """
    named = {layer for layer in shapes if _is_target(layer, adapter.config["target_modules"])}
    problems = [
        *listed("missing", (f"{layer}.lora_A" for layer in named - adapter.pairs.keys())),
        *listed("unexpected", (f"{layer}.lora_A" for layer in adapter.pairs.keys() - shapes.keys())),
        *listed("of another shape", _odd_shapes(adapter.pairs, shapes)),
    ]
    if problems:
        raise CheckpointError(f"{adapter.folder}: {'; '.join(problems)}; the adapter does not fit its base model")


def check_extras(folder: Path, extras: Mapping[str, torch.Tensor], known: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError unless each of `extras` is a weight of the core, whose parameters are `known`."""
    for name, tensor in extras.items():
        if name not in known or tensor.shape != known[name].shape:
            expected = list(known[name].shape) if name in known else "no such weight"
            raise CheckpointError(
                f"{folder / EXTRAS}: {name} has shape {list(tensor.shape)}, the model has {expected}; "
                "the adapter is of another base model"
            )


def _odd_shapes(pairs: Pairs, shapes: dict[str, torch.Size]) -> Iterable[str]:
    for layer in pairs.keys() & shapes.keys():
        expected = {"A": shapes[layer][1], "B": shapes[layer][0]}
        came = {"A": pairs[layer]["A"].shape[1], "B": pairs[layer]["B"].shape[0]}
        for part in "AB":
            if came[part] != expected[part]:
                yield f"{layer}.lora_{part} (expected width {expected[part]}, got {came[part]})"
        if MAGNITUDE in pairs[layer] and len(pairs[layer][MAGNITUDE]) != expected["B"]:
            yield f"{layer}.lora_{MAGNITUDE} (expected width {expected['B']}, got {len(pairs[layer][MAGNITUDE])})"


def _is_target(layer: str, targets: str | list[str]) -> bool:
    """peft's rule: a pattern for the whole name, or names that are it or its last parts."""
    if isinstance(targets, str):
        return re.fullmatch(targets, layer) is not None
    return any(layer == target or layer.endswith(f".{target}") for target in targets)


def _check_config(config: dict[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: expected peft_type 'LORA', got {config.get('peft_type')!r}")
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise CheckpointError(f"{path}: {', '.join(used)} is not supported; merge the adapter with peft first")
    numbers = {name: config.get(name) for name in ("r", "lora_alpha")}
    if not all(isinstance(value, int | float) and value > 0 for value in numbers.values()):
        raise CheckpointError(f"{path}: expected numbers above 0 under r and lora_alpha, got {numbers}")
    targets = config.get("target_modules")
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise CheckpointError(f"{path}: expected names of layers under target_modules, got {targets!r}")


def _check_pairs(pairs: Pairs, rank: int, source: Path, *, has_magnitudes: bool) -> None:
    if not pairs:
        raise CheckpointError(f"{source} holds no LoRA matrices; copy the adapter's weights too")
    expected = ("A", "B", MAGNITUDE) if has_magnitudes else ("A", "B")
    halves = [f"{layer}.lora_{part}" for layer, pair in pairs.items() for part in expected if part not in pair]
    if halves:
        raise CheckpointError(f"{source}: {listed('missing', halves)[0]}; copy the file again")
    for layer, pair in pairs.items():
        for part, came in (("A", pair["A"].shape[0]), ("B", pair["B"].shape[1])):
            if came != rank:
                raise CheckpointError(
                    f"{source}: {layer}.lora_{part}.weight has rank {came}, adapter_config.json says r={rank}"
                )
