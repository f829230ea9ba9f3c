"""The callables of the pipeline without Ray: one row out for each row in, whatever the file."""

import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from data_clips import SIDE, turns, write_clip
from PIL import Image
from tiny import make_tiny_valley

from valley_ray.data.journal import BlockJournal
from valley_ray.data.schema import FAILED, OK, PENDING
from valley_ray.data.shards import WindowStore, read_shard_records
from valley_ray.data.sources import clip_row
from valley_ray.data.stages import BLOCK_SCHEMA, DecodeStage, TokenizeStage, decoder_version
from valley_ray.errors import DataError
from valley_ray.fetch import FetchPolicy
from valley_ray.media.preprocess import Crop
from valley_ray.media.sampling import FrameSampling
from valley_ray.media.sandbox import SandboxLimits
from valley_ray.processor import ProcessorConfig, ValleyProcessor


def make_stage(tmp_path: Path, limits: SandboxLimits | None = None, **changes: Any) -> DecodeStage:
    crops = {"video_crop": Crop(size=32, short_side=32), "image_crop": Crop(size=32, fit="stretch")}
    return DecodeStage(
        directory=tmp_path,
        fingerprint="f",
        sampling=FrameSampling(num_frames=4),
        processing=ProcessorConfig(num_patches=4, **(crops | changes.pop("crops", {}))),
        backend=changes.pop("backend", "pyav"),
        limits=limits or SandboxLimits(),
        policy=FetchPolicy(),
        **changes,
    )


def rows_of(clips: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"window": 0, "block": 0} | {key: clip[key] for key in BLOCK_SCHEMA.names[2:]} for clip in clips]


def decode(
    tmp_path: Path, clips: list[dict[str, Any]], limits: SandboxLimits | None = None, **changes: Any
) -> list[dict[str, Any]]:
    stage = make_stage(tmp_path, limits, **changes)
    outcomes: list[dict[str, Any]] = stage(pa.Table.from_pylist(rows_of(clips), schema=BLOCK_SCHEMA)).to_pylist()
    return outcomes


def test_video_in_a_bucket_is_decoded(tmp_path: Path) -> None:
    bucket = fsspec.filesystem("memory")
    bucket.pipe("/set/a.mp4", write_clip(tmp_path / "a.mp4", brightness=100).read_bytes())
    clips = [clip_row("video", f"memory://set/{name}.mp4", error="looked for") for name in ("a", "gone")]
    there, gone = decode(tmp_path, clips)
    assert (there["status"], there["num_frames"]) == (OK, 4)
    assert (gone["status"], gone["error_class"], gone["error"]) == (FAILED, "source_not_found", "looked for")


def test_good_and_bad_files_of_one_block_each_get_their_row(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "good.mp4", brightness=100)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("this is not a video")
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    Image.new("RGB", (64, 48), (200, 0, 0)).save(tmp_path / "image.png")
    names = ["empty.mp4", "good.mp4", "text.mp4", "cut.mp4", "missing.mp4"]
    clips = [clip_row("video", str(tmp_path / name)) for name in names]
    clips += [clip_row("image", str(tmp_path / "image.png")), clip_row("video", "ftp://somewhere/x.mp4")]
    outcomes = decode(tmp_path, clips)
    assert [outcome["clip_id"] for outcome in outcomes] == [clip["clip_id"] for clip in clips]
    assert [outcome["status"] for outcome in outcomes] == [FAILED, OK, FAILED, FAILED, FAILED, OK, FAILED]
    assert [outcome["error_class"] for outcome in outcomes[:3]] == ["media_empty", "", "media_not_recognised"]
    assert outcomes[4]["error_class"] == "source_not_found"
    assert outcomes[6]["error_class"] == "source_not_allowed"
    assert "empty.mp4" in outcomes[0]["error"]
    assert [outcome["attempts"] for outcome in outcomes] == [1] * 7, "what is certain is not tried again"
    store = WindowStore(tmp_path)
    video, image = (store.frames(outcomes[i]["shard"], outcomes[i]["row"]) for i in (1, 5))
    assert video.shape == (4, 32, 32, 3)
    means = video.reshape(4, -1).mean(1)
    np.testing.assert_allclose(means, [100, 102, 104, 107], atol=2, err_msg="truncated linspace(0, 7, 4); H.264 noise")
    assert image.shape == (1, 32, 32, 3)


def test_what_the_container_says_is_in_the_outcome_and_in_the_shard(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "good.mp4", brightness=100)
    Image.new("RGB", (40, 20)).save(tmp_path / "still.png")
    (tmp_path / "empty.mp4").write_bytes(b"")
    rows = [clip_row("video", str(clip)), clip_row("image", str(tmp_path / "still.png"))]
    outcomes = decode(tmp_path, [*rows, clip_row("video", str(tmp_path / "empty.mp4"))])
    names = ("duration_s", "fps", "width", "height")
    want = [(1.0, 8.0, SIDE, SIDE), (None, None, 40, 20), (None,) * 4]
    assert [tuple(outcome[name] for name in names) for outcome in outcomes] == want
    _, records = read_shard_records(tmp_path / outcomes[0]["shard"])
    in_shard = ("duration_s", "fps", "source_width", "source_height")
    assert [tuple(record[name] for name in in_shard) for record in records] == want


def test_clip_that_hangs_is_tried_twice_and_then_failed(tmp_path: Path) -> None:
    clip = clip_row("video", str(write_clip(tmp_path / "good.mp4", brightness=10)))
    [outcome] = decode(tmp_path, [clip], SandboxLimits(timeout_s=1e-6))
    assert (outcome["status"], outcome["error_class"], outcome["attempts"]) == (FAILED, "decode_timeout", 2)


def test_window_of_a_clip_is_cut_out(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "good.mp4", brightness=100)
    whole, part = decode(tmp_path, [clip_row("video", str(path)), clip_row("video", str(path), start_s=0.5, end_s=1)])
    store = WindowStore(tmp_path)
    assert store.frames(whole["shard"], whole["row"])[0].mean() == pytest.approx(100, abs=2)
    assert store.frames(part["shard"], part["row"])[0].mean() == pytest.approx(104, abs=2), "frame 4 of 8 at 8 fps"
    [backwards] = decode(tmp_path, [clip_row("video", str(path), start_s=2, end_s=1)])
    assert backwards["status"] == FAILED


def test_group_of_images_and_folder_of_frames_are_prepared_like_images(tmp_path: Path) -> None:
    pictures = [tmp_path / f"{name}.png" for name in "abc"]
    for brightness, path in enumerate(pictures):
        Image.new("RGB", (64, 48), (50 * brightness, 0, 0)).save(path)
    (tmp_path / "folder").mkdir()
    half = Image.new("RGB", (64, 48), (0, 0, 0))
    half.paste((200, 0, 0), (0, 0, 6, 48))  # a stripe that a centre crop would cut off and a stretch keeps
    half.save(tmp_path / "folder" / "a.png")
    group = clip_row("images", json.dumps([str(path) for path in reversed(pictures)]))
    clips = [group, clip_row("video", str(tmp_path / "folder"))]
    assert [clip["kind"] for clip in clips] == ["images", "frames"]
    together, folder = decode(tmp_path, clips)
    store = WindowStore(tmp_path)
    frames = store.frames(together["shard"], together["row"])
    assert frames[:, 0, 0, 0].tolist() == [100, 50, 0]
    assert store.frames(folder["shard"], folder["row"])[0, 16, 0, 0] > 150
    pictures[1].unlink()
    [gone] = decode(tmp_path, [group])
    assert (gone["error_class"], "b.png" in gone["error"]) == ("source_not_found", True)


def test_images_of_one_clip_that_differ_in_size_are_a_failed_row(tmp_path: Path) -> None:
    for name, width in (("a", 64), ("b", 32)):
        Image.new("RGB", (width, 32)).save(tmp_path / f"{name}.png")
    group = clip_row("images", json.dumps([str(tmp_path / "a.png"), str(tmp_path / "b.png")]))
    [outcome] = decode(tmp_path, [group], crops={"image_crop": Crop(size=32, fit="keep")})
    assert (outcome["error_class"], "differ in size" in outcome["error"]) == ("media_corrupt", True)


def test_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    [outcome] = decode(tmp_path, [clip_row("video", str(tmp_path / "x.mp4"), error="x.mp4: looked for a and b")])
    assert (outcome["error_class"], outcome["error"]) == ("source_not_found", "x.mp4: looked for a and b")


def test_the_named_decoder_reads_the_videos(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "good.mp4", brightness=100)
    outcomes = [decode(tmp_path, [clip_row("video", str(path))], backend=name)[0] for name in ("pyav", "decord")]
    store = WindowStore(tmp_path)
    by_pyav, by_decord = (store.frames(outcome["shard"], outcome["row"]) for outcome in outcomes)
    np.testing.assert_allclose(by_pyav, by_decord, atol=3, err_msg="levels of two builds of one scaler")
    assert decoder_version("pyav") != decoder_version("decord"), "frames of another decoder are other frames"


def outcome_of(clip_id: str, num_frames: int, status: str = OK) -> dict[str, Any]:
    reason = {"error_class": "" if status == OK else "media_corrupt", "error": "" if status == OK else "x.mp4: broken"}
    return {"clip_id": clip_id, "num_frames": num_frames, "status": status, "shard": "s", "row": 3} | reason


def test_samples_are_tokenized_for_the_frames_that_were_decoded(tmp_path: Path) -> None:
    processor = ValleyProcessor.from_pretrained(make_tiny_valley(tmp_path / "model"))
    messages = [
        {"role": "user", "content": turns()[0]["value"], "speaker": "human"},
        {"role": "assistant", "content": turns()[1]["value"], "speaker": "gpt"},
    ]
    plain = [{**messages[0], "content": "How many?"}, messages[1]]
    long = [messages[0], {**messages[1], "content": "left " * 2000}]
    no_room = [{**messages[0], "content": "left " * 2000 + "<video>"}, messages[1]]
    cases = [(["a"], messages), (["b"], messages), (["bad"], messages), ([], plain), (["a"], long), (["a"], no_room)]
    samples = [
        {"sample_id": str(i), "clip_ids": ids, "conversation": turn, "status": PENDING, "error_class": "", "error": ""}
        for i, (ids, turn) in enumerate(cases)
    ]
    outcomes = {"a": outcome_of("a", 4), "b": outcome_of("b", 7), "bad": outcome_of("bad", 0, FAILED)}
    rows = TokenizeStage(processor)(samples, outcomes).to_pylist()
    assert [row["sample_id"] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    assert rows[1]["num_tokens"] - rows[0]["num_tokens"] == 3, "one token per frame"
    assert rows[0]["clips"] == [{"shard": "s", "row": 3}]
    assert (rows[2]["error_class"], rows[2]["error"], rows[2]["clips"]) == ("media_corrupt", "x.mp4: broken", [])
    assert rows[3]["status"] == OK
    assert rows[5]["error_class"] == "prompt_too_long"
    for row in rows:
        assert row["num_tokens"] == len(row["input_ids"]) == len(row["labels"]) <= processor.max_length
        assert row["num_label_tokens"] == sum(label != -100 for label in row["labels"])
        assert (row["num_label_tokens"] > 0) == (row["status"] == OK)


def test_block_that_is_run_again_takes_the_shard_that_is_there(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "good.mp4", brightness=100)
    clips = [clip_row("video", str(path))]
    [first] = decode(tmp_path, clips)
    path.unlink()
    assert decode(tmp_path, clips) == [first], "nothing is decoded twice, whoever lost the first result"
    [again] = decode(tmp_path, clips, again="later")
    assert (again["error_class"], again["shard"] != first["shard"]) == ("source_not_found", True)


def test_clip_that_kills_its_worker_fails_alone_after_two_deaths(tmp_path: Path) -> None:
    clips = [clip_row("video", str(write_clip(tmp_path / f"{i}.mp4", brightness=50 * i))) for i in range(3)]
    ids = [clip["clip_id"] for clip in clips]
    name = make_stage(tmp_path)._shard_name(rows_of(clips))
    for _ in range(2):
        journal = BlockJournal(tmp_path, name).__enter__()  # a run that never ends
        journal.begin(ids[0])
        journal.end()
        journal.begin(ids[1])
    BlockJournal(tmp_path, name).__enter__().begin(ids[2])
    outcomes = decode(tmp_path, clips)
    assert [outcome["status"] for outcome in outcomes] == [OK, FAILED, OK]
    assert [outcome["attempts"] for outcome in outcomes] == [1, 2, 2]
    assert outcomes[1]["error_class"] == "decode_worker_died"
    assert "1.mp4" in outcomes[1]["error"]
    assert not list(tmp_path.glob(".*")), "a run that ends takes the notes of those before it along"


def test_the_end_of_a_whole_node_is_no_clips_doing(tmp_path: Path) -> None:
    clips = [clip_row("video", str(write_clip(tmp_path / f"{i}.mp4", brightness=50 * i))) for i in range(3)]
    name = make_stage(tmp_path)._shard_name(rows_of(clips))
    for node, clip in [("gone-1", 0), ("gone-2", 0), ("gone-2", 1), ("there", 1), ("there", 2), ("here", 2)]:
        BlockJournal(tmp_path, name, node=node).__enter__().begin(clips[clip]["clip_id"])
    for _ in range(4):
        BlockJournal(tmp_path, name, node="gone-3").__enter__()
    table = pa.Table.from_pylist(rows_of(clips), schema=BLOCK_SCHEMA)
    stage = make_stage(tmp_path, max_deaths=1)
    outcomes = stage(table, node="here", is_alive=lambda name: name == "there").to_pylist()
    assert [outcome["status"] for outcome in outcomes] == [OK, OK, FAILED]
    assert [outcome["attempts"] for outcome in outcomes] == [1, 2, 2], "only deaths on nodes that live count"
    assert not list(tmp_path.glob(".*"))


def test_block_whose_worker_dies_between_clips_is_given_up_in_the_end(tmp_path: Path) -> None:
    clips = [clip_row("video", str(write_clip(tmp_path / "good.mp4", brightness=100)))]
    name = make_stage(tmp_path)._shard_name(rows_of(clips))
    for _ in range(2):
        BlockJournal(tmp_path, name).__enter__()
    with pytest.raises(DataError, match="died 2 times between two clips"):
        decode(tmp_path, clips, max_deaths=1)
    for _ in range(2):
        BlockJournal(tmp_path, name).__enter__()
    assert decode(tmp_path, clips, max_deaths=2)[0]["status"] == OK
