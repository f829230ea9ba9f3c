"""Tower features beside the shards whose frames they were made of. Knows no Ray and no torch.

    features-KEY-FORM-DTYPE/    one folder in the shards' own for each tower, form and number format
        shard-*.arrow           FEATURES_SCHEMA, Arrow IPC file: row i belongs to row i of the shard of that name
Shards never change for it, and merge together with their features (compact.py). KEY is `frozen_tower.tower_key`.
Legend: T frames, P patches, Dv tower width.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from valley_ray.data.frame_store import MappedRows, binary_views, map_table
from valley_ray.data.schema import OK

Form = Literal["full", "pooled"]
"""full: [T, 1 + P, Dv], for every pooling. pooled: [P + T, Dv], mean patches, then frame tokens, for mean pooling."""

Dtype = Literal["float32", "float16"]
"""Numbers as they are stored; towers compute in float32."""

PREFERRED = [(form, dtype) for dtype in ("float32", "float16") for form in ("pooled", "full")]
"""What a model with mean pooling takes first: exact numbers, then fewer bytes."""

FEATURES_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("status", pa.string()),
        ("error_class", pa.string()),
        ("error", pa.string()),
        ("shape", pa.list_(pa.int32())),
        ("features", pa.large_binary()),
    ]
)
"""features: numbers in C order, empty where status is failed: the clip's own failure, or the tower's with it."""

_NAME = re.compile(rf"features-([0-9a-f]+)-({'|'.join(get_args(Form))})-({'|'.join(get_args(Dtype))})")


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """Features of one tower, as they lie in one folder."""

    key: str
    form: Form
    dtype: Dtype

    @property
    def name(self) -> str:
        """The folder's name."""
        return f"features-{self.key}-{self.form}-{self.dtype}"

    @classmethod
    def named(cls, name: str) -> Self | None:
        """The set in a folder of that name; None for any other folder."""
        found = _NAME.fullmatch(name)
        return cls(*found.groups()) if found is not None else None  # type: ignore[arg-type]


def feature_sets(shards_dir: Path) -> list[FeatureSet]:
    """The sets beside the shards of a folder, by name."""
    names = sorted(path.name for path in shards_dir.glob("features-*/"))
    return [found for name in names if (found := FeatureSet.named(name)) is not None]


class FeatureStore:
    """Reads features by (shard, row) of the frames. Thread-safe; open one in each process."""

    def __init__(self, shards_dir: Path, sets: Iterable[FeatureSet]) -> None:
        """`sets` in the order in which they are looked into."""
        self.sets = tuple(sets)
        self._rows = [
            MappedRows(shards_dir / one.name, _reader(np.dtype(one.dtype)), shards_dir=shards_dir) for one in self.sets
        ]
        self._absent: set[tuple[int, str]] = set()

    @classmethod
    def of_tower(cls, shards_dir: Path, key: str, *, takes_pooled: bool) -> Self | None:
        """What is there of one tower for a model that takes pooled rows or does not; None where there is nothing."""
        there = [one for one in feature_sets(shards_dir) if one.key == key and (takes_pooled or one.form == "full")]
        there.sort(key=lambda one: PREFERRED.index((one.form, one.dtype)))
        return cls(shards_dir, there) if there else None

    def features(self, shard: str, row: int) -> npt.NDArray[Any] | None:
        """Features of one clip, [T, 1 + P, Dv] or pooled [P + T, Dv], a read-only view; None where none are stored.

        Raises:
            DataError: a file is damaged.
        """
        for number, rows in enumerate(self._rows):
            # What is absent now stays so for this reader: looking again for every clip would cost more than it gives.
            if (number, shard) in self._absent:
                continue
            if not rows.has(shard):
                self._absent.add((number, shard))
                continue
            found: npt.NDArray[Any] | None = rows.get(shard, row)
            if found is not None:
                return found
        return None


def read_statuses(path: Path) -> dict[str, list[str]]:
    """clip_id, status and error_class of every row of a file of features. Raises DataError if it is damaged."""
    columns: dict[str, list[str]] = map_table(path).select(["clip_id", "status", "error_class"]).to_pydict()
    return columns


def _reader(dtype: np.dtype[Any]) -> Callable[[Path], list[npt.NDArray[Any] | None]]:
    def read(path: Path) -> list[npt.NDArray[Any] | None]:
        table = map_table(path)
        columns = (table["status"].to_pylist(), table["shape"].to_pylist(), binary_views(table["features"]))
        return [
            np.frombuffer(data, dtype).reshape(shape) if status == OK else None
            for status, shape, data in zip(*columns, strict=True)
        ]

    return read
