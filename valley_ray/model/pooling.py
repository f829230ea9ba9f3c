"""Pooling over time: the features of T frames become P patch tokens, beside T frame tokens.

Each pooling is two steps around the projector, so that one projector call serves all clips of a batch and linear
poolings project after the mean (T times fewer rows). The second step sees all clips of a batch too: weights of its own
are called once per batch, which keeps the ranks of a ZeRO-3 run in step whatever their clips.
C clips, T frames, P patches, Dv tower width, D language width, R rows to project.
"""

from collections.abc import Sequence

import torch
from torch import nn

from valley_ray.errors import CheckpointError, SamplingError
from valley_ray.model.config import ValleyConfig

NUM_POSITIONS = 2048
"""Longest clip, in frames, that delta pooling has a position for (upstream's table)."""

NUM_HEADS = 8
"""Attention heads of delta pooling's encoder, whatever the width (upstream's layer)."""


class Pooling(nn.Module):
    """What the model asks of a pooling. The base class is the one without a shortcut: it projects everything."""

    def rows(self, features: torch.Tensor) -> torch.Tensor:
        """[T, 1 + P, Dv] → [R, Dv]: the rows to project, here all T * (1 + P)."""
        return features.flatten(0, 1)

    def kept(self, features: torch.Tensor) -> torch.Tensor:
        """[T, 1 + P, Dv] → as little as `rows` can go on from; here all."""
        return features

    def tokens(self, projected: Sequence[torch.Tensor], num_frames: Sequence[int]) -> list[torch.Tensor]:
        """[R, D] of each clip → [P + T, D] of each clip: patch tokens, then frame tokens."""
        clips = [part.unflatten(0, (count, -1)) for part, count in zip(projected, num_frames, strict=True)]
        pooled = self.pool([clip[:, 1:] for clip in clips])
        return [torch.cat([patches, clip[:, 0]]) for patches, clip in zip(pooled, clips, strict=True)]

    def pool(self, clips: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Projected patches [T, P, D] of each clip → [P, D] of each clip."""
        raise NotImplementedError


class MeanPooling(Pooling):
    """Patch tokens are the mean over time (Valley v1); the projector is linear, so the mean is taken before it."""

    def rows(self, features: torch.Tensor) -> torch.Tensor:
        """[T, 1 + P, Dv] → [P + T, Dv]; rows of an earlier call, as a feature store keeps them, stay as they are."""
        if features.ndim == 2:
            return features
        return torch.cat([features[:, 1:].mean(dim=0), features[:, 0]])

    def kept(self, features: torch.Tensor) -> torch.Tensor:
        """The rows: nothing in them is trained."""
        return self.rows(features)

    def tokens(self, projected: Sequence[torch.Tensor], num_frames: Sequence[int]) -> list[torch.Tensor]:
        """Already [P + T, D]."""
        return list(projected)


class MaxPooling(Pooling):
    """Patch tokens are the maximum over time of the projected patches."""

    def pool(self, clips: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """[T, P, D] → [P, D] of each clip."""
        return [clip.amax(dim=0) for clip in clips]


class ImportancePooling(Pooling):
    """Patch tokens are a weighted mean over time: one learned score per frame, softmax over frames (Valley v2)."""

    def __init__(self, *, num_patches: int, hidden_size: int) -> None:
        super().__init__()
        self.score = nn.Linear(num_patches * hidden_size, 1)

    def pool(self, clips: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """[T, P, D] → [P, D] of each clip; a frame is scored from its flattened patches."""
        scores = self.score(torch.cat([clip.flatten(1) for clip in clips])).split([len(clip) for clip in clips])
        return [(score.softmax(dim=0)[:, :, None] * clip).sum(dim=0) for score, clip in zip(scores, clips, strict=True)]


class DeltaPooling(Pooling):
    """Patch tokens are the mean over time plus what a transformer over time says at the last frame (Valley v3).

    One post-norm encoder layer runs over the T steps of each patch, positions added to its input alone.
    """

    position_encoding: torch.Tensor
    """[NUM_POSITIONS, D]; a buffer, because released checkpoints carry theirs."""

    def __init__(self, *, hidden_size: int, dropout: float) -> None:
        super().__init__()
        if hidden_size % NUM_HEADS:
            raise CheckpointError(
                f"config.json: pooling='delta' needs a language model width that is a multiple of {NUM_HEADS}, "
                f"got {hidden_size}; take another pooling"
            )
        layer = nn.TransformerEncoderLayer(hidden_size, NUM_HEADS, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=1, enable_nested_tensor=False)
        self.register_buffer("position_encoding", sinusoids(NUM_POSITIONS, hidden_size))

    def pool(self, clips: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """[T, P, D] → [P, D] of each clip; shorter clips are padded and their padding is not attended to.

        Raises:
            SamplingError: a clip of more than NUM_POSITIONS frames.
        """
        counts = [len(clip) for clip in clips]
        longest = max(counts)
        if longest > NUM_POSITIONS:
            raise SamplingError(
                f"a clip of {longest} frames, but delta pooling knows {NUM_POSITIONS} positions; sample fewer frames"
            )
        steps = nn.utils.rnn.pad_sequence(list(clips), batch_first=True)  # [C, T, P, D]
        steps = steps + self.position_encoding[:longest, None].to(steps.dtype)
        steps = steps.transpose(1, 2).flatten(0, 1)  # [C * P, T, D]
        padding = None
        if min(counts) < longest:
            ends = torch.tensor(counts, device=steps.device)
            is_padding = torch.arange(longest, device=steps.device) >= ends[:, None]
            padding = is_padding.repeat_interleave(clips[0].shape[1], dim=0)
        encoded = self.encoder(steps, src_key_padding_mask=padding).unflatten(0, (len(clips), -1))  # [C, P, T, D]
        return [
            clip.mean(dim=0) + deltas[:, count - 1] for clip, deltas, count in zip(clips, encoded, counts, strict=True)
        ]


def sinusoids(num_positions: int, width: int) -> torch.Tensor:
    """Position table float32 [num_positions, width]: sine in even columns, cosine in odd ones, base 10000."""
    frequencies = torch.pow(10000.0, -torch.arange(0, width, 2) / width)
    angles = torch.arange(num_positions)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


def build_pooling(config: ValleyConfig, *, hidden_size: int) -> Pooling:
    """The pooling that `config` names, over tokens of `hidden_size` (D).

    Raises:
        CheckpointError: there is none of that name, or it does not go with the width.
    """
    match config.pooling:
        case "mean":
            return MeanPooling()
        case "max":
            return MaxPooling()
        case "importance":
            return ImportancePooling(num_patches=config.num_patches, hidden_size=hidden_size)
        case "delta":
            return DeltaPooling(hidden_size=hidden_size, dropout=config.temporal_dropout)
        case other:
            raise CheckpointError(
                f"config.json: pooling={other!r} is unknown; expected one of mean, max, importance, delta"
            )
