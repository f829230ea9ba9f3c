"""Weight deltas: a model that may not be shared becomes its difference to a public base, and comes back from both.

The rule is the original's (valley/model/make_delta.py, apply_delta.py), all of it in float16: what the base has is
subtracted, of a grown token table the old rows alone, and what the base lacks is stored whole. Tensor by tensor, so
that memory holds one shard of the output at a time.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from valley_ray.errors import CheckpointError
from valley_ray.model.adapter_files import LANGUAGE_MODEL
from valley_ray.model.checkpoint import DEAD_LAYER, UPSTREAM_BUFFERS, our_name, read_config
from valley_ray.model.folders import find_beside, read_json
from valley_ray.model.weight_files import find_files, listed, read_weights

SHARD_BYTES = 1 << 30
"""Bytes of one output file, and of memory taken."""

TABLES = ("embed_tokens.weight", "lm_head.weight")
"""Ends of the names of the tensors that grow with the vocabulary."""

WEIGHT_SUFFIXES = (".bin", ".safetensors", ".index.json", ".pt", ".pth", ".msgpack", ".h5", ".gguf")
"""Ends of the names of files that are not copied."""

Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make_delta(base: str | Path, target: str | Path, output: str | Path) -> None:
    """Write `target` minus `base` to the folder `output`, which appears complete or not at all.

    `base` is a language model's folder, `target` a Valley folder of either layout; `output` has the layout and the
    tokenizer of `target`, float16 in safetensors.

    Raises:
        CheckpointError: a folder that cannot be read, `base` is not the base of `target`, or `output` exists.
    """
    _write_combined(Path(base), Path(target), Path(output), torch.Tensor.sub_)


def apply_delta(base: str | Path, delta: str | Path, output: str | Path) -> None:
    """Write `base` plus `delta` (of `make_delta` or the original's) to the folder `output`; opens as the target did.

    Raises:
        CheckpointError: as `make_delta`.
    """
    _write_combined(Path(base), Path(delta), Path(output), torch.Tensor.add_)


def _write_combined(base: Path, model: Path, output: Path, combine: Combine) -> None:
    config = read_config(model)
    if (model / "adapter_config.json").is_file():
        raise CheckpointError(f"{model} holds a LoRA adapter; merge it first (`valley-ray merge-lora`)")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists already; give a new folder")
    tensors = _combined(base, model, combine)
    try:
        with _whole_folder(output) as folder:
            _write_shards(tensors, folder)
            _copy_other_files(model, folder)
            _copy_tower_settings(config, model, folder)
            text = json.dumps(_as_float16(config), indent=2, ensure_ascii=False)
            (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write {output} ({reason}); free space, or name another folder") from error


@contextmanager
def _whole_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name when all is written, and vanishes otherwise."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield unfinished
        # mkdtemp keeps others out; a model folder is as open as the folder that it lies in.
        unfinished.chmod(output.parent.stat().st_mode & 0o777)
        unfinished.replace(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _combined(base: Path, model: Path, combine: Combine) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and float16 tensors of the output; what does not fit is raised at once, before the first of them."""
    state = {
        name: tensor for name, tensor in read_weights(find_files(model)).items() if not name.endswith(UPSTREAM_BUFFERS)
    }
    base_state = _base_weights(base, has_head="lm_head.weight" in map(_key, state))
    _check_fit(base, base_state, model, state)
    return ((name, _combine(tensor, base_state.get(_key(name)), combine, name)) for name, tensor in state.items())


def _key(name: str) -> str:
    """Name by which a tensor of any layout is found in the base."""
    return our_name(name).removeprefix(LANGUAGE_MODEL)


def _base_weights(base: Path, *, has_head: bool) -> dict[str, torch.Tensor]:
    """Tensors of the base by key; where the model `has_head`, a head that is tied to the input table is that table."""
    config = read_json(base / "config.json")
    state = {
        _key(name): tensor
        for name, tensor in read_weights(find_files(base)).items()
        if not name.endswith(UPSTREAM_BUFFERS)
    }
    is_tied = config.get("tie_word_embeddings") and "lm_head.weight" not in state
    if has_head and is_tied and "model.embed_tokens.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def _check_fit(base: Path, base_state: dict[str, torch.Tensor], model: Path, state: dict[str, torch.Tensor]) -> None:
    by_key = {_key(name): name for name in state}
    is_language = {
        name for name in state if our_name(name).startswith(LANGUAGE_MODEL) and not name.startswith(DEAD_LAYER)
    }
    problems = [
        *listed(f"missing in {base}", (name for name in is_language if _key(name) not in base_state)),
        *listed(f"missing in {model}", base_state.keys() - by_key.keys()),
        *listed(
            "of another shape",
            (
                f"{name} ({list(state[name].shape)} in {_file_of(model, name)}, {list(tensor.shape)} in {base})"
                for key, tensor in base_state.items()
                if (name := by_key.get(key)) is not None and not _fits(name, tensor.shape, state[name].shape)
            ),
        ),
    ]
    if problems:
        raise CheckpointError(f"{base} is not the base of {model}: {'; '.join(problems)}")


def _file_of(folder: Path, name: str) -> Path:
    return next(file for file in find_files(folder) if name in read_weights([file]))


def _fits(name: str, base: torch.Size, grown: torch.Size) -> bool:
    return base == grown or (name.endswith(TABLES) and base[1:] == grown[1:] and base[0] <= grown[0])


def _combine(tensor: torch.Tensor, base: torch.Tensor | None, combine: Combine, name: str) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor.clone()
    result = tensor.to(torch.float16, copy=True)
    if base is not None:
        combine(result[: len(base)] if base.dim() else result, base.to(torch.float16))
    if not result.isfinite().all():
        raise CheckpointError(f"{name} holds numbers that float16 cannot; deltas are in float16, as the original's are")
    return result


def _write_shards(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Write safetensors files of about `SHARD_BYTES`, and an index where there is more than one."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = size = 0
    for name, tensor in tensors:
        if pending and size + tensor.nbytes > SHARD_BYTES:
            _flush(pending, folder, shards)
            size = 0
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    _flush(pending, folder, shards)
    if len(shards) == 1:
        (folder / _shard_name(1)).rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / _shard_name(number)).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _flush(pending: dict[str, torch.Tensor], folder: Path, shards: list[list[str]]) -> None:
    shards.append(list(pending))
    save_file(pending, folder / _shard_name(len(shards)), metadata={"format": "pt"})
    pending.clear()


def _shard_name(number: int) -> str:
    return f"shard-{number}.safetensors"


def _copy_other_files(source: Path, folder: Path) -> None:
    """Tokenizer, processor, generation config and what else lies beside the weights."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(path, folder / path.name)


def _copy_tower_settings(config: dict[str, Any], source: Path, folder: Path) -> None:
    """A tower that stands beside `source` is not beside the output: its two JSON files go along, under its name."""
    name = config.get("mm_vision_tower")
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        return
    tower = find_beside(name, source)
    for path in (tower / "config.json", tower / "preprocessor_config.json") if tower is not None else ():
        if path.is_file():
            (folder / name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name / path.name)


def _as_float16(config: dict[str, Any]) -> dict[str, Any]:
    """config.json's data type is what `dtype="auto"` opens a folder as."""
    name = "dtype" if "text_config" in config else "torch_dtype"
    parts = {
        key: part | {"dtype": "float16"}
        for key, part in config.items()
        if isinstance(part, dict) and key in ("text_config", "vision_config")
    }
    return config | {name: "float16"} | parts
