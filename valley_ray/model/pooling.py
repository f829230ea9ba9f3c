"""Pooling over time: the features of T frames become P patch tokens, beside T frame tokens.

Each pooling is two steps around the projector, so that one projector call serves all clips of a batch and linear
poolings project after the mean (T times fewer rows). T frames, P patches, Dv tower width, D language width.
"""

import torch
from torch import nn

from valley_ray.errors import CheckpointError


class Pooling(nn.Module):
    """What the model asks of a pooling."""

    def rows(self, features: torch.Tensor) -> torch.Tensor:
        """[T, 1 + P, Dv] → [R, Dv]: the rows to project."""
        raise NotImplementedError

    def tokens(self, projected: torch.Tensor, *, num_frames: int) -> torch.Tensor:
        """[R, D] → [P + T, D]: patch tokens, then frame tokens."""
        raise NotImplementedError


class MeanPooling(Pooling):
    """Patch tokens are the mean over time (Valley v1); the projector is linear, so the mean is taken before it."""

    def rows(self, features: torch.Tensor) -> torch.Tensor:
        """[T, 1 + P, Dv] → [P + T, Dv]."""
        return torch.cat([features[:, 1:].mean(dim=0), features[:, 0]])

    def tokens(self, projected: torch.Tensor, *, num_frames: int) -> torch.Tensor:
        """Already [P + T, D]."""
        return projected


class MaxPooling(Pooling):
    """Patch tokens are the maximum over time of the projected patches."""

    def rows(self, features: torch.Tensor) -> torch.Tensor:
        """[T, 1 + P, Dv] → [T * (1 + P), Dv]."""
        return features.flatten(0, 1)

    def tokens(self, projected: torch.Tensor, *, num_frames: int) -> torch.Tensor:
        """[T * (1 + P), D] → [P + T, D]."""
        frames = projected.unflatten(0, (num_frames, -1))
        return torch.cat([frames[:, 1:].amax(dim=0), frames[:, 0]])


POOLINGS: dict[str, type[Pooling]] = {"mean": MeanPooling, "max": MaxPooling}


def build_pooling(name: str) -> Pooling:
    """The pooling called `name`; raises CheckpointError where there is none."""
    if name not in POOLINGS:
        raise CheckpointError(f"config.json: pooling={name!r} is unknown; expected one of {', '.join(POOLINGS)}")
    return POOLINGS[name]()
