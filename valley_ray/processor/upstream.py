"""The processor that a model folder of upstream's released layout never wrote down: pixels and prompts as upstream's.

Such a folder names its vision tower, whose preprocessor_config.json says how images are prepared; videos, prompt and
stop string are fixed in upstream's code. Model rooms are imported where they are used: this must load no torch before.
"""

import json
from pathlib import Path
from typing import Any, Literal

from valley_ray.chat.templates import SYSTEM_PROMPT_CHINESE, SYSTEM_PROMPT_V1
from valley_ray.config import validate_config
from valley_ray.errors import CheckpointError
from valley_ray.media.preprocess import Crop
from valley_ray.processor.config import ProcessorConfig

_ADAPTER_FILE = "adapter_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
DEFAULT_MAX_LENGTH = 2048
"""Tokens that a language model takes which does not say: upstream's limit."""

_VIDEO_CROP_SIDE, _VIDEO_SHORT_SIDE = 224, 256
"""valley/util/data_util.py, load_video; both grow with the side that another tower takes."""
_RESAMPLE_OF_NUMBER: dict[Any, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers, as preprocessor_config.json has them."""


def is_upstream_folder(folder: Path) -> bool:
    """Whether `folder` has upstream's layout: a config.json that names a tower, or a bare adapter."""
    if not (folder / "config.json").is_file():
        return (folder / _ADAPTER_FILE).is_file()
    return "mm_vision_tower" in _read_values(folder / "config.json")


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of a model folder lies: there, or in the base that a LoRA folder names.

    Raises CheckpointError where a LoRA folder has none and its base is out of reach.
    """
    from valley_ray.model.folders import base_folder

    seen: set[Path] = set()
    found: Path | None = folder
    while found is not None and found.resolve() not in seen:
        if any((found / name).is_file() for name in _TOKENIZER_FILES) or not (found / _ADAPTER_FILE).is_file():
            return found
        seen.add(found.resolve())
        found = base_folder(found)
    raise CheckpointError(
        f"{folder} has no tokenizer, and the base that its {_ADAPTER_FILE} names is out of reach; "
        f"copy {' or '.join(_TOKENIZER_FILES)} of the base into it"
    )


def adapter_base(folder: Path) -> Path | None:
    """The base of a bare adapter folder, where that is of our layout and so knows its processor itself."""
    if (folder / "config.json").is_file():
        return None
    from valley_ray.model.folders import base_folder

    base = base_folder(folder)
    return base if base is not None and (base / "processor_config.json").is_file() else None


def upstream_processor_config(folder: Path) -> ProcessorConfig:
    """How upstream prepared media and wrote conversations when it trained the model of this folder.

    Raises CheckpointError where its vision tower or the tower's image settings cannot be used.
    """
    from valley_ray.model.towers import CHINESE, read_tower

    tower = read_tower(folder)
    config: Any = tower.config
    side = int(config.image_size)
    own = tower_processor_config(
        tower.name,
        side=side,
        num_patches=(side // int(config.patch_size)) ** 2,
        settings=tower.preprocessor,
        is_chinese=CHINESE in tower.name,
        max_length=_max_length(folder),
    )
    # The form of their training; `valley` would put end tokens behind earlier answers, which these weights never saw.
    return own.model_copy(update={"prompt_style": "upstream-train"})


def tower_processor_config(
    name: str, *, side: int, num_patches: int, settings: dict[str, Any] | None, is_chinese: bool, max_length: int
) -> ProcessorConfig:
    """How media are prepared for the tower `name`: videos as upstream does, images as its own image processor.

    Args:
        side: of the square that the tower takes, pixels.
        settings: the tower's preprocessor_config.json; None: CLIP's, or ChineseCLIP's where `is_chinese`.

    Raises:
        CheckpointError: the settings are of a kind that no crop of ours reproduces.
    """
    settings = settings or {}
    values: dict[str, Any] = {key: settings[key] for key in ("image_mean", "image_std") if key in settings}
    values |= {
        "num_patches": num_patches,
        "video_crop": Crop(size=side, short_side=round(_VIDEO_SHORT_SIDE * side / _VIDEO_CROP_SIDE)),
        "image_crop": _image_crop(settings, side=side, stretches=is_chinese, name=name),
        "system_prompt": SYSTEM_PROMPT_CHINESE if is_chinese else SYSTEM_PROMPT_V1,
        "max_length": max_length,
    }
    return validate_config(ProcessorConfig, values, source=f"{name}: preprocessor_config.json")


def _image_crop(settings: dict[str, Any], *, side: int, stretches: bool, name: str) -> Crop:
    """A Hugging Face image processor's settings as a crop; without any, what CLIP's or ChineseCLIP's do."""
    square = {"height": side, "width": side}
    size = settings.get("size", square if stretches else side)
    if isinstance(size, int):
        size = square if stretches else {"shortest_edge": size}
    cut = settings.get("crop_size", side)
    cut = {"height": cut, "width": cut} if isinstance(cut, int) else cut
    resample = _RESAMPLE_OF_NUMBER.get(settings.get("resample", 3))
    does_cut = settings.get("do_center_crop", not stretches)
    if resample is not None and size == square and (not does_cut or cut == square):
        return Crop(size=side, fit="stretch", resample=resample)
    if resample is not None and set(size) == {"shortest_edge"} and does_cut and cut == square:
        return Crop(size=side, short_side=size["shortest_edge"], resample=resample, corner="floored")
    raise CheckpointError(
        f"the preprocessor_config.json of {name} has {size=}, crop_size={cut}, do_center_crop={does_cut} and "
        f"resample={settings.get('resample')}; expected a resize to {side} and a square of {side} by bilinear or "
        "bicubic, which is what the tower takes"
    )


def _max_length(folder: Path) -> int:
    """The shorter of what the tokenizer and the language model say."""
    where = tokenizer_folder(folder)
    said = []
    for path, key in (
        (where / "tokenizer_config.json", "model_max_length"),
        (folder / "config.json", "max_position_embeddings"),
        (where / "config.json", "max_position_embeddings"),
    ):
        if path.is_file() and isinstance(value := _read_values(path).get(key), int | float) and value >= 1:
            said.append(int(value))
    return min(said, default=DEFAULT_MAX_LENGTH)


def _read_values(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a mapping, got {type(values).__name__}")
    return values
