"""Record files become the two tables; what cannot be used keeps its row and says why."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from valley_ray.data import schema
from valley_ray.data.sources import join, places, read_records
from valley_ray.errors import DataError


def turns(question: str = "<video>\nWhat moves?", answer: str = "A square.") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def read(tmp_path: Path, records: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    clips, samples = join([read_records(path, media_root=tmp_path)])
    return clips.to_pylist(), samples.to_pylist()


def read_failed(tmp_path: Path, record: Any) -> tuple[str, str]:
    _, [sample, _] = read(tmp_path, [record, {"id": "good", "conversations": turns("Hello?")}])
    assert sample["status"] == schema.FAILED
    assert sample["clip_ids"] == []
    return sample["error_class"], sample["error"]


def test_samples_on_one_file_share_its_clip(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"12345")
    records = [{"id": i, "video": name, "conversations": turns()} for i, name in enumerate(["a.mp4", "b.mp4", "a.mp4"])]
    clips, samples = read(tmp_path, records)
    assert [clip["uri"] for clip in clips] == [str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")]
    assert [clip["size_bytes"] for clip in clips] == [5, None], "a missing file is a clip too, decoding says why"
    assert clips[0]["etag"].startswith("mtime-")
    assert [sample["clip_ids"] for sample in samples] == [[clips[i]["clip_id"]] for i in (0, 1, 0)]
    assert [sample["sample_id"] for sample in samples] == ["0", "1", "2"]
    assert samples[0]["conversation"][0] == {"role": "user", "content": "<video>\nWhat moves?", "speaker": "human"}


def test_files_joined_share_clips_and_keep_their_order(tmp_path: Path) -> None:
    for name in ("x", "y"):
        records = [{"id": name, "video": "a.mp4", "conversations": turns()}]
        (tmp_path / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    clips, samples = join([read_records(tmp_path / f"{name}.json", media_root=tmp_path) for name in ("y", "x")])
    assert clips.num_rows == 1
    assert samples["sample_id"].to_pylist() == ["y", "x"]
    assert samples["source"].to_pylist() == ["y.json", "x.json"]


def test_images_text_and_folders_of_frames_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    records = [
        {"id": "image", "image": "a.png", "conversations": turns("<image>\nWhat is this?")},
        {"id": "text", "conversations": turns("What is this?")},
        {"id": "folder", "video": "folder", "conversations": turns()},
        {"id": "two", "image": ["a.png", "b.png"], "conversations": turns("<image> or <image>?")},
        {"id": "both", "image": "a.png", "video": "v.mp4", "conversations": turns("<image>\nWhat is this?")},
        {"id": "mixed", "image": "a.png", "video": "v.mp4", "conversations": turns("<video> or <image>?")},
    ]
    clips, samples = read(tmp_path, records)
    name_of = {clip["clip_id"]: (clip["kind"], Path(clip["uri"]).name) for clip in clips}
    assert [[name_of[clip] for clip in sample["clip_ids"]] for sample in samples] == [
        [("image", "a.png")],
        [],
        [("frames", "folder")],
        [("image", "a.png"), ("image", "b.png")],
        [("image", "a.png")],
        [("video", "v.mp4"), ("image", "a.png")],
    ]
    assert {sample["status"] for sample in samples} == {schema.PENDING}


def test_media_are_looked_for_where_upstream_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("direct.mp4", "webvid/default.mp4", "vatex/sourced.mp4", "direct/here.mp4", "clip.webm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    cases = {
        "direct.mp4": {"video": "direct.mp4"},
        "webvid/default.mp4": {"video": "default"},
        "vatex/sourced.mp4": {"video": "sourced", "source": "vatex"},
        "direct": {"video": "direct"},
        "clip.webm": {"video": "clip.webm", "source": "vatex"},
    }
    records = [{"id": want, **record, "conversations": turns()} for want, record in cases.items()]
    clips, samples = read(tmp_path, records)
    uri_of = {clip["clip_id"]: clip["uri"] for clip in clips}
    found = {sample["sample_id"]: uri_of[sample["clip_ids"][0]] for sample in samples}
    assert found == {want: str(tmp_path / want) for want in cases}


def test_missing_file_names_the_places_that_were_tried(tmp_path: Path) -> None:
    records = [{"id": 0, "video": "nope", "conversations": turns()}]
    [clip], [sample] = read(tmp_path, records)
    tried = [str(tmp_path / name) for name in ("nope", "nope.mp4", "webvid/nope", "webvid/nope.mp4")]
    assert clip["error"] == f"nope: there is no such file; looked for {' and '.join(tried)}; check media_root"
    assert (clip["status"], sample["status"]) == (schema.PENDING, schema.PENDING), "decoding fails it, if still missing"


def test_one_mark_for_a_list_of_images_is_one_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "root").mkdir()
    for name in ("root/a.png", "b.png"):
        (tmp_path / name).write_bytes(b"12345")
    monkeypatch.chdir(tmp_path)
    record = {"id": 0, "image": ["a.png", "b.png"], "conversations": turns("<image>\nWhat changes?")}
    path = tmp_path / "records.json"
    path.write_text(json.dumps([record]), encoding="utf-8")
    clips, samples = join([read_records(path, media_root=tmp_path / "root")])
    [clip] = clips.to_pylist()
    assert (clip["kind"], clip["size_bytes"]) == ("images", 10)
    assert schema.uris_of(clip["kind"], clip["uri"]) == [str(tmp_path / "root/a.png"), str(tmp_path / "b.png")]
    assert samples["clip_ids"].to_pylist() == [[clip["clip_id"]]]


def test_names_of_coco_may_lack_their_prefix(tmp_path: Path) -> None:
    root = tmp_path / "train2014"
    root.mkdir()
    (root / "COCO_train2014_000000000009.jpg").touch()
    assert places("image", "000000000009.jpg", {}, root)[1] == str(root / "COCO_train2014_000000000009.jpg")


@pytest.mark.parametrize(
    ("record", "error_class", "reason"),
    [
        ("text", "invalid_data", "must be an object"),
        ({"conversations": turns("Hi")}, "invalid_data", "needs an 'id'"),
        ({"id": "a"}, "invalid_conversation", "conversations"),
        ({"id": "a", "conversations": [{"from": "martian", "value": "x"}]}, "invalid_conversation", "martian"),
        ({"id": "a", "conversations": turns()}, "invalid_conversation", r"1 <video> mark\(s\) for 0"),
        ({"id": "a", "video": "v.mp4", "conversations": turns("Hi")}, "invalid_conversation", "0 <video>"),
        ({"id": "a", "video": 3, "conversations": turns()}, "invalid_data", "must be a file name"),
        ({"id": "a", "video": "v", "source": 3, "conversations": turns()}, "invalid_data", "'source' must be the name"),
        (
            {"id": "a", "image": ["x", "y", "z"], "conversations": turns("<image><image>")},
            "invalid_conversation",
            "2 <im",
        ),
        ({"id": "a", "conversations": turns("Hi", " ")}, "invalid_conversation", "no answer to learn from"),
        ({"id": "a", "conversations": turns("Hi \ud800")}, "invalid_data", "surrogate"),
    ],
)
def test_record_that_cannot_be_used_is_a_row_with_a_reason(
    tmp_path: Path, record: Any, error_class: str, reason: str
) -> None:
    came_class, came_reason = read_failed(tmp_path, record)
    assert came_class == error_class
    assert re.search(reason, came_reason), came_reason


def test_file_that_holds_no_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    with pytest.raises(DataError, match="cannot read records"):
        read_records(path, media_root=tmp_path)
    path.write_text("{nonsense", encoding="utf-8")
    with pytest.raises(DataError, match="not valid JSON"):
        read_records(path, media_root=tmp_path)
    path.write_text('{"id": "a"}', encoding="utf-8")
    with pytest.raises(DataError, match="must be a JSON list"):
        read_records(path, media_root=tmp_path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match="no record to work on"):
        join([read_records(path, media_root=tmp_path)])
