"""Rows of the cache and who stands in them: running requests first, then what finished ones left behind.

Rows 0..d-1 decode, d..n-1 are being prefilled, the others are free: each keeps the keys and values of its last request
until its place is needed, the least lately used first. A row changes place by being copied. Knows no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from valley_ray.engine.adapters import Adapter
from valley_ray.engine.cache import SlotCache
from valley_ray.engine.engine import SamplingParams
from valley_ray.engine.prefix import Keys, common_length, no_keys

_LEAST_SHARED = 16
"""Shorter common beginnings (a first token, a role word) are computed anew: not worth a copy, nor waiting."""


@dataclass(eq=False)
class Request:
    """One prompt in line or in a row, and its answer so far."""

    request_id: str
    embeds_LD: torch.Tensor | None
    """The prompt, until all of it is computed."""
    keys: Keys
    """Content keys of the prompt; of the new tokens too once the request is over."""
    params: SamplingParams
    adapter: Adapter | None = None
    token_ids: list[int] = field(default_factory=list)
    """Tokens of the answer: those that the prompt brought, then the new ones."""
    row: int = -1
    num_cached: int = 0
    """Columns of its row that are filled."""
    num_reused: int = 0
    """Those among them that another request had computed."""

    def __post_init__(self) -> None:
        self.prompt_length, self.num_answered = len(self.keys), len(self.token_ids)

    def add_keys(self, keys: Keys) -> None:
        """Keys of the new tokens in the cache."""
        self.keys = np.concatenate([self.keys, keys])


@dataclass(eq=False)
class _Row:
    request: Request | None = None
    kept: Keys = field(default_factory=no_keys)
    """Without a request: what stands in the row's columns."""
    used: int = 0
    """When it was last of use; 0: never."""

    @property
    def keys(self) -> Keys:
        """What stands in the filled columns; of a running request the prompt alone."""
        return self.kept if self.request is None else self.request.keys[: self.request.num_cached]

    @property
    def num_filled(self) -> int:
        return len(self.kept) if self.request is None else self.request.num_cached


class Rows:
    """Who stands where; `cache` has at least `num_slots` rows, those beyond keep what finished requests left."""

    def __init__(self, cache: SlotCache, num_slots: int) -> None:
        self.cache, self._num_slots = cache, num_slots
        self._rows = [_Row() for _ in range(cache.num_rows)]
        self._num_decoding, self.num_running, self._clock = 0, 0, 0
        self._prefilling: list[Request] = []

    @property
    def num_free(self) -> int:
        """Requests that can still be admitted."""
        return self._num_slots - self.num_running

    def running(self) -> list[Request]:
        """Everybody who holds a row."""
        return [row.request for row in self._rows[: self.num_running] if row.request is not None]

    def decoding(self) -> list[Request]:
        """Requests of rows 0, 1, ..., whose prompts are computed."""
        return self.running()[: self._num_decoding]

    def prefilling(self) -> Sequence[Request]:
        """Requests whose prompts are not, in order of admission."""
        return self._prefilling

    def is_worth_waiting(self, request: Request) -> bool:
        """Whether a prompt that is being computed right now will share more with this one than what is there."""
        limit = request.prompt_length - 1
        coming = max((min(limit, common_length(one.keys, request.keys)) for one in self._prefilling), default=0)
        return coming >= _LEAST_SHARED and coming > self._longest_shared(request)[1]

    def admit(self, request: Request) -> None:
        """Give the request a row that holds as much of its beginning as any row has."""
        assert self.num_free > 0, "somebody has to leave first"
        source, shared = self._longest_shared(request)
        place, victim = self.num_running, self._victim(source, shared)
        self._clock += 1
        if shared:
            self._rows[source].used = self._clock
        self._rows[victim].kept = self._rows[victim].kept[: shared if victim == source else 0]
        self._swap(victim, place)
        if shared and source != victim:
            # What stood at `place` made room for the victim, and is where the victim was.
            self.cache.copy_row(victim if source == place else source, place, shared)
        row = self._rows[place]
        row.request, row.kept, row.used = request, no_keys(), self._clock
        request.row, request.num_cached, request.num_reused = place, shared, shared
        self.num_running += 1
        self._prefilling.append(request)

    def begin_decoding(self, request: Request) -> None:
        """Its prompt is computed."""
        self._prefilling.remove(request)
        self._swap(request.row, self._num_decoding)
        self._num_decoding += 1

    def release(self, request: Request) -> None:
        """The request is over; its row keeps what stands in it."""
        row = self._rows[request.row]
        self._clock += 1
        row.request, row.kept, row.used = None, request.keys[: request.num_cached], self._clock
        free = request.row
        if free < self._num_decoding:
            self._num_decoding -= 1
            self._swap(free, self._num_decoding)
            free = self._num_decoding
        else:
            self._prefilling.remove(request)
        self.num_running -= 1
        self._swap(free, self.num_running)

    def _longest_shared(self, request: Request) -> tuple[int, int]:
        """(row, columns) of the longest common beginning; the last position is always computed, for its logits."""
        limit = request.prompt_length - 1
        shared = [min(limit, common_length(row.keys, request.keys)) for row in self._rows]
        longest = max(shared)
        if longest < _LEAST_SHARED:
            return 0, 0
        # The last of several: a free row rather than a running one, which has to be copied.
        return max(index for index, length in enumerate(shared) if length == longest), longest

    def _victim(self, source: int, shared: int) -> int:
        """The free row to take: the source itself, where that loses less than it gives, else the least lately used."""
        if shared and source >= self.num_running and len(self._rows[source].kept) - shared <= shared:
            return source
        return min(range(self.num_running, len(self._rows)), key=lambda index: self._rows[index].used)

    def _swap(self, first: int, second: int) -> None:
        if first == second:
            return
        one, two = self._rows[first], self._rows[second]
        self.cache.swap_rows(first, second, one.num_filled, two.num_filled)
        self._rows[first], self._rows[second] = two, one
        for index in (first, second):
            if (request := self._rows[index].request) is not None:
                request.row = index
