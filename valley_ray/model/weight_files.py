"""Weight files of a folder: which there are, and their tensors, mapped rather than read.

Files are `<stem>.safetensors` or `<stem>.bin` (pickled by PyTorch), single or in shards with an index. Nothing but
tensors is ever unpickled. Knows no model.
"""

import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from valley_ray.errors import CheckpointError
from valley_ray.model.folders import read_json

MAX_NAMES = 5
"""Weight names listed in an error before the rest is only counted."""

STEMS = {".safetensors": "model", ".bin": "pytorch_model"}
"""Stem of a whole model's weight files by suffix, in the order in which they are looked for."""

ADAPTER_STEMS = {".safetensors": "adapter_model", ".bin": "adapter_model"}
"""The same for the files of an adapter."""


WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Number formats that are cast to one another without a change of meaning."""


def find_files(folder: Path, stems: dict[str, str] = STEMS, *, allow_bin: bool = True) -> list[Path]:
    """Weight files of `folder`, safetensors before pickles.

    Raises:
        CheckpointError: there are none, a shard of the index is absent, or only pickles where `allow_bin` is off.
    """
    for suffix, stem in stems.items():
        path = folder / f"{stem}{suffix}"
        index_path = folder / f"{stem}{suffix}.index.json"
        if not index_path.is_file() and not path.is_file():
            continue
        if suffix == ".bin" and not allow_bin:
            raise CheckpointError(
                f"{folder} holds pickled weights ({path.name}), which are not allowed here; "
                "write it as safetensors with `valley-ray convert`, or set allow_bin to true"
            )
        return _shards_of_index(index_path) if index_path.is_file() else [path]
    names = " and no ".join(f"{stem}{suffix}" for suffix, stem in stems.items())
    raise CheckpointError(f"{folder} has no {names}, single or in shards; copy the weight files too")


def read_weights(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Tensors of several files by name, backed by the files: memory is taken only for what is copied or written.

    Raises:
        CheckpointError: a damaged file, a pickle that holds more than tensors, a weight in two files, or one whose
            numbers no model computes with.
    """
    state: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            read = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror or error})") from error
        if twice := listed("in an earlier file too", read.keys() & state.keys()):
            raise CheckpointError(f"{file}: {twice[0]}; copy the weight files of one model alone")
        _check_numbers(file, read)
        state |= read
    return state


def listed(what: str, names: Iterable[str]) -> list[str]:
    """`["2 weights missing: a, b"]`, at most `MAX_NAMES` of them; nothing where there are no names."""
    ordered = sorted(names)
    if not ordered:
        return []
    more = f" and {len(ordered) - MAX_NAMES} more" if len(ordered) > MAX_NAMES else ""
    return [f"{len(ordered)} weights {what}: {', '.join(ordered[:MAX_NAMES])}{more}"]


def _check_numbers(file: Path, state: dict[str, torch.Tensor]) -> None:
    """Raise for quantised and other odd tensors, which would be cast to something that was never trained."""
    odd = (
        f"{name} ({tensor.dtype})"
        for name, tensor in state.items()
        if name.endswith((".weight", ".bias")) and tensor.dtype not in WEIGHT_DTYPES
    )
    if problem := listed("of another number format", odd):
        raise CheckpointError(f"{file}: {problem[0]}; expected float16, bfloat16, float32 or float64, not quantised")


def _shards_of_index(index_path: Path) -> list[Path]:
    """Weight files that an index names; raises CheckpointError where one is absent or outside the folder."""
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no weight_map; copy it again")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index_path}: expected file names in weight_map; copy it again")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if name != Path(name).name]
    if outside:
        raise CheckpointError(f"{index_path}: weight_map names {outside[0]!r}, which is no file of this folder")
    missing = [name for name in names if not (index_path.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index_path.parent} lacks weight files named by {index_path.name}: {', '.join(missing)}; copy them too"
        )
    return [index_path.parent / name for name in names]


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy it again") from error


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"  # files of torch before 1.6 are none and cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors or is damaged; it is not opened, since a pickle can run code"
        ) from error
    except Exception as error:  # damaged bytes are unpickled to whatever they lead to
        raise CheckpointError(f"{path} is no PyTorch weight file or is damaged; copy it again") from error
    if not isinstance(state, dict) or not all(_is_plain_tensor(*item) for item in state.items()):
        raise CheckpointError(f"{path}: expected a mapping of names to dense tensors with data")
    return state


def _is_plain_tensor(name: object, value: object) -> bool:
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        return False
    return value.layout == torch.strided and not value.is_meta and not value.is_quantized
