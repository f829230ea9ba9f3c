"""Tables and shards for the tests of the report, and the report read back as a reader of its HTML sees it."""

from collections.abc import Iterable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from valley_ray.data.commit import ShardWriter
from valley_ray.data.report import write_report
from valley_ray.data.schema import CLIPS_SCHEMA, FAILED, OK, SAMPLES_SCHEMA
from valley_ray.media.frames import VideoFrames

VOID = {"meta", "img", "br", "link", "input", "hr"}


def clip(number: int, **changes: Any) -> dict[str, Any]:
    """A row of the clips table that is ok."""
    row: dict[str, Any] = dict.fromkeys(CLIPS_SCHEMA.names)
    row |= {"clip_id": f"c{number}", "kind": "video", "uri": f"/videos/v{number}.mp4", "size_bytes": 1000, "etag": "1"}
    row |= {"sampling": "n8", "status": OK, "error_class": "", "error": "", "attempts": 1, "num_frames": 8, "row": 0}
    row |= {"content_digest": "", "shard": "shard-none.arrow"}
    return row | {"duration_s": 10.0, "fps": 25.0, "width": 640, "height": 360} | changes


def failed_clip(number: int, error_class: str, error: str, **changes: Any) -> dict[str, Any]:
    """A row of the clips table that failed."""
    unknown = dict.fromkeys(("duration_s", "fps", "width", "height"))
    row = {"status": FAILED, "error_class": error_class, "error": error, "num_frames": 0, "attempts": 2}
    return clip(number, **(unknown | row | changes))


def sample(number: int, clip_ids: Sequence[str] = (), **changes: Any) -> dict[str, Any]:
    """A row of the samples table that is ok."""
    row: dict[str, Any] = {"sample_id": f"s{number}", "clip_ids": list(clip_ids), "source": "a.json", "num_tokens": 100}
    said = [turn("user", "<video>\nWhat is it?"), turn("assistant", "A circle.")]
    return row | {"conversation": said, "status": OK, "error_class": "", "error": ""} | changes


def turn(role: str, content: str) -> dict[str, str]:
    """One turn of a conversation."""
    return {"role": role, "content": content, "speaker": role}


def clips_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows of the clips table."""
    return pa.Table.from_pylist(list(rows), schema=CLIPS_SCHEMA)


def samples_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows of the samples table."""
    return pa.Table.from_pylist(list(rows), schema=SAMPLES_SCHEMA)


def write_shard(directory: Path, clips: Sequence[Mapping[str, Any]], *, num_frames: int = 8, side: int = 48) -> str:
    """A shard of coloured frames for `clips`, a row each, in order; returns its name."""
    name = "shard-report.arrow"
    with ShardWriter(directory, name, fingerprint="f") as shard:
        for index, row in enumerate(clips):
            pixels = np.random.default_rng(index).integers(0, 255, (num_frames, 1, 1, 3), dtype=np.uint8)
            frames = VideoFrames(np.broadcast_to(pixels, (num_frames, side, side, 3)).copy(), np.arange(num_frames) / 2)
            values = {key: row[key] for key in ("clip_id", "status", "error_class", "error", "attempts", "etag")}
            shard.append(values | {"content_digest": ""}, frames)
    return name


class Page(HTMLParser):
    """The report as its elements: tags that are open nowhere else, texts by section, tables by label."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.headings: list[tuple[str, str]] = []
        self._open: list[str] = []
        self._label = ""
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.tags.append((tag, given))
        if tag not in VOID:
            self._open.append(tag)
        if given.get("role") == "region":
            self._label = given["aria-label"]
            assert self._label not in self.tables, f"two tables are called {self._label}"
            self.tables[self._label] = []
        elif tag == "tr":
            self.tables[self._label].append([])
        elif tag in ("td", "th"):
            self.tables[self._label][-1].append("")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text.append(data)
        if "td" in self._open or "th" in self._open:
            self.tables[self._label][-1][-1] += data
        for heading in ("h1", "h2", "h3"):
            if heading in self._open:
                self.headings[-1] = (heading, self.headings[-1][1] + data)

    def of(self, tag: str) -> list[dict[str, str]]:
        """Attributes of every element of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self) -> str:
        """All that is said, on one line."""
        return " ".join(" ".join(self.text).split())

    def rows(self, label: str) -> list[list[str]]:
        """Cells of the body of a table."""
        return [[" ".join(cell.split()) for cell in row] for row in self.tables[label][1:]]


def report(tmp_path: Path, clips: pa.Table, samples: pa.Table, **changes: Any) -> Page:
    """The page written about the tables; `changes` go to `write_report`."""
    output = tmp_path / "report.html"
    write_report(clips, samples, changes.pop("shards_dir", tmp_path), output, title="a set", **changes)
    return Page(output.read_text(encoding="utf-8"))
