"""A folder of media becomes clips that nobody talks about, each file once, in the order of names."""

import os
from pathlib import Path

import pytest

from valley_ray.data.schema import FAILED, PENDING
from valley_ray.data.sources import SourceConfig, open_source
from valley_ray.errors import DataError


def read(path: Path) -> list[dict[str, object]]:
    format_name, rows = open_source(SourceConfig(path=path))
    assert format_name == "folder"
    taken = list(rows)
    assert all(row.sample is None for row in taken)
    return [row.clips[0] for row in taken]


def test_every_file_with_a_media_ending_is_a_clip(tmp_path: Path) -> None:
    names = ["b.mp4", "a/z.MKV", "a/a.gif", "empty.webm", "photo.JPG", "c.mov", "notes.txt", ".hidden.mp4", ".x/a.mp4"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"" if "empty" in name else b"12345")
    clips = read(tmp_path)
    found = [(str(Path(str(clip["uri"])).relative_to(tmp_path)), clip["kind"], clip["size_bytes"]) for clip in clips]
    assert found == [
        ("a/a.gif", "video", 5),
        ("a/z.MKV", "video", 5),
        ("b.mp4", "video", 5),
        ("c.mov", "video", 5),
        ("empty.webm", "video", 0),
        ("photo.JPG", "image", 5),
    ]
    assert {clip["status"] for clip in clips} == {PENDING}
    assert all(str(clip["etag"]).startswith("mtime-") for clip in clips)


def test_subfolder_of_numbered_images_is_a_clip_and_other_images_are_images(tmp_path: Path) -> None:
    for name in ("frames/f_001.png", "frames/f_002.png", "album/cat.png", "album/dog.png", "one/f_001.png", "f_1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "f_2.png").touch()
    assert [clip["kind"] for clip in read(tmp_path / "frames")] == ["image"] * 2, "what is named itself is gone through"
    found = [(Path(str(clip["uri"])).name, clip["kind"]) for clip in read(tmp_path)]
    assert found == [
        ("cat.png", "image"),
        ("dog.png", "image"),
        ("f_1.png", "image"),
        ("f_2.png", "image"),
        ("frames", "frames"),
        ("f_001.png", "image"),
    ]


def test_folder_of_frames_changes_with_each_image_in_it(tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(3):
        (frames / f"{number}.png").write_bytes(b"12345")
    (frames / "notes.txt").write_bytes(b"123")
    [before] = read(tmp_path)
    assert before["size_bytes"] == 15
    status = (frames / "1.png").stat()
    (frames / "1.png").write_bytes(b"54321")
    os.utime(frames / "1.png", ns=(status.st_atime_ns, status.st_mtime_ns - 10**9))
    [after] = read(tmp_path)
    assert (after["clip_id"], after["etag"] != before["etag"]) == (before["clip_id"], True), "older, of one size"


def test_links_are_followed_and_do_not_lead_round_in_circles(tmp_path: Path) -> None:
    (tmp_path / "media/inner").mkdir(parents=True)
    (tmp_path / "media/inner/a.mp4").touch()
    (tmp_path / "media/inner/up").symlink_to(tmp_path / "media")
    (tmp_path / "media/itself.mp4").symlink_to("itself.mp4")
    (tmp_path / "media/itself").symlink_to("itself")
    (tmp_path / "media/gone.mp4").symlink_to(tmp_path / "nowhere")
    (tmp_path / "media/z.mp4").symlink_to(tmp_path / "media/inner/a.mp4")
    found = {Path(str(clip["uri"])).name: clip["size_bytes"] for clip in read(tmp_path / "media")}
    assert found == {"gone.mp4": None, "a.mp4": 0, "z.mp4": 0, "itself.mp4": None}


def test_one_media_file_is_a_source_too(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"123")
    [clip] = read(tmp_path / "a.mp4")
    assert (clip["uri"], clip["size_bytes"]) == (str(tmp_path / "a.mp4"), 3)


def test_name_that_is_no_text_is_a_failed_clip(tmp_path: Path) -> None:
    try:
        (tmp_path / os.fsdecode(b"bad\xff.mp4")).touch()
    except OSError:
        pytest.skip("this file system takes no such names")
    [clip] = read(tmp_path)
    assert (clip["status"], clip["error_class"]) == (FAILED, "invalid_data")
    assert "bad\\udcff.mp4" in str(clip["uri"])


def test_folder_without_media_is_refused(tmp_path: Path) -> None:
    (tmp_path / "records.json").touch()
    with pytest.raises(DataError, match=r"no file in it ends in \.mp4"):
        read(tmp_path)
