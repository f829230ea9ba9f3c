"""Kinds of questions of the three QA benchmarks' formats and of records that say them."""

import json
from pathlib import Path
from typing import Any

from valley_ray.data.sources import SourceConfig, read_catalog, write_catalog
from valley_ray.evaluate.config import AnswerSettings
from valley_ray.evaluate.kinds import read_kinds
from valley_ray.evaluate.questions import question_of, read_questions


def write(path: Path, records: Any) -> str:
    path.write_text(json.dumps(records), encoding="utf-8")
    return str(path)


def questions(folder: Path, *sources: SourceConfig, **changes: Any) -> list[dict[str, Any]]:
    settings = AnswerSettings(sources=sources, **changes)
    summary = write_catalog(settings.sources, folder / "catalog")
    clips, samples = read_catalog(folder / "catalog")
    kinds = read_kinds(settings.sources, summary)
    asked = read_questions(clips, samples, settings, summary=summary, kinds=kinds)
    return [row for batch in asked for row in batch.to_pylist()]


def test_activitynet_qa_says_its_kinds_by_number(tmp_path: Path) -> None:
    path = write(
        tmp_path / "test_q.json",
        [
            {"video_name": "a", "question": "is he old", "question_id": "q1"},
            {"video_name": "a", "question": "what colour", "question_id": "q2"},
            {"video_name": "b", "question": "where", "question_id": "q3"},
        ],
    )
    answers = [("q1", "no", 3), ("q2", "red", 4), ("q3", "park", 77)]
    write(tmp_path / "test_a.json", [{"question_id": i, "answer": a, "type": t} for i, a, t in answers])
    rows = questions(tmp_path, SourceConfig(path=path))
    assert [(row["sample_id"], row["kind"], row["reference"]) for row in rows] == [
        ("q1", "yes/no", "no"),
        ("q2", "color", "red"),
        ("q3", "77", "park"),
    ]


def test_msvd_and_msrvtt_go_by_the_first_word_of_the_question(tmp_path: Path) -> None:
    records = [
        {"question": text, "answer": "x", "video_id": 1, "id": number, "category_id": 2}
        for number, text in enumerate(["what is it?", "Who sings", "does he?"])
    ]
    rows = questions(tmp_path, SourceConfig(path=write(tmp_path / "test_qa.json", records)))
    assert [row["kind"] for row in rows] == ["what", "who", "other"]
    assert [question_of(row["messages"]) for row in rows] == ["what is it?", "Who sings", "does he?"]


def test_records_may_say_their_kind_and_an_id_of_two_sources_is_not_mixed_up(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<video>\nq"}, {"from": "gpt", "value": "a"}]
    sources = [
        SourceConfig(
            path=write(tmp_path / f"{kind}.json", [{"id": "1", "video": "v.mp4", "conversations": turns} | say])
        )
        for kind, say in (("one", {"kind": "color"}), ("two", {"type": "shape"}), ("three", {}))
    ]
    rows = questions(tmp_path, *sources)
    assert [(row["sample_id"], row["source"], row["kind"]) for row in rows] == [
        ("1", "one.json", "color"),
        ("1#2", "two.json", "shape"),
        ("1#3", "three.json", ""),
    ]


def test_every_answer_of_a_conversation_is_a_row_with_the_turns_before_it(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "<video>\nfirst"},
        {"from": "gpt", "value": "one"},
        {"from": "human", "value": "second"},
        {"from": "gpt", "value": "two"},
    ]
    path = write(tmp_path / "r.json", [{"id": "a", "video": "v.mp4", "conversations": turns}, {"id": "broken"}])
    rows = questions(tmp_path, SourceConfig(path=path))
    assert [(row["sample_id"], row["turn"], row["reference"], len(row["messages"]), row["status"]) for row in rows] == [
        ("a", 0, "one", 1, "pending"),
        ("a", 1, "two", 3, "pending"),
        ("broken", 0, None, 0, "failed"),
    ]
    assert rows[0]["clip_ids"] == rows[1]["clip_ids"] != []
    last = questions(tmp_path, SourceConfig(path=path), turns="last")
    assert [(row["sample_id"], row["turn"]) for row in last] == [("a", 1), ("broken", 0)]


def test_clips_of_a_folder_are_asked_the_one_question(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    for name in ("a.mp4", "b.png"):
        (tmp_path / "media" / name).write_bytes(b"")
    rows = questions(tmp_path, SourceConfig(path=str(tmp_path / "media")), question="What is moving?")
    assert [(Path(row["sample_id"]).name, row["messages"][0]["content"]) for row in rows] == [
        ("a.mp4", "<video>\nWhat is moving?"),
        ("b.png", "<image>\nWhat is moving?"),
    ]
    assert [row["reference"] for row in rows] == [None, None]


def test_a_draw_of_samples_depends_on_the_seed_alone(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<video>\nq"}, {"from": "gpt", "value": "a"}]
    records = [{"id": str(number), "video": "v.mp4", "conversations": turns} for number in range(50)]
    source = SourceConfig(path=write(tmp_path / "r.json", records))
    drawn = [[row["sample_id"] for row in questions(tmp_path, source, max_samples=10, seed=seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 10
    assert drawn[0] == sorted(drawn[0], key=int)
