"""Shards → features of their clips: the work of one actor as a plain callable. Ray calls it, it knows no Ray.

Legend: T frames, S crop side.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from valley_ray.data.commit import FeatureWriter
from valley_ray.data.feature_store import FeatureSet, read_statuses
from valley_ray.data.frame_store import FrameStore, read_shard_records
from valley_ray.data.schema import FAILED, OK
from valley_ray.errors import FeatureRangeError, MediaError, ValleyError

if TYPE_CHECKING:
    from valley_ray.model.frozen_tower import FrozenTower
    from valley_ray.processor import ValleyProcessor


NO_FAILURE = {"status": OK, "error_class": "", "error": ""}


class FeatureStage:
    """Names of shards (column `shard`) → a file of features for each, and the status of each of its clips.

    Needs the memory of the tower and of its pass over `batch_frames` frames, on `device`. A clip without frames has no
    features; a shard whose file is there is not worked on again.
    """

    def __init__(
        self, model: Path, shards_dir: Path, features: FeatureSet, *, batch_frames: int, device: str = "cpu"
    ) -> None:
        self._tower, self._processor = open_tower(model)
        self._tower.to(device)
        self._device = device
        self._frames = FrameStore(shards_dir)
        self._shards_dir, self._features = shards_dir, features
        self._batch_frames = batch_frames

    def __call__(self, block: pa.Table) -> pa.Table:
        statuses = [self._statuses(name) for name in block["shard"].to_pylist()]
        return pa.concat_tables(pa.table(one) for one in statuses)

    def _statuses(self, shard: str) -> dict[str, list[str]]:
        path = self._shards_dir / self._features.name / shard
        if not path.exists():
            with FeatureWriter(path.parent, shard) as writer:
                for values, features in self._rows(shard):
                    writer.append(values, features)
        return read_statuses(path)

    def _rows(self, shard: str) -> Iterator[tuple[dict[str, str], npt.NDArray[Any] | None]]:
        """What a file of features says of each clip of a shard, in its order."""
        _, records = read_shard_records(self._shards_dir / shard)
        for rows in _passes(records, self._batch_frames):
            failures = {row: self._failure(records[row]) for row in rows}
            good = [row for row in rows if failures[row] is None]
            encoded = dict(zip(good, self._encode([self._frames.frames(shard, row) for row in good]), strict=True))
            for row in rows:
                features, failure = encoded.get(row), failures[row]
                if features is not None and not np.isfinite(features).all():
                    failure = _out_of_range(features.dtype)
                    features = None
                yield {"clip_id": records[row]["clip_id"], **(failure or NO_FAILURE)}, features

    def _failure(self, record: Mapping[str, Any]) -> dict[str, str] | None:
        """Why a clip cannot have features; None where it can."""
        if record["status"] != OK:
            return {name: record[name] for name in ("status", "error_class", "error")}
        side, came = self._tower.config.image_size, (record["height"], record["width"])
        if came != (side, side):
            return _failure(MediaError(f"the tower takes frames of {side} x {side}, got {came[0]} x {came[1]}"))
        return None

    def _encode(self, clips: Sequence[npt.NDArray[np.uint8]]) -> list[npt.NDArray[Any]]:
        """Frames uint8 [T, S, S, 3] of each clip → its features, as they are stored."""
        import torch

        from valley_ray.model.pooling import MeanPooling

        if not clips:
            return []
        frames = np.concatenate(clips)
        parts = [frames[first : first + self._batch_frames] for first in range(0, len(frames), self._batch_frames)]
        features = torch.cat(
            [self._tower.encode_frames(self._processor.pixel_values(part).to(self._device)) for part in parts]
        )
        split: list[torch.Tensor] = list(features.split([len(clip) for clip in clips]))
        if self._features.form == "pooled":
            split = [MeanPooling().rows(one) for one in split]
        return [one.to(getattr(torch, self._features.dtype)).cpu().numpy() for one in split]


def open_tower(model: Path) -> tuple["FrozenTower", "ValleyProcessor"]:
    """What makes features of frames; raises CheckpointError where the model folder cannot be opened."""
    import transformers

    from valley_ray.model.frozen_tower import FrozenTower
    from valley_ray.processor import ValleyProcessor

    # A bar for each worker would bury the progress line.
    transformers.utils.logging.disable_progress_bar()
    return FrozenTower.from_pretrained(model).eval(), ValleyProcessor.from_pretrained(model)


def _passes(records: Sequence[Mapping[str, Any]], batch_frames: int) -> Iterator[list[int]]:
    """Rows in order, cut where the next clip would make more than `batch_frames` frames; a longer clip is alone."""
    rows: list[int] = []
    num_frames = 0
    for row, record in enumerate(records):
        if rows and num_frames + record["num_frames"] > batch_frames:
            yield rows
            rows, num_frames = [], 0
        rows.append(row)
        num_frames += record["num_frames"]
    yield rows


def _out_of_range(dtype: np.dtype[Any]) -> dict[str, str]:
    return _failure(
        FeatureRangeError(f"the tower's features are not finite as {dtype}; float32 holds more than float16")
    )


def _failure(error: ValleyError) -> dict[str, str]:
    return {"status": FAILED, "error_class": error.code, "error": str(error)}
