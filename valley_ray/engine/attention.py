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
    keys, values = slot_pass.cache.layer(int(module.layer_idx), key, value)  # type: ignore[arg-type]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    heads, num_decoding = key.shape[1], len(slot_pass.positions)
    rows_k, rows_v = keys.unflatten(0, (-1, heads)), values.unflatten(0, (-1, heads))
    parts = []
    if num_decoding:
        rows_k[slot_pass.rows, :, slot_pass.columns] = key[0, :, :num_decoding].transpose(0, 1)
        rows_v[slot_pass.rows, :, slot_pass.columns] = value[0, :, :num_decoding].transpose(0, 1)
        queries = query[0, :, :num_decoding].transpose(0, 1).unflatten(1, (heads, -1))  # [n, H, G, K]
        for span in slot_pass.spans:
            first = 0 if sliding_window is None else max(0, span.shortest - sliding_window)
            mask = slot_pass.span_mask(span, first, sliding_window, heads, query.dtype)
            batch = slice(span.rows.start * heads, span.rows.stop * heads)
            read_k, read_v = keys[batch, first : span.longest], values[batch, first : span.longest]
            attended = _attend(queries[span.rows].flatten(0, 1), read_k, read_v, mask, scaling, softcap)
            parts.append(attended.reshape(span.rows.stop - span.rows.start, -1, attended.shape[-1]))
    at = num_decoding
    for chunk in slot_pass.chunks:
        new = slice(at, at + chunk.stop - chunk.start)
        rows_k[chunk.row, :, chunk.start : chunk.stop] = key[0, :, new]
        rows_v[chunk.row, :, chunk.start : chunk.stop] = value[0, :, new]
        first = 0 if sliding_window is None else max(0, chunk.start + 1 - sliding_window)
        mask = slot_pass.chunk_mask(chunk, first, sliding_window)
        read_k, read_v = rows_k[chunk.row, :, first : chunk.stop], rows_v[chunk.row, :, first : chunk.stop]
        parts.append(_attend_chunk(query[0, :, new], read_k, read_v, mask, scaling, softcap))
        at = new.stop
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined[None], None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Query [B, Q, K] over key and value [B, C, K], additive mask [B, 1 | Q, C] → [B, Q, K]; B: rows * H."""
    scores = torch.bmm(query * scaling, key.transpose(1, 2))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores += mask
    return torch.bmm(scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype), value)


def _attend_chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Query [H * G, L, K] over key and value [H, C, K], bool mask [L, C] (None: causal, C = L) → [L, H * G, K]."""
    groups = query.shape[0] // key.shape[0]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=0), value.repeat_interleave(groups, dim=0)
    if softcap is None:
        attended = scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=mask, is_causal=mask is None, scale=scaling
        )[0]
    else:
        length = query.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril() if mask is None else mask
        blocked = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, float("-inf"))
        attended = _attend(query, key, value, blocked[None], scaling, softcap)
    return attended.transpose(0, 1)


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
