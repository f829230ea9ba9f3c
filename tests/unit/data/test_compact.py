"""Shards that merge: every name and row still leads to its frames, through every interruption."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from valley_ray.data import compact, frame_store
from valley_ray.data.commit import ShardWriter, exclusive
from valley_ray.data.frame_store import FrameStore, read_moved, shard_paths
from valley_ray.data.schema import CLIPS_SCHEMA, OK
from valley_ray.data.windows import known_outcomes
from valley_ray.errors import DataError
from valley_ray.media.frames import VideoFrames


def write_shard(directory: Path, number: int, *, fingerprint: str = "f", num_clips: int = 3) -> str:
    name = f"shard-00000-{number:04d}-x.arrow"
    with ShardWriter(directory, name, fingerprint=fingerprint) as shard:
        for row in range(num_clips):
            values = {"clip_id": f"{number}-{row}", "status": OK, "error_class": "", "error": "", "attempts": 1}
            pixels = np.full((1, 8, 8, 3), 10 * number + row, np.uint8)
            shard.append(values | {"etag": "", "content_digest": ""}, VideoFrames(pixels, np.zeros(1)))
    return name


def value(store: FrameStore, name: str, row: int) -> int:
    return int(store.frames(name, row)[0, 0, 0, 0])


def check_all(store: FrameStore, names: list[str]) -> None:
    for number, name in enumerate(names):
        assert [value(store, name, row) for row in range(3)] == [10 * number + row for row in range(3)]


def test_rows_are_found_by_their_old_names_by_old_and_new_readers(tmp_path: Path) -> None:
    names = [write_shard(tmp_path, number) for number in range(6)]
    size = (tmp_path / names[0]).stat().st_size
    other = write_shard(tmp_path, 9, fingerprint="other")
    reader = FrameStore(tmp_path)
    view = reader.frames(names[0], 1)
    done = compact.compact(tmp_path, target_bytes=3 * size)
    assert (done.num_merged, done.num_written) == (6, 2)
    assert sorted(path.name for path in tmp_path.glob("shard-*")) == [other], "made otherwise: not mixed"
    assert len(shard_paths(tmp_path)) == 3
    check_all(reader, names)
    check_all(FrameStore(tmp_path), names)
    assert view[0, 0, 0, 0] == 1, "a view outlives its file"

    names.append(write_shard(tmp_path, 6))
    assert compact.compact(tmp_path, target_bytes=1 << 30).num_merged == 3, "merged ones merge again"
    check_all(reader, names)
    check_all(FrameStore(tmp_path), names)
    assert compact.compact(tmp_path).num_merged == 0

    rows = [{"clip_id": f"{n}-{row}", "shard": names[n], "row": row} for n in range(7) for row in range(3)]
    ledger = compact.moved_places(pa.Table.from_pylist(rows, schema=CLIPS_SCHEMA), tmp_path)
    fresh = FrameStore(tmp_path)
    assert set(ledger["shard"].to_pylist()) == {read_moved(tmp_path)[names[0]][0]}
    for row in ledger.to_pylist():
        number, position = map(int, row["clip_id"].split("-"))
        assert value(fresh, row["shard"], row["row"]) == 10 * number + position


@pytest.mark.parametrize("step", ["_merge", "write_json", "_remove_moved"])
def test_interrupted_anywhere_it_is_gone_on_with(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [write_shard(tmp_path, number) for number in range(4)]
    reader, calls = FrameStore(tmp_path), []
    real = getattr(compact, step)

    def interrupted(*arguments: object) -> object:
        calls.append(step)
        # The first call of _remove_moved only clears what an earlier compaction has left.
        if len(calls) == (2 if step == "_remove_moved" else 1):
            if step == "_merge":
                real(*arguments)
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(compact, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            compact.compact(tmp_path)
    check_all(reader, names)
    check_all(FrameStore(tmp_path), names)
    clips = pa.Table.from_pylist([{"clip_id": "2-1", "etag": ""}], schema=CLIPS_SCHEMA)
    outcome = known_outcomes(tmp_path, clips, "f")["2-1"]
    compact.compact(tmp_path)
    assert len(shard_paths(tmp_path)) == len(list(tmp_path.glob("*.arrow"))) == 1
    check_all(reader, names)
    assert value(FrameStore(tmp_path), outcome["shard"], outcome["row"]) == 21, "what was known meanwhile still holds"


def test_reader_that_meets_the_removal_finds_the_new_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [write_shard(tmp_path, number) for number in range(2)]
    real = frame_store._map_frames

    def compacted_just_now(path: Path) -> object:
        if path.name == names[1]:
            compact.compact(tmp_path)
        return real(path)

    monkeypatch.setattr(frame_store, "_map_frames", compacted_just_now)
    reader = FrameStore(tmp_path)
    assert value(reader, names[1], 2) == 12
    with pytest.raises(DataError, match="shard-nowhere"):
        reader.frames("shard-nowhere.arrow", 0)
    with exclusive(tmp_path), pytest.raises(DataError, match="another pipeline is writing"):
        compact.compact(tmp_path)
