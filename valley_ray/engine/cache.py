"""The key/value cache of the slot engine: one row per running request or kept prompt, preallocated, read through views.

Rows are left-aligned: position p of a request stands at column p of its row. Knows tensors only: who owns a row, and
what stands in it, is the engine's business.
R rows, H key/value heads, M columns (maximum length), K head width, n rows in use, L new tokens.
"""

import torch


class SlotCache:
    """Keys and values of every layer, [R * H, M, K] each, allocated with a layer's first states.

    Rows and heads are one dimension, so that any run of rows up to any column is one strided batch of matrices, which
    `bmm` reads without a copy.
    """

    def __init__(self, *, num_layers: int, num_rows: int, max_length: int) -> None:
        self.num_rows, self.max_length = num_rows, max_length
        self.keys: list[torch.Tensor | None] = [None] * num_layers
        self.values: list[torch.Tensor | None] = [None] * num_layers

    def layer(
        self, index: int, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values) of one layer; new states [1, H, L, K] give heads, widths and dtype at the first call."""
        keys, values = self.keys[index], self.values[index]
        if keys is None or values is None:
            keys = self.keys[index] = self._allocate(key_states)
            values = self.values[index] = self._allocate(value_states)
        return keys, values

    def _allocate(self, states: torch.Tensor) -> torch.Tensor:
        # Zeros, not empty: masked columns are multiplied by 0, which stale NaN would survive.
        return states.new_zeros((self.num_rows * states.shape[1], self.max_length, states.shape[3]))

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of row `source` over row `target`, in every layer."""
        for rows in self._rows():
            rows[target, :, :length] = rows[source, :, :length]

    def swap_rows(self, first: int, second: int, first_length: int, second_length: int) -> None:
        """Exchange two rows of which so many columns matter; a length of 0 makes it a move."""
        if not first_length:
            first, second, first_length, second_length = second, first, second_length, first_length
        if not second_length:
            self.copy_row(first, second, first_length)
            return
        for rows in self._rows():
            kept = rows[first, :, :first_length].clone()
            rows[first, :, :second_length] = rows[second, :, :second_length]
            rows[second, :, :first_length] = kept

    def _rows(self) -> list[torch.Tensor]:
        """[R, H, M, K] views of all keys and values."""
        return [one.unflatten(0, (self.num_rows, -1)) for one in (*self.keys, *self.values) if one is not None]
