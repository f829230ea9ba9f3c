"""Samples → one micro-batch, padded or packed. Knows no plan, no ranks and no files.

Legend: B samples, L tokens of the longest one, T frames, S crop side, P patches, Dv tower width.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from valley_ray.data.shards import Sample

IGNORED = -100
"""Label of positions without a loss."""
TORCH_VARLEN = "torch_varlen"
"""Name of torch's own flash kernels for samples of any length; see attention.py."""


@dataclass(frozen=True, eq=False)
class Clip:
    """One visual block, as pixels or as features that were computed before."""

    key: Hashable
    """Names the clip within the store."""
    pixel_values: torch.Tensor | None
    """float32 [T, 3, S, S]"""
    features: torch.Tensor | None = None
    """[T, 1+P, Dv], for mean pooling also its rows [P+T, Dv]"""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one forward pass takes. One without samples has weight zero: it only keeps a rank in step."""

    input_ids: torch.Tensor
    """int64 [B, L]"""
    attention_mask: torch.Tensor
    """int64 [B, L]"""
    labels: torch.Tensor
    """int64 [B, L], -100 where no loss is taken"""
    clips: tuple[Clip, ...]
    """Visual blocks in order over the batch."""
    sample_ids: tuple[str, ...]
    position_ids: torch.Tensor | None = None
    """int64 [B, L] where rows are packed: each sample counts from 0; None in padded batches"""
    segment_ids: torch.Tensor | None = None
    """int64 [B, L] where rows are packed: 1, 2, ... per sample of a row, 0 for padding; None in padded batches"""

    def model_inputs(self, device: torch.device, *, attention: str) -> dict[str, Any]:
        """What `ValleyCore.forward` takes beside the features, on `device`.

        Args:
            attention: the language model's implementation (`config._attn_implementation`). Packed rows need a mask
                of four dimensions, since position_ids alone let samples see each other; flash attention takes no
                mask and is told where the samples begin.
        """
        inputs = {"input_ids": self.input_ids.to(device), "labels": self.labels.to(device)}
        if self.position_ids is None or self.segment_ids is None:
            return inputs | {"attention_mask": self.attention_mask.to(device)}
        inputs["position_ids"] = self.position_ids.to(device)
        if "flash" in attention or attention == TORCH_VARLEN:
            return inputs | _variable_lengths(self.segment_ids, device)
        inputs["attention_mask"] = packed_mask(self.segment_ids.to(device), attention=attention)
        return inputs


def packed_mask(segment_ids: torch.Tensor, *, attention: str) -> torch.Tensor:
    """Causal mask [B, 1, L, L] that keeps the samples of packed rows apart.

    True where a position may look; for `attention="eager"`, which adds its mask, float32 0 and the lowest number.
    Padding looks at itself alone: a softmax over nothing would be nan.
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    mask = (same & (segment_ids != 0)[:, :, None]).tril()
    mask |= torch.eye(segment_ids.shape[1], dtype=torch.bool, device=segment_ids.device)
    if attention != "eager":
        return mask[:, None]
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, lowest)[:, None]


def _variable_lengths(segment_ids: torch.Tensor, device: torch.device) -> dict[str, Any]:
    """Where the samples of one row [1, L] begin, as transformers' flash attention takes it: looked for in every layer
    otherwise, each time waiting for the GPU."""
    assert len(segment_ids) == 1, "flash attention takes packed samples as one row"
    lengths = torch.unique_consecutive(segment_ids[0], return_counts=True)[1]
    starts = F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    longest = int(lengths.max())
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def collate(samples: Sequence[Sample], clips: Sequence[Clip], *, pad_token_id: int) -> MicroBatch:
    """Pad `samples` on the right to the longest. No samples give the zero-weight batch: two tokens without a label."""
    length = max((len(sample.input_ids) for sample in samples), default=2)
    shape = (max(1, len(samples)), length)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    if not samples:
        attention_mask.fill_(1)
    for row, sample in enumerate(samples):
        count = len(sample.input_ids)
        input_ids[row, :count] = torch.from_numpy(sample.input_ids)
        labels[row, :count] = torch.from_numpy(sample.labels)
        attention_mask[row, :count] = 1
    return MicroBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        clips=tuple(clips),
        sample_ids=tuple(sample.sample_id for sample in samples),
    )


def collate_packed(samples: Sequence[Sample], clips: Sequence[Clip]) -> MicroBatch:
    """`samples` one behind the other in one row, without padding; `packed_mask` keeps them apart."""
    lengths = torch.tensor([len(sample.input_ids) for sample in samples])
    starts = lengths.cumsum(0) - lengths
    labels = torch.from_numpy(np.concatenate([sample.labels for sample in samples]))
    # As in a padded row, nothing comes before a first token that it could be predicted from.
    labels[starts] = IGNORED
    input_ids = torch.from_numpy(np.concatenate([sample.input_ids for sample in samples]))
    segment_ids = torch.repeat_interleave(torch.arange(1, len(samples) + 1), lengths)
    return MicroBatch(
        input_ids=input_ids[None],
        attention_mask=torch.ones_like(input_ids)[None],
        labels=labels[None],
        clips=tuple(clips),
        sample_ids=tuple(sample.sample_id for sample in samples),
        position_ids=(torch.arange(len(input_ids)) - starts[segment_ids - 1])[None],
        segment_ids=segment_ids[None],
    )


def make_clip(
    key: Hashable,
    frames: NDArray[np.uint8],
    *,
    pixel_values: Callable[[NDArray[np.uint8]], torch.Tensor],
    features: torch.Tensor | None,
) -> Clip:
    """A clip from its features if they are at hand, else from frames uint8 [T, S, S, 3], normalised."""
    return Clip(key=key, pixel_values=None if features is not None else pixel_values(frames), features=features)
