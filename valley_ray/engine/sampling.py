"""Logits become tokens: greedy, temperature, top-k and top-p, seeded per request and per position.

A drawn token depends on the logits and on (seed, position) alone, never on what else is in the batch or on how often
a generator was used before, so that any replica that sees the same prompt goes on with the same tokens.
N rows, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch

from valley_ray.engine.engine import SamplingParams

_LEAST_TEMPERATURE = 1e-30
"""Smaller ones are 0 in float32, or make logits infinite: the draw would be among NaN."""


def choose_tokens(logits_NV: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """One token id per row of `logits_NV` (float [N, V]); `positions[i]` is the index of row i's new token, from 0."""
    assert len(params) == len(positions) == len(logits_NV), "one SamplingParams and one position per row"
    tokens: list[int] = logits_NV.argmax(dim=-1).tolist()
    drawn = [row for row, one in enumerate(params) if one.temperature > 0]
    if drawn:
        uniform = [uniform_number(params[row].seed, positions[row]) for row in drawn]
        chosen = _draw(logits_NV[drawn].float(), [params[row] for row in drawn], uniform)
        for row, token in zip(drawn, chosen, strict=True):
            tokens[row] = token
    return tokens


def uniform_number(seed: int, position: int) -> float:
    """The number in [0, 1) of one (seed, position); any integer seed is taken modulo 2**64.

    numpy documents Philox as a counter-based generator with a fixed stream, so the number is the same everywhere.
    """
    return float(np.random.Generator(np.random.Philox(key=seed % 2**64, counter=position)).random())


def _draw(logits_NV: torch.Tensor, params: Sequence[SamplingParams], uniform: Sequence[float]) -> list[int]:
    """Inverse-CDF draw from the filtered distribution, likeliest token first."""

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits_NV.device)[:, None]

    scaled = logits_NV / column([max(one.temperature, _LEAST_TEMPERATURE) for one in params])
    # Stable, so that equal logits keep the order of their ids and a draw is reproducible.
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    # A token stays while the mass in front of it is under top_p: the likeliest one always does.
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    keep = mass_before < column([one.top_p for one in params])
    ranks = torch.arange(logits_NV.shape[1], device=logits_NV.device)
    keep &= ranks < column([one.top_k or logits_NV.shape[1] for one in params])
    keep[:, 0] = True
    cumulative = torch.where(keep, probabilities, 0.0).cumsum(dim=-1)
    # The last kept rank bounds the search where rounding leaves the target at or above the total.
    target = column(uniform) * cumulative[:, -1:]
    rank = (cumulative <= target).sum(dim=-1, keepdim=True).minimum(keep.sum(dim=-1, keepdim=True) - 1)
    tokens: list[int] = ids.gather(1, rank)[:, 0].tolist()
    return tokens
