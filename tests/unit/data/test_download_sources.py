"""Lists become rows: every row keeps its place, one URL is one download, and no name leaves the media root."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from valley_ray.config import validate_config
from valley_ray.data.download.config import DownloadConfig
from valley_ray.data.download.sources import Row, read_rows
from valley_ray.data.sources.valley_instruct import parse_vatex_id
from valley_ray.errors import ConfigError, DataError

URL = "https://media.example/clips/A clip.webm?key=secret"


def config_of(*sources: dict[str, Any], **settings: Any) -> DownloadConfig:
    return validate_config(DownloadConfig, {"sources": sources, "media_root": "media"} | settings, source="test")


def rows_of(path: Path, **settings: Any) -> list[Row]:
    return read_rows(config_of({"kind": "urls", "path": path, **settings}))


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_vatex_ids_are_an_id_and_a_window() -> None:
    assert parse_vatex_id("Ptf_2VRj-V0_000122_000132") == ("Ptf_2VRj-V0", 122.0, 132.0)
    assert parse_vatex_id("___________-"[:11] + "_000000_000010") == ("___________", 0.0, 10.0)
    for wrong in ("", "Ptf_2VRj-V0", "Ptf_2VRj-V0_122_132", "Ptf_2VRj/V0_000122_000132", "Ptf_2VRj-V0_000122_000132\n"):
        with pytest.raises(DataError, match="videoID must read"):
            parse_vatex_id(wrong)
    with pytest.raises(DataError, match="before its start"):
        parse_vatex_id("Ptf_2VRj-V0_000132_000122")


def test_windows_of_one_video_share_its_download(tmp_path: Path) -> None:
    ids = ["aaaaaaaaaaa_000001_000011", "bbbbbbbbbbb_000000_000010", "aaaaaaaaaaa_000020_000030", "nonsense", 7]
    path = write_json(tmp_path / "vatex.json", [{"videoID": name, "enCap": ["a"]} for name in ids])
    rows = read_rows(config_of({"kind": "vatex", "path": path, "folder": "VATEX"}))
    assert [row.row_id for row in rows] == [*ids[:4], "7"]
    assert [row.path for row in rows[:3]] == [f"VATEX/v_{c * 11}.mp4" for c in "aba"]
    assert [(row.start_s, row.end_s) for row in rows[:3]] == [(1.0, 11.0), (0.0, 10.0), (20.0, 30.0)]
    assert rows[0].download_id == rows[2].download_id != rows[1].download_id
    assert rows[0].url == "https://www.youtube.com/watch?v=aaaaaaaaaaa"
    assert {row.method for row in rows} == {"page"}
    assert [bool(row.error) for row in rows] == [False, False, False, True, True]


def test_categories_become_questions_to_an_api(tmp_path: Path) -> None:
    videos = {"Pets": [{"jmId": 12, "title": "x"}, {"jmId": "a/b"}, {"title": "x"}], "Art": [{"jmId": 12}]}
    path = write_json(tmp_path / "jukin.json", videos)
    source = {"kind": "categories", "path": path, "api_url": "https://api.example/v/{id}?x=1", "folder": "jukinmedia"}
    rows = read_rows(config_of(source))
    assert [row.url for row in rows] == [
        f"https://api.example/v/{x}?x=1" if x else "" for x in ("12", "a%2Fb", "", "12")
    ]
    assert [row.path for row in rows] == ["jukinmedia/v_12.mp4", "jukinmedia/v_a/b.mp4", "", "jukinmedia/v_12.mp4"]
    assert rows[0].download_id == rows[3].download_id
    assert "'jmId'" in rows[2].error


@pytest.mark.parametrize("ending", ["csv", "jsonl", "json", "parquet"])
def test_lists_give_url_name_and_expectations(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"list.{ending}"
    records = [
        {"link": URL, "name": "", "id": "", "sha256": "", "size_bytes": ""},
        {"link": "http://b.example/x", "name": "in/b.mp4", "id": "B", "sha256": "A" * 64, "size_bytes": "12"},
        {"link": "http://b.example/y.mkv", "name": "", "id": "C", "sha256": "zz", "size_bytes": ""},
        {"link": "gopher://b.example/y", "name": "", "id": "D", "sha256": "", "size_bytes": ""},
        {"link": "http://b.example/z.mkv", "name": "", "id": "E", "sha256": "", "size_bytes": "many"},
    ]
    if ending == "csv":
        keys = list(records[0])
        path.write_text("\n".join([",".join(keys), *(",".join(f'"{r[k]}"' for k in keys) for r in records)]))
    elif ending == "jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records))
    elif ending == "json":
        write_json(path, records)
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    rows = rows_of(path, url_key="link", folder="sub")
    assert [row.row_id for row in rows] == [f"list.{ending}#0", "B", "C", "D", "E"]
    assert rows[0].path.startswith("sub/A_clip-")
    assert rows[0].path.endswith(".webm")
    assert rows[0].shown_url == "https://media.example/clips/A clip.webm"
    assert (rows[1].path, rows[1].sha256, rows[1].size_bytes) == ("sub/in/b.mp4", "a" * 64, 12)
    assert [row.error.split("must")[0] for row in rows] == ["", "", "'sha256' ", "'link' ", "'size_bytes' "]


def test_a_text_file_holds_a_url_a_line(tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text("# mine\nhttp://a.example/x.mp4\n\n http://a.example/y.mp4 \nnonsense\n")
    rows = rows_of(tmp_path / "urls.txt")
    assert [row.url for row in rows] == ["http://a.example/x.mp4", "http://a.example/y.mp4", ""]
    assert len({row.path for row in rows}) == 3
    assert [row.url for row in rows_of(tmp_path / "urls.txt", limit=1)] == ["http://a.example/x.mp4"]


def test_no_name_leads_out_of_the_media_root(tmp_path: Path) -> None:
    names = [
        "../a.mp4",
        "/etc/a.mp4",
        "a/../../b.mp4",
        "a\0.mp4",
        ".hidden.mp4",
        "x.part",
        "n" * 300 + ".mp4",
        "a\n.mp4",
    ]
    records = [{"url": f"http://a.example/{i}", "name": name} for i, name in enumerate(names)]
    rows = rows_of(write_json(tmp_path / "list.json", records))
    assert [row.error for row in rows if "no file name below media_root" not in row.error] == []
    with pytest.raises(ConfigError, match="below media_root"):
        rows_of(tmp_path / "list.json", folder="../x")


def test_one_url_is_one_download_and_one_name_is_one_url(tmp_path: Path) -> None:
    digest = "0" * 64
    records = [
        {"url": "http://a.example/1", "name": "one.mp4"},
        {"url": "http://a.example/1", "name": "other.mp4", "sha256": digest},
        {"url": "http://a.example/1", "sha256": "1" * 64},
        {"url": "http://a.example/2", "name": "one.mp4"},
    ]
    rows = rows_of(write_json(tmp_path / "list.json", records))
    assert [row.path for row in rows] == ["one.mp4", "one.mp4", rows[2].path, "one.mp4"]
    assert [row.sha256 for row in rows[:2]] == [digest, digest]
    assert "another sha256" in rows[2].error
    assert "another URL's" in rows[3].error


def test_lists_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("link\nhttp://a.example/\n")
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "a.parquet").write_text("no")
    (tmp_path / "empty.txt").write_text("")
    expected = {
        "a.csv": "no column 'url' .*link.*set url_key",
        "a.json": "not valid JSON",
        "a.parquet": "cannot be read",
        "empty.txt": "no row",
        "gone.txt": "cannot read",
        "a.xlsx": "must end in",
    }
    for name, words in expected.items():
        with pytest.raises(DataError, match=words) as caught:
            rows_of(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_pages_take_no_headers() -> None:
    for source in ({"kind": "vatex"}, {"kind": "urls", "method": "page"}):
        with pytest.raises(ConfigError, match="give cookies_file"):
            config_of({"path": "a.json", "headers_file": "h.txt", **source})
