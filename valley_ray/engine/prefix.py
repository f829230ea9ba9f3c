"""Which cached row begins like a new prompt: content keys of prompts, and their longest common beginnings.

A position's key stands for its embedding, so that text and visual tokens are one thing here: two prompts whose keys
agree up to a position have the same keys and values up to there. Knows neither requests nor the cache's tensors.
L tokens, D hidden width.
"""

import secrets

import numpy as np
import numpy.typing as npt
import torch

Keys = npt.NDArray[np.int64]
"""int64 [L]: one content key per position."""

_INTEGER_OF = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def no_keys() -> Keys:
    """The keys of an empty row."""
    return np.empty(0, dtype=np.int64)


class ContentKeys:
    """Embeddings [L, D] → int64 [L], by a hash whose numbers are drawn anew in every process.

    Two different embeddings share a key with probability about 2**-63, and nobody who does not know the numbers can
    make two that do: a prompt never sees another's video.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(secrets.randbits(63))
        drawn = torch.randint(-(2**63), 2**63 - 1, (2, width), generator=generator)
        self._shift, self._factor = drawn[0].to(device), (drawn[1] | 1).to(device)

    def __call__(self, embeds_LD: torch.Tensor) -> Keys:
        """Hash on the embeddings' device; integers wrap around there."""
        bits = embeds_LD.contiguous().view(_INTEGER_OF[embeds_LD.dtype]).to(torch.int64)
        # Multiplied twice with a fold between: one product alone is linear, and flipped signs could cancel.
        mixed = (bits + self._shift) * self._factor
        mixed ^= mixed >> 32
        keys: Keys = (mixed * self._factor).sum(dim=-1).cpu().numpy()
        return keys


def common_length(first: Keys, second: Keys) -> int:
    """How many positions two rows have in common from the beginning."""
    length = min(len(first), len(second))
    differs = first[:length] != second[:length]
    at = int(differs.argmax()) if length else 0
    return at if length and differs[at] else length
