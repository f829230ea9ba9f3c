"""Checkpoints, pixels and token ids of the parity set, as its README pairs them."""

import re
from typing import Any

import numpy as np
import torch
from parity_set import ROOT, expand_ids, expand_labels, load_json, require_set

from valley_ray.model import ValleyForConditionalGeneration


def open_variant(name: str, **options: Any) -> ValleyForConditionalGeneration:
    """The checkpoint `name` of the set."""
    model: ValleyForConditionalGeneration = ValleyForConditionalGeneration.from_pretrained(
        ROOT / "checkpoints" / name, **options
    )
    return model


def stored_clips(name: str) -> dict[int, torch.Tensor]:
    """The stored inputs for checkpoint `name` by number of frames: float32 [T, 3, S, S], stored float16.

    One frame is the image, prepared for the tower that the checkpoint names.
    """
    require_set()
    tower = load_json(f"checkpoints/{name}/config.json")["mm_vision_tower"]
    image_key = "chinese_clip_pixel_values" if "chinese" in tower else "clip_pixel_values"
    arrays = [np.load(ROOT / "media_image.npz")[image_key]]
    for path in sorted(ROOT.glob("media_video*.npz")):
        file = np.load(path)
        arrays += [file[key] for key in file.files if re.fullmatch(r"[^_]+_pixel_values", key)]
    return {len(pixels): torch.from_numpy(pixels).float() for pixels in arrays}


def text_case(record_id: str, conv_mode: str = "v1") -> tuple[torch.Tensor, torch.Tensor] | None:
    """Ids and labels int64 [1, L] of a record of text.json at its longest limit; None where the set has no such."""
    cases = [c for c in load_json("text.json")["cases"] if c["id"] == record_id and c["conv_mode"] == conv_mode]
    if not cases:
        return None
    case = max(cases, key=lambda case: case["model_max_length"])
    ids = expand_ids(case["input_ids_rle"])
    labels = expand_labels(ids, case["kept_label_spans"])
    return torch.tensor([ids]), torch.from_numpy(labels)[None]
