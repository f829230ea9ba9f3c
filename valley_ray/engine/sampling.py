"""Logits become tokens: greedy, temperature, top-k and top-p, seeded per request and per position.

A drawn token depends on the logits and on (seed, position) alone, never on what else is in the batch or on how often
a generator was used before, so that any replica that sees the same prompt goes on with the same tokens.
N rows, V vocabulary.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from valley_ray.engine.engine import SamplingParams

_LEAST_TEMPERATURE = 1e-30
"""Smaller ones are 0 in float32, or make logits infinite: the draw would be among NaN."""

_SHORTLIST = 256
"""Likeliest tokens that are sorted; only a draw that falls behind them sorts the vocabulary (15 times slower)."""

Logprobs = tuple[float, tuple[tuple[int, float], ...]]
"""Log-probability of the chosen token, and (token id, log-probability) of the likeliest."""


def choose_tokens(
    logits_NV: torch.Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    generated: Sequence[Sequence[int]] | None = None,
) -> list[int]:
    """One token id per row of `logits_NV` (float [N, V]); `positions[i]` is the index of row i's new token, from 0.

    `generated[i]` are the tokens of row i's answer so far, for penalties. The logits stay as they are.
    """
    assert len(params) == len(positions) == len(logits_NV), "one SamplingParams and one position per row"
    logits_NV = _adjusted(logits_NV, params, generated)
    tokens: list[int] = logits_NV.argmax(dim=-1).tolist()
    drawn = [row for row, one in enumerate(params) if one.temperature > 0]
    if drawn:
        uniform = [uniform_number(params[row].seed, positions[row]) for row in drawn]
        chosen = _draw(logits_NV[drawn].float(), [params[row] for row in drawn], uniform)
        for row, token in zip(drawn, chosen, strict=True):
            tokens[row] = token
    return tokens


def logprobs_of(
    logits_NV: torch.Tensor, params: Sequence[SamplingParams], tokens: Sequence[int]
) -> dict[int, Logprobs]:
    """Row → log-probabilities of its chosen token and alternatives, for the rows whose params ask for them.

    Natural logarithms of the float32 softmax of the logits as the model gave them, as vLLM reports by default
    (`raw_logprobs`): temperature, penalties and bias do not show.
    """
    asked = [(row, one.logprobs) for row, one in enumerate(params) if one.logprobs is not None]
    if not asked:
        return {}
    rows, counts = zip(*asked, strict=True)
    logprobs = logits_NV[list(rows)].float().log_softmax(dim=-1)
    chosen = torch.tensor([tokens[row] for row in rows], device=logits_NV.device)
    own = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
    values, ids = (one.tolist() for one in logprobs.topk(min(max(counts), logprobs.shape[1]), dim=-1))
    return {
        row: (own[place], tuple(zip(ids[place][:count], values[place][:count], strict=True)))
        for place, (row, count) in enumerate(asked)
    }


def uniform_number(seed: int, position: int) -> float:
    """The number in [0, 1) of one (seed, position); any integer seed is taken modulo 2**64.

    numpy documents Philox as a counter-based generator with a fixed stream, so the number is the same everywhere.
    """
    return float(np.random.Generator(np.random.Philox(key=seed % 2**64, counter=position)).random())


def _adjusted(
    logits_NV: torch.Tensor, params: Sequence[SamplingParams], generated: Sequence[Sequence[int]] | None
) -> torch.Tensor:
    """Bias added and penalties taken off, in float32; the same tensor where nobody asks."""
    rows: list[int] = []
    ids: list[int] = []
    amounts: list[float] = []
    for row, one in enumerate(params):
        changes = dict(one.logit_bias)
        if one.presence_penalty or one.frequency_penalty:
            assert generated is not None, "penalties need the tokens so far"
            for token, count in Counter(generated[row]).items():
                penalty = one.presence_penalty + count * one.frequency_penalty
                changes[token] = changes.get(token, 0.0) - penalty
        known = {token: amount for token, amount in changes.items() if 0 <= token < logits_NV.shape[1]}
        rows += [row] * len(known)
        ids += known.keys()
        amounts += known.values()
    if not rows:
        return logits_NV
    device = logits_NV.device
    places = (torch.tensor(rows, device=device), torch.tensor(ids, device=device))
    adjusted = logits_NV.to(torch.float32, copy=True)
    adjusted[places] += torch.tensor(amounts, dtype=torch.float32, device=device)
    return adjusted


def _draw(logits_NV: torch.Tensor, params: Sequence[SamplingParams], uniform: Sequence[float]) -> list[int]:
    """Inverse-CDF draw from the filtered distribution, likeliest token first, equal ones by id.

    A row takes the short way or the long one by its own logits alone, so that its batch does not matter.
    """
    temperature = [max(one.temperature, _LEAST_TEMPERATURE) for one in params]
    scaled = logits_NV / torch.tensor(temperature, dtype=torch.float32, device=logits_NV.device)[:, None]
    if scaled.shape[1] <= _SHORTLIST:
        return _draw_sorted(scaled, params, uniform)
    drawn = _draw_from_shortlist(scaled, params, uniform)
    long = [row for row, token in enumerate(drawn) if token < 0]
    if long:
        chosen = _draw_sorted(scaled[long], [params[row] for row in long], [uniform[row] for row in long])
        for row, token in zip(long, chosen, strict=True):
            drawn[row] = token
    return drawn


def _draw_from_shortlist(
    scaled_NV: torch.Tensor, params: Sequence[SamplingParams], uniform: Sequence[float]
) -> list[int]:
    """A token per row, or -1 where the shortlist does not decide."""
    ids = scaled_NV.topk(_SHORTLIST + 1, dim=-1).indices.sort(dim=-1).values
    ordered, order = scaled_NV.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    # The last one only tells whether an equal logit was left out: then its rank is not certain.
    boundary, ids = ordered[:, -1:], ids.gather(1, order)[:, :-1]
    probabilities = (ordered[:, :-1] - scaled_NV.logsumexp(dim=-1, keepdim=True)).exp()
    mass = probabilities.cumsum(dim=-1)
    keep = _kept(probabilities, mass, params)
    cumulative = torch.where(keep, probabilities, 0.0).cumsum(dim=-1)
    ends = ~keep[:, -1:]
    is_unfiltered = [[one.top_p >= 1 and not one.top_k] for one in params]
    total = torch.where(torch.tensor(is_unfiltered, device=ids.device), 1.0, cumulative[:, -1:])
    target = _column(uniform, ids) * total
    rank = (cumulative <= target).sum(dim=-1, keepdim=True)
    rank = torch.where(ends, rank.minimum(keep.sum(dim=-1, keepdim=True) - 1), rank)
    found = rank < _SHORTLIST
    rank = rank.clamp(max=_SHORTLIST - 1)
    is_certain = ordered.gather(1, rank) > boundary
    decided = found & is_certain & (ends | (total == 1.0))
    tokens: list[int] = torch.where(decided, ids.gather(1, rank), -1)[:, 0].tolist()
    return tokens


def _draw_sorted(scaled_NV: torch.Tensor, params: Sequence[SamplingParams], uniform: Sequence[float]) -> list[int]:
    """A token per row by sorting all logits."""
    # Stable, so that equal logits keep the order of their ids and a draw is reproducible.
    ordered, ids = scaled_NV.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    keep = _kept(probabilities, probabilities.cumsum(dim=-1), params)
    cumulative = torch.where(keep, probabilities, 0.0).cumsum(dim=-1)
    # The last kept rank bounds the search where rounding leaves the target at or above the total.
    target = _column(uniform, ids) * cumulative[:, -1:]
    rank = (cumulative <= target).sum(dim=-1, keepdim=True).minimum(keep.sum(dim=-1, keepdim=True) - 1)
    tokens: list[int] = ids.gather(1, rank)[:, 0].tolist()
    return tokens


def _kept(probabilities: torch.Tensor, mass: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Which ranks top-k and top-p keep; `mass` is the cumulative sum."""
    # A token stays while the mass in front of it is under top_p: the likeliest one always does.
    keep = mass - probabilities < _column([one.top_p if one.top_p < 1 else 2.0 for one in params], mass)
    ranks = torch.arange(mass.shape[1], device=mass.device)
    keep &= ranks < _column([one.top_k or 2**30 for one in params], mass)
    keep[:, 0] = True
    return keep


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]
