"""What came of each of very many clips, in memory: a mapping of dicts that are kept packed."""

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from valley_ray.data.stages import OUTCOME_SCHEMA

Outcome = dict[str, Any]
"""One row of OUTCOME_SCHEMA."""

_NAMES = tuple(name for name in OUTCOME_SCHEMA.names if name != "clip_id")
_ALIKE = frozenset(_NAMES.index(name) for name in ("status", "error_class", "shard", "fps", "width", "height"))
"""Columns whose values many clips share: each is kept once."""


class Outcomes(MutableMapping[str, Outcome]):
    """clip_id → its outcome; 0.4 KB per clip, where dicts hold 1 KB. What is looked up is a new dict each time."""

    def __init__(self, outcomes: Iterable[tuple[str, Outcome]] = ()) -> None:
        self._rows: dict[str, tuple[Any, ...]] = {}
        self._alike: dict[tuple[int, Any], Any] = {}
        self.update(outcomes)

    def __getitem__(self, clip_id: str) -> Outcome:
        return {"clip_id": clip_id, **dict(zip(_NAMES, self._rows[clip_id], strict=True))}

    def __setitem__(self, clip_id: str, outcome: Outcome) -> None:
        self._rows[clip_id] = tuple(
            self._alike.setdefault((column, value), value) if column in _ALIKE else value
            for column, value in enumerate(map(outcome.get, _NAMES))
        )

    def __delitem__(self, clip_id: str) -> None:
        del self._rows[clip_id]

    def __contains__(self, clip_id: object) -> bool:
        return clip_id in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
