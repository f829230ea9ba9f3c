"""Inputs of the recorded forward passes, for tests that run another folder on them (merged, restored, converted)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from parity_model import stored_clips
from parity_set import ROOT, load_json

from valley_ray.model import ValleyForConditionalGeneration


@dataclass(frozen=True)
class ForwardInput:
    """Ids, mask and labels int64 [B, L], the rows' lengths, and a clip for every row as the original was given them."""

    input_ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    lengths: list[int]
    clips: list[torch.Tensor]

    @torch.no_grad()
    def run(self, model: ValleyForConditionalGeneration) -> Any:
        """Output of a model opened with the original's splice."""
        return model(self.input_ids, self.mask, pixel_values=self.clips, labels=self.labels)


def forward_inputs(variant: str) -> Iterator[ForwardInput]:
    """Inputs of the cases of checkpoint `variant` that list an image for every row."""
    path = ROOT / f"forward_{variant}.npz"
    cases = load_json("forward.json").get(variant, {"cases": {}})["cases"] if path.is_file() else {}
    patch_token = load_json(f"checkpoints/{variant}/added_tokens.json")["<im_patch>"] if cases else None
    for name, record in cases.items():
        shapes, lengths = record.get("images"), record.get("lengths")
        if not isinstance(shapes, list) or len(shapes) != len(lengths):
            continue
        arrays, clips = np.load(path), stored_clips(variant)
        ids = torch.from_numpy(arrays[f"{name}.input_ids"]).long()
        is_text = ~(ids == patch_token).any(dim=1)
        labels = torch.from_numpy(arrays[f"{name}.labels"]).long()
        mask = (torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]).long()
        frames = [
            torch.zeros(shape) if text else clips.get(shape[0]) for shape, text in zip(shapes, is_text, strict=True)
        ]
        if any(clip is None for clip in frames):
            continue
        yield ForwardInput(ids, mask, labels, lengths, frames)
