"""Attention of one engine pass: new tokens of many requests, laid end to end, each over its own row of the cache.

A pass is one sequence [1, N] of new tokens for the model: first one per decoding row (rows 0..n-1), then the chunks of
prompts. Linear layers see one batch without padding; this function, which transformers calls in every layer, stores
the new keys and values in the cache and lets each token look at its own row.
N new tokens, n decoding rows, H key/value heads, G query heads per key/value head, K head width, M columns, C columns
read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from valley_ray.engine.cache import SlotCache
from valley_ray.errors import ConfigError

NAME = "valley_slots"
"""What `register` calls the function in transformers' table."""

_WASTE_OF_DEVICE = {"cpu": 0.2}
_WASTE_ELSEWHERE = 0.8
"""Rows are read in one batch while at most this share of its columns is beyond their ends: on a GPU a launch costs
more than the reading."""

_NOT_SERVED = ("s_aux", "position_bias", "head_mask")


@dataclass(frozen=True)
class Chunk:
    """Positions start..stop-1 of a prompt, whose earlier ones stand in the cache."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Span:
    """Neighbouring decoding rows that are read as one batch."""

    rows: slice
    shortest: int
    """Columns that the shortest row looks at, its new token included."""
    longest: int


@dataclass
class SlotPass:
    """What one forward pass computes and where it stands in the cache; shared by all layers."""

    cache: SlotCache
    positions: Sequence[int]
    """n columns, where the decoding rows' new tokens go."""
    chunks: Sequence[Chunk]
    device: torch.device
    _masks: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spans = _spans(self.positions, _WASTE_OF_DEVICE.get(self.device.type, _WASTE_ELSEWHERE))
        self.rows = torch.arange(len(self.positions), device=self.device)
        self.columns = torch.tensor(self.positions, dtype=torch.int64, device=self.device)

    def span_mask(
        self, span: _Span, first: int, window: int | None, heads: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Additive [rows * H, 1, C] over columns first..longest-1, or None where every row looks at all of them."""
        if span.shortest == span.longest and (window is None or span.longest - first <= window):
            return None
        key = (span.rows.start, window, heads, dtype)
        if key not in self._masks:
            columns = torch.arange(first, span.longest, device=self.device)
            own = self.columns[span.rows, None]
            seen = columns <= own
            if window is not None:
                seen &= columns > own - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, float("-inf"))
            self._masks[key] = mask.repeat_interleave(heads, dim=0)[:, None]
        return self._masks[key]

    def chunk_mask(self, chunk: Chunk, first: int, window: int | None) -> torch.Tensor | None:
        """Bool [L, C] over columns first..stop-1, or None where plain causal attention is the same."""
        if chunk.start == 0 and (window is None or chunk.stop <= window):
            return None
        key = (chunk.row, chunk.start, window)
        if key not in self._masks:
            columns = torch.arange(first, chunk.stop, device=self.device)
            own = torch.arange(chunk.start, chunk.stop, device=self.device)[:, None]
            seen = columns <= own
            if window is not None:
                seen &= columns > own - window
            self._masks[key] = seen
        return self._masks[key]


def register() -> None:
    """Tell transformers about `slot_attention`; doing it again changes nothing."""
    AttentionInterface.register(NAME, slot_attention)


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    slot_pass: SlotPass,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Query [1, H * G, N, K], key and value [1, H, N, K] → attention output [1, N, H * G, K].

    Raises ConfigError for models whose attention has terms that are not served.
    """
    assert attention_mask is None, "the pass knows what each token sees"
    if unknown := [name for name in _NOT_SERVED if others.get(name) is not None]:
        raise ConfigError(
            f"the slots engine does not serve attention with {', '.join(unknown)} ({type(module).__name__}); "
            "choose another language model"
        )
    # transformers numbers its attention modules: that is how a layer finds its cache.
    layer: Any = module.layer_idx
    keys, values = slot_pass.cache.layer(layer, key, value)
    attend = _Attend(slot_pass, keys, values, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
    num_decoding = len(slot_pass.positions)
    parts = []
    if num_decoding:
        new = slice(0, num_decoding)
        parts += attend.newest(query[0, :, new], key[0, :, new], value[0, :, new], sliding_window)
    at = num_decoding
    for chunk in slot_pass.chunks:
        new = slice(at, at + chunk.stop - chunk.start)
        parts.append(attend.chunk(chunk, query[0, :, new], key[0, :, new], value[0, :, new], sliding_window))
        at = new.stop
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined[None], None


@dataclass(frozen=True)
class _Attend:
    """One layer of a pass."""

    slot_pass: SlotPass
    keys: torch.Tensor
    """[R * H, M, K]."""
    values: torch.Tensor
    """[R * H, M, K]."""
    scaling: float
    softcap: float | None

    def newest(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None
    ) -> list[torch.Tensor]:
        """Query [H * G, n, K], key and value [H, n, K] of the decoding rows → [rows, H * G, K] per span."""
        one, heads = self.slot_pass, key.shape[0]
        self.keys.unflatten(0, (-1, heads))[one.rows, :, one.columns] = key.transpose(0, 1)
        self.values.unflatten(0, (-1, heads))[one.rows, :, one.columns] = value.transpose(0, 1)
        queries = query.transpose(0, 1).reshape(len(one.rows) * heads, -1, query.shape[-1])
        queries = queries * self.scaling  # [n * H, G, K]
        attended = []
        for span in one.spans:
            first = 0 if window is None else max(0, span.shortest - window)
            batch = slice(span.rows.start * heads, span.rows.stop * heads)
            read_keys, read_values = (part[batch, first : span.longest] for part in (self.keys, self.values))
            scores = torch.bmm(queries[batch], read_keys.transpose(1, 2))  # [B, G, C]
            weights = self._weights(scores, one.span_mask(span, first, window, heads, query.dtype))
            output = torch.bmm(weights, read_values)  # [B, G, K]
            attended.append(output.reshape(-1, len(query), value.shape[-1]))
        return attended

    def chunk(
        self, chunk: Chunk, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """Query [H * G, L, K], key and value [H, L, K] of one prompt's chunk → [L, H * G, K]."""
        heads = key.shape[0]
        batch = slice(chunk.row * heads, (chunk.row + 1) * heads)
        self.keys[batch, chunk.start : chunk.stop] = key
        self.values[batch, chunk.start : chunk.stop] = value
        first = 0 if window is None else max(0, chunk.start + 1 - window)
        if first < chunk.start:
            key, value = self.keys[batch, first : chunk.stop], self.values[batch, first : chunk.stop]
        seen = self.slot_pass.chunk_mask(chunk, first, window)
        if (groups := len(query) // heads) > 1:
            key, value = key.repeat_interleave(groups, dim=0), value.repeat_interleave(groups, dim=0)
        if self.softcap is None:
            attended = scaled_dot_product_attention(
                query[None], key[None], value[None], attn_mask=seen, is_causal=seen is None, scale=self.scaling
            )[0]
        else:
            if seen is None:
                seen = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device).tril()
            blocked = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
            blocked.masked_fill_(~seen, float("-inf"))
            weights = self._weights(torch.bmm(query * self.scaling, key.transpose(1, 2)), blocked)
            attended = torch.bmm(weights, value)
        return attended.transpose(0, 1)

    def _weights(self, scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Softmax over columns with the cap and an additive mask; `scores` are overwritten."""
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is not None:
            scores += mask
        return scores.softmax(dim=-1, dtype=torch.float32).to(scores.dtype)


def _spans(positions: Sequence[int], waste: float) -> list[_Span]:
    """Cut decoding rows into runs of like lengths, in the order in which they stand."""
    spans: list[_Span] = []
    first = 0
    while first < len(positions):
        stop, shortest, longest, total = first, positions[first], positions[first], 0
        while stop < len(positions):
            new_longest = max(longest, positions[stop])
            read, useful = (new_longest + 1) * (stop + 1 - first), total + positions[stop] + 1
            if stop > first and read - useful > waste * read:
                break
            shortest, longest, total = min(shortest, positions[stop]), new_longest, useful
            stop += 1
        spans.append(_Span(slice(first, stop), shortest + 1, longest + 1))
        first = stop
    return spans
