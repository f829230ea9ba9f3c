"""The rows that the report shows: frames, conversations, and clips that stand in no sample."""

import json
from pathlib import Path

from report_tables import (
    clip,
    clips_table,
    failed_clip,
    report,
    sample,
    samples_table,
    turn,
    write_shard,
)


def test_frames_and_conversations_of_drawn_rows_are_shown(tmp_path: Path) -> None:
    clips = [clip(n, row=n) for n in range(40)]
    shard = write_shard(tmp_path, clips)
    clips = [row | {"shard": shard} for row in clips]
    samples = [sample(n, [f"c{n}"], source="large.json") for n in range(39)]
    samples += [
        sample(39, ["c39"], source="small.json", conversation=[turn("user", "Where?"), turn("assistant", "There")])
    ]
    first = report(tmp_path, clips_table(clips), samples_table(samples))
    assert len(first.of("article")) == 12
    assert len(first.of("img")) == 12 * 8
    assert "small.json , 100 tokens" in first.words
    assert all(image["alt"] for image in first.of("img"))
    assert [src["src"] for src in report(tmp_path, clips_table(clips), samples_table(samples)).of("img")] == [
        src["src"] for src in first.of("img")
    ]
    other = report(tmp_path, clips_table(clips), samples_table(samples), seed=1)
    assert [src["src"] for src in other.of("img")] != [src["src"] for src in first.of("img")]


def test_clips_without_samples_are_shown_by_themselves(tmp_path: Path) -> None:
    clips = [clip(0, row=0), clip(1, row=1), failed_clip(2, "media_empty", "empty", row=2)]
    shard = write_shard(tmp_path, clips, num_frames=20)
    page = report(tmp_path, clips_table([row | {"shard": shard} for row in clips]), samples_table([]))
    assert len(page.of("article")) == 2
    assert "8 of 20 frames" in page.words


def test_clips_without_samples_are_shown_beside_those_with(tmp_path: Path) -> None:
    clips = [clip(n, row=n) for n in range(40)]
    shard = write_shard(tmp_path, clips)
    clips = [row | {"shard": shard} for row in clips]
    page = report(tmp_path, clips_table(clips), samples_table([sample(n, [f"c{n}"]) for n in range(20)]))
    headings = [heading for _, heading in page.headings if heading.startswith(("Sample", "Clip"))]
    assert [heading.split()[0] for heading in headings] == ["Sample"] * 8 + ["Clip"] * 4


def test_groups_of_images_are_called_by_their_first(tmp_path: Path) -> None:
    uri = json.dumps(["/v/a.png", "/v/b.png", "/v/c.png"])
    clips = [failed_clip(0, "media_corrupt", "bad", kind="images", uri=uri)]
    clips += [failed_clip(1, "media_corrupt", "worse", kind="images", uri="not json")]
    page = report(tmp_path, clips_table(clips), samples_table([]))
    assert page.rows("Failed with media_corrupt") == [["/v/a.png and 2 morebad", "2"], ["not jsonworse", "2"]]


def test_frames_that_are_gone_are_said_to_be_gone(tmp_path: Path) -> None:
    page = report(tmp_path, clips_table([clip(0, shard="shard-gone.arrow")]), samples_table([sample(0, ["c0"])]))
    assert "DataError: cannot map" in page.words


def test_equal_contents_are_grouped_by_digest_and_window(tmp_path: Path) -> None:
    clips = [clip(n, content_digest="aa" * 16) for n in range(13)]
    clips += [clip(20, content_digest="bb" * 16), clip(21, content_digest="bb" * 16)]
    clips += [clip(30, content_digest="cc" * 16), clip(31, content_digest="cc" * 16, start_s=1.0), clip(32)]
    page = report(tmp_path, clips_table(clips), samples_table([]))
    rows = page.rows("Clips with equal contents")
    assert [row[1] for row in rows] == ["13", "2"]
    assert rows[0][0].startswith("/videos/v0.mp4")
    assert "and 3 more" in rows[0][0]
    assert "/videos/v21.mp4" in rows[1][0]
    assert "13 clips, in 2 groups." in page.words
