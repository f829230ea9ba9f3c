"""Tables of one's own become clips and samples, row by row."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from valley_ray.data.schema import FAILED, PENDING
from valley_ray.data.sources import CatalogRow, SourceConfig, open_source
from valley_ray.errors import DataError

TURNS = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "That."}]


def read(path: Path, **values: Any) -> list[CatalogRow]:
    format_name, rows = open_source(SourceConfig(path=path, **values))
    assert format_name == "table"
    return list(rows)


def facts(row: CatalogRow) -> tuple[Any, ...]:
    assert row.sample is not None
    clips = [(clip["kind"], Path(clip["uri"]).name, clip["start_s"], clip["end_s"]) for clip in row.clips]
    return row.sample["sample_id"], [turn["content"] for turn in row.sample["conversation"]], clips


def test_the_same_rows_come_from_csv_json_lines_and_parquet(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "id": "x",
            "video": "a.mp4",
            "start_s": 1.5,
            "end_s": 3.0,
            "question": "What, then?",
            "answer": "That\nthere.",
        },
        {"id": "y", "video": "b.mp4", "start_s": None, "end_s": None, "question": "<video>Why?", "answer": "So."},
    ]
    with (tmp_path / "t.csv").open("w", encoding="utf-8-sig", newline="") as file:
        file.write("id,video,start_s,end_s,question,answer\r\n")
        file.write('x,a.mp4,1.5,3,"What, then?","That\nthere."\r\n')
        file.write("y,b.mp4,,,<video>Why?,So.\r\n")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    want = [
        ("x", ["<video>\nWhat, then?", "That\nthere."], [("video", "a.mp4", 1.5, 3.0)]),
        ("y", ["<video>Why?", "So."], [("video", "b.mp4", None, None)]),
    ]
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        assert [facts(row) for row in read(tmp_path / name)] == want, name


def test_conversations_come_as_lists_or_as_text(tmp_path: Path) -> None:
    turns = json.dumps(TURNS)
    (tmp_path / "t.tsv").write_text('media\tconversations\na.mp4\t"' + turns.replace('"', '""') + '"\n')
    pq.write_table(pa.Table.from_pylist([{"media": "a.mp4", "conversations": TURNS}]), tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text(
        json.dumps({"id": "a", "media": "i.png", "conversations": TURNS})
        + "\n"
        + json.dumps({"id": "b", "conversations": [{"from": "human", "value": "Hi"}, TURNS[1]]})
        + "\n"
        + json.dumps({"video": "a/b.mp4", "QA": [{"q": "A?", "a": "B"}]})
        + "\n"
        + json.dumps({"id": "c", "v_id": "cut45678901_000010_000020", "conversations": TURNS})
        + "\n"
        + json.dumps({"image": ["a.png", "b.png"], "question": "Which?", "answer": "This."})
        + "\n"
    )
    for name in ("t.tsv", "t.parquet"):
        assert [facts(row)[1:] for row in read(tmp_path / name)] == [
            (["<video>\nWhat?", "That."], [("video", "a.mp4", None, None)])
        ]
    assert [facts(row) for row in read(tmp_path / "t.jsonl")] == [
        ("a", ["<video>\nWhat?", "That."], [("image", "i.png", None, None)]),
        ("b", ["Hi", "That."], []),
        ("t.jsonl#2", ["<video>\nA?", "B"], [("video", "b.mp4", None, None)]),
        ("c", ["<video>\nWhat?", "That."], [("video", "v_cut45678901.mp4", 10, 20)]),
        ("t.jsonl#4", ["<image>\n<image>\nWhich?", "This."], [("image", n, None, None) for n in ("a.png", "b.png")]),
    ]


def test_table_without_words_names_clips(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("video,start_s,end_s\na.mp4,,\na.mp4,2,4\n,,\n")
    rows = read(tmp_path / "t.csv")
    assert [row.sample for row in rows] == [None] * 3
    clips = [row.clips[0] for row in rows]
    assert [(clip["start_s"], clip["end_s"], clip["status"]) for clip in clips] == [
        (None, None, PENDING),
        (2, 4, PENDING),
        (None, None, FAILED),
    ]
    assert len({clip["clip_id"] for clip in clips}) == 3
    assert clips[2]["uri"] == "t.csv: row 2"
    assert "needs a file in video, image, media" in clips[2]["error"]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"video": None}, "a question needs a file"),
        ({"video": 5}, "must be a file name"),
        ({"question": ""}, "needs a question and an answer"),
        ({"answer": 3}, "needs a question and an answer"),
        ({"answer": " "}, "no answer to learn from"),
        ({"start_s": -1}, "'start_s' must be seconds"),
        ({"start_s": "soon"}, "'start_s' must be seconds"),
        ({"end_s": True}, "'end_s' must be seconds"),
        ({"start_s": 3, "end_s": 3}, "ends at 3 s, not after its start at 3 s"),
        ({"end_s": 0}, "not after its start at 0 s"),
        ({"media": "x.mp4"}, "'media' beside video"),
        ({"video": None, "media": ["x.mp4", "y.png"]}, "lists images and videos"),
        ({"conversations": "{nonsense"}, "must be a JSON list of turns"),
        ({"id": 1.5}, "needs an 'id'"),
    ],
)
def test_row_that_cannot_be_used_fails_with_a_reason(tmp_path: Path, values: dict[str, Any], reason: str) -> None:
    good = {"id": "a", "video": "a.mp4", "question": "What?", "answer": "That."}
    (tmp_path / "t.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | values) + "\n")
    first, second = read(tmp_path / "t.jsonl")
    assert first.sample is not None
    assert second.sample is not None
    assert (first.sample["status"], second.sample["status"]) == (PENDING, FAILED)
    assert reason in second.sample["error"]


def test_uneven_line_of_csv_fails_and_its_neighbours_stay(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("video,question,answer\na.mp4,What?,That.\nb.mp4,Why, then?,So.\nc.mp4,Who?,He.\n")
    statuses = [row.sample["status"] for row in read(tmp_path / "t.csv") if row.sample]
    assert statuses == [PENDING, FAILED, PENDING]


def test_folder_of_tables_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("part-1", "part-0", "_skipped"):
        pq.write_table(pa.Table.from_pylist([{"id": name, "video": "a.mp4"}]), tmp_path / f"{name}.parquet")
        (tmp_path / f"{name}.jsonl").write_text("")
    _, rows = open_source(SourceConfig(path=tmp_path, format="table"))
    assert len(list(rows)) == 2


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.csv", b"", "is empty"),
        ("t.csv", b"name,url\n1,2\n", "got the columns name, url; expected some of id, video"),
        ("t.csv", b"video,video\n1,2\n", "column 'video' is there twice"),
        ("t.csv", b'video\n"never closed\n', "not valid CSV"),
        ("t.csv", b"video\n\xff.mp4\n", "not UTF-8 text"),
        ("t.jsonl", b"{nonsense\n", "line 1 of"),
        ("t.parquet", b"PAR1 nonsense", "cannot read records"),
    ],
)
def test_table_that_cannot_be_read_is_refused(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        read(tmp_path / name)
