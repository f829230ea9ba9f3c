"""The key/value cache of the slot engine: one row per running request, preallocated, read through views.

Rows 0..n-1 are the running requests, left-aligned: position p of a request stands at column p of its row. A decode
step therefore reads `[:n, :, :longest]` as a view, without gathering or concatenating anything, and costs what the
running requests and their lengths cost. Knows transformers' Cache interface, nothing about requests.
R rows (slots), H key/value heads, M columns (maximum length), K head width, n rows in use, L new tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class CacheWindow:
    """Which part of the cache the coming forward pass writes and reads; shared by all layers."""

    rows: slice
    """Rows of the batch, in order."""
    positions: torch.Tensor | None
    """int64 [n] column of each row's one new token (decode); None: a prompt from column 0 (prefill)."""
    num_cached: int
    """Columns that hold earlier tokens of the longest row: 0 at prefill."""


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [R, H, M, K] each."""

    is_sliding = False  # a sliding layer keeps all columns too: its window is in the mask

    def __init__(self, num_slots: int, max_length: int, window: CacheWindow) -> None:
        super().__init__()
        self.num_slots, self.max_length, self.window = num_slots, max_length, window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for the heads and widths of the first states seen; called by the engine's warm-up pass."""

        def allocate(states: torch.Tensor) -> torch.Tensor:
            # Zeros, not empty: masked columns are multiplied by 0, which stale NaN would survive.
            return states.new_zeros((self.num_slots, states.shape[1], self.max_length, states.shape[3]))

        self.keys, self.values = allocate(key_states), allocate(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new states [n, H, L, K]; return all states that the new tokens may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, positions = self.window.rows, self.window.positions
        if positions is None:
            self.keys[rows, :, : key_states.shape[2]] = key_states
            self.values[rows, :, : value_states.shape[2]] = value_states
            return key_states, value_states
        index = torch.arange(rows.start, rows.stop, device=positions.device)
        self.keys[index, :, positions] = key_states[:, :, 0]
        self.values[index, :, positions] = value_states[:, :, 0]
        length = self.window.num_cached + 1
        return self.keys[rows, :, :length], self.values[rows, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns read, offset of the first)."""
        return self.window.num_cached + query_length, 0

    def get_seq_length(self) -> int:
        """Columns in front of the new tokens (of the longest row)."""
        return self.window.num_cached

    def get_max_length(self) -> int:
        """M."""
        return self.max_length

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of row `source` over row `target`."""
        assert self.is_initialized, "a row is moved only after a prefill"
        self.keys[target, :, :length] = self.keys[source, :, :length]
        self.values[target, :, :length] = self.values[source, :, :length]


class SlotCache(Cache):
    """One SlotLayer per layer of the language model."""

    def __init__(self, *, num_layers: int, num_slots: int, max_length: int) -> None:
        self.window = CacheWindow(rows=slice(0, 0), positions=None, num_cached=0)
        super().__init__(layers=[SlotLayer(num_slots, max_length, self.window) for _ in range(num_layers)])

    def begin_prefill(self, rows: slice) -> None:
        """The coming pass stores prompts from column 0 of `rows`."""
        self.window.rows, self.window.positions, self.window.num_cached = rows, None, 0

    def begin_decode(self, positions: torch.Tensor, longest: int) -> None:
        """The coming pass stores one token at column `positions[i]` of row i; `longest` is the largest of them."""
        self.window.rows, self.window.positions = slice(0, len(positions)), positions
        self.window.num_cached = longest

    @torch.inference_mode()
    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy `length` columns of row `source` over row `target` in every layer."""
        for layer in self.layers:
            assert isinstance(layer, SlotLayer), "built with slot layers only"
            layer.move_row(source, target, length)
