"""Windows: which clip belongs where, and which store may be gone on with."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from valley_ray.data import windows
from valley_ray.data.commit import ShardWriter
from valley_ray.data.schema import CLIPS_SCHEMA, FAILED, OK, SAMPLES_SCHEMA
from valley_ray.data.shards import StoreInfo
from valley_ray.data.sources import clip_row
from valley_ray.data.sources.media import failed_clip
from valley_ray.data.stages import OUTCOME_SCHEMA
from valley_ray.errors import DataError
from valley_ray.media.frames import VideoFrames


def make_tables(clips_of_samples: list[list[str]]) -> tuple[pa.Table, pa.Table]:
    rows = {name: clip_row("video", name) for names in clips_of_samples for name in names}
    clips = pa.Table.from_pylist(list(rows.values()), schema=CLIPS_SCHEMA)
    samples = [
        {"sample_id": str(i), "clip_ids": [rows[name]["clip_id"] for name in names], "conversation": []}
        for i, names in enumerate(clips_of_samples)
    ]
    return clips, pa.Table.from_pylist(samples, schema=SAMPLES_SCHEMA)


def test_clip_belongs_to_the_first_window_that_shows_it() -> None:
    clips, samples = make_tables([["a"], ["b"], ["a", "c"], ["b"], []])
    planned = windows.plan_windows(clips, samples, np.array([3, 4, 2, 1, 0]), 2)
    assert [(w.index, w.first_position, w.samples.tolist()) for w in planned] == [
        (0, 0, [3, 4]),
        (1, 2, [2, 1]),
        (2, 4, [0]),
    ]
    names = clips["uri"].to_pylist()
    assert [[names[row] for row in w.clips] for w in planned] == [["b"], ["a", "c"], []]
    assert list(windows.blocks_of(planned[2:], clips, {}, lambda _: 2)) == [], "a window may need no clip"


def test_blocks_hold_only_clips_that_are_still_missing() -> None:
    clips, samples = make_tables([["a", "b", "c", "d"]])
    [window] = windows.plan_windows(clips, samples, np.array([0]), 8)
    done = {clips["clip_id"][1].as_py(): {}}
    blocks = list(windows.blocks_of([window], clips, done, lambda _: 2))
    assert [block["uri"].to_pylist() for block in blocks] == [["a", "c"], ["d"]]
    assert [set(block["block"].to_pylist()) for block in blocks] == [{0}, {1}]


def test_blocks_span_no_windows_and_may_become_smaller_towards_the_end() -> None:
    clips, samples = make_tables([["a", "b", "c"], ["d", "e", "f", "g"]])
    planned = windows.plan_windows(clips, samples, np.array([0, 1]), 1)
    blocks = list(windows.blocks_of(planned, clips, {}, lambda num_left: max(1, num_left // 2)))
    assert [block["uri"].to_pylist() for block in blocks] == [["a", "b", "c"], ["d", "e"], ["f"], ["g"]]
    assert [(block["window"][0].as_py(), block["block"][0].as_py()) for block in blocks] == [
        (0, 0),
        (1, 0),
        (1, 1),
        (1, 2),
    ]


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1], [0, 1, 3], [0, 1, 2, 3]])
def test_order_that_drops_or_repeats_a_sample_is_refused(order: list[int]) -> None:
    assert windows.check_order([2, 0, 1], 3).tolist() == [2, 0, 1]
    with pytest.raises(DataError, match="each of the 3 samples once"):
        windows.check_order(order, 3)


def test_store_made_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    parts = {"processor": "p", "order": "o"}
    info = StoreInfo(windows.fingerprint(parts), parts, 3, 2, 2)
    windows.open_store(tmp_path, info)
    assert windows.open_store(tmp_path, info).info() == info, "opening it again goes on with it"
    other = {"processor": "q", "order": "o"}
    with pytest.raises(DataError, match="another processor; choose another windows_dir"):
        windows.open_store(tmp_path, StoreInfo(windows.fingerprint(other), other, 3, 2, 2))


def test_digest_of_the_records_follows_texts_and_files() -> None:
    base = windows.records_digest(*make_tables([["a"], ["b"]]))
    assert windows.records_digest(*make_tables([["a"], ["b"]])) == base
    assert windows.records_digest(*make_tables([["b"], ["a"]])) != base
    clips, samples = make_tables([["a"], ["b"]])
    etags = pa.array(["new", ""])
    changed = clips.set_column(clips.column_names.index("etag"), "etag", etags)
    assert windows.records_digest(changed, samples) != base


def write_shard(directory: Path, name: str, fingerprint: str, clips: list[tuple[str, str]], status: str = OK) -> Path:
    with ShardWriter(directory, name, fingerprint=fingerprint) as shard:
        for clip_id, etag in clips:
            outcome = {"status": status, "error_class": "", "error": "", "attempts": 1, "content_digest": ""}
            frames = VideoFrames(np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1))
            shard.append({"clip_id": clip_id, "etag": etag, **outcome}, frames)
    return directory / name


def test_shards_of_whoever_made_the_same_frames_are_taken_over(tmp_path: Path) -> None:
    clips, _ = make_tables([["a", "b", "c", "d"]])
    a, b, c, d = clips["clip_id"].to_pylist()
    write_shard(tmp_path, "shard-00000-0000-w.arrow", "f", [(a, "")], FAILED)
    write_shard(tmp_path, "shard-00000-0000-x.arrow", "f", [("of-other-records", ""), (a, ""), (b, "")])
    write_shard(tmp_path, "shard-00000-0000-y.arrow", "f", [(a, ""), (b, "")], FAILED)
    write_shard(tmp_path, "shard-00001-0000-x.arrow", "other sampling", [(c, "")])
    write_shard(tmp_path, "shard-00002-0000-x.arrow", "f", [(d, "mtime-of-before")])
    (tmp_path / "shard-00003-0000-x.arrow").write_bytes(b"cut")
    known = windows.known_outcomes(tmp_path, clips, "f")
    assert {clip_id: (outcome["shard"], outcome["row"]) for clip_id, outcome in known.items()} == {
        a: ("shard-00000-0000-x.arrow", 1),
        b: ("shard-00000-0000-x.arrow", 2),
    }
    assert all(set(outcome) == set(OUTCOME_SCHEMA.names) for outcome in known.values())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 6, "what others may need stays"
    assert names[-1] == "shard-00003-0000-x.arrow.damaged", "what nobody can read makes room for what can be read"


def test_leftovers_of_dead_writers_are_removed(tmp_path: Path) -> None:
    for name in (".shard-00003-0000-x.arrow.0.tmp", ".shard-00003-0000-x.arrow.1.journal"):
        (tmp_path / name).touch()
    kept = write_shard(tmp_path, "shard-00000-0000-x.arrow", "f", [("a", "")])
    windows.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]


def test_clips_that_their_source_has_failed_are_known_with_its_reason(tmp_path: Path) -> None:
    clips = pa.Table.from_pylist(
        [clip_row("video", "a"), failed_clip("row 7", DataError("a row needs a file"))], schema=CLIPS_SCHEMA
    )
    known = windows.known_outcomes(tmp_path, clips, "f")
    [outcome] = known.values()
    assert (outcome["status"], outcome["error_class"], outcome["error"]) == (
        FAILED,
        "invalid_data",
        "a row needs a file",
    )
    assert (outcome["attempts"], outcome["shard"], outcome["row"]) == (0, None, None)
