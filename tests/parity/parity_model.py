"""Checkpoints, pixels and token ids of the parity set, as its README pairs them."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from parity_set import ROOT, expand_ids, expand_labels, load_json, require_set

from valley_ray.model import ValleyForConditionalGeneration


def open_variant(name: str, **options: Any) -> ValleyForConditionalGeneration:
    """The checkpoint `name` of the set."""
    model: ValleyForConditionalGeneration = ValleyForConditionalGeneration.from_pretrained(
        ROOT / "checkpoints" / name, **options
    )
    return model


def has_variant(name: str) -> bool:
    """Whether the set has the checkpoint `name`."""
    return (ROOT / "checkpoints" / name / "config.json").is_file()


def load_arrays(name: str) -> Any:
    """An npz file of the set; skips the test where the set or the file is absent."""
    require_set()
    if not (ROOT / name).is_file():
        pytest.skip(f"{ROOT / name} is absent; set VALLEY_PARITY to a parity set")
    return np.load(ROOT / name)


def stored_clips(name: str, *, by_rate: bool = False) -> dict[int, torch.Tensor]:
    """The stored inputs for checkpoint `name` by number of frames: float32 [T, 3, S, S], stored float16.

    One frame is the image, prepared for the tower that the checkpoint names. Of two videos of equal length the one
    sampled by a fixed count is taken, or with `by_rate` the one sampled by a rate.
    """
    tower = load_json(f"checkpoints/{name}/config.json")["mm_vision_tower"]
    arrays = [
        load_arrays("media_image.npz")["chinese_clip_pixel_values" if "chinese" in tower else "clip_pixel_values"]
    ]
    for path in sorted(ROOT.glob("media_video*.npz"), key=lambda path: ("fps" in path.name) != by_rate):
        file = np.load(path)
        arrays += [file[key] for key in file.files if re.fullmatch(r"[^_]+_pixel_values", key)]
    return {len(pixels): torch.from_numpy(pixels).float() for pixels in reversed(arrays)}


def text_case(record_id: str, conv_mode: str = "v1") -> tuple[torch.Tensor, torch.Tensor] | None:
    """Ids and labels int64 [1, L] of a record of text.json at its longest limit; None where the set has no such."""
    cases = [c for c in load_json("text.json")["cases"] if c["id"] == record_id and c["conv_mode"] == conv_mode]
    if not cases:
        return None
    case = max(cases, key=lambda case: case["model_max_length"])
    ids = expand_ids(case["input_ids_rle"])
    labels = expand_labels(ids, case["kept_label_spans"])
    return torch.tensor([ids]), torch.from_numpy(labels)[None]
