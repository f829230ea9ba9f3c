"""Answers as files: a row per question in both, counted, each failed one with a class and a line."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from asked import NUM_CLIPS, QUESTIONS, make_records, record, settings

from valley_ray.evaluate.answer_files import ANSWER_ROWS_SCHEMA, AnswerSummary, write_answers
from valley_ray.evaluate.answers import AnswerSet, answer


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_records(tmp_path_factory.mktemp("asked"))


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory, tiny_valley: Path, records: Path
) -> tuple[Path, AnswerSet, AnswerSummary]:
    output = tmp_path_factory.mktemp("answers")
    answers = answer(settings(records), tiny_valley, output, on_ray=False)
    return output, answers, write_answers(answers, output)


def test_both_files_hold_the_same_rows_in_the_order_of_the_sources(
    written: tuple[Path, AnswerSet, AnswerSummary], records: Path
) -> None:
    output, answers, _ = written
    table = pq.read_table(output / "answers.parquet")
    assert table.schema.equals(ANSWER_ROWS_SCHEMA)
    lines = (output / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == table.to_pylist()
    assert table["sample_id"].to_pylist() == [one["id"] for one in json.loads(records.read_text(encoding="utf-8"))]
    assert table["answer"].to_pylist() == answers.table["prediction"].to_pylist()


def test_a_row_says_what_was_asked_of_which_clip(written: tuple[Path, AnswerSet, AnswerSummary], records: Path) -> None:
    rows = {row["sample_id"]: row for row in pq.read_table(written[0] / "answers.parquet").to_pylist()}
    for question in QUESTIONS:
        for seed in range(NUM_CLIPS):
            row = rows[f"{seed}-{question}"]
            shown = {"uri": str(records.parent / f"{seed}.mp4"), "start_s": None, "end_s": None}
            assert (row["question"], row["media"]) == (question, [shown])
            assert row["reference"] == "A red circle moves left."
            assert row["num_new_tokens"] > 0


def test_the_recorded_answer_is_not_shown_to_the_model(tiny_valley: Path, records: Path, tmp_path: Path) -> None:
    values = json.loads(records.read_text(encoding="utf-8"))
    asked = [one for one in values if one.get("conversations") and one["video"] == "0.mp4"]
    for number, words in enumerate(("A red circle moves left.", "Nothing moves in this clip.")):
        for one in asked:
            one["conversations"][-1]["value"] = words
        (records.parent / f"{number}.json").write_text(json.dumps(asked), encoding="utf-8")
    files = [settings(records.parent / f"{number}.json") for number in range(2)]
    first, second = (answer(one, tiny_valley, tmp_path / "out", on_ray=False) for one in files)
    assert first.table["reference"] != second.table["reference"]
    assert first.table["prediction"] == second.table["prediction"]
    assert (first.num_answered, second.num_answered) == (len(asked), 0), "it is not part of what is asked"


def test_rows_are_counted_and_failed_ones_say_why_in_a_line(written: tuple[Path, AnswerSet, AnswerSummary]) -> None:
    output, _, summary = written
    assert (summary.rows_in, summary.ok, summary.failed, summary.repeated_rows) == (12, 9, 3, 0)
    assert summary.asked == 11
    assert summary.by_error_class == {"media_not_recognised": 1, "source_not_found": 1, "invalid_conversation": 1}
    rows = [row for row in pq.read_table(output / "answers.parquet").to_pylist() if row["status"] == "failed"]
    assert all(row["answer"] is None and row["error"] and "\n" not in row["error"] for row in rows)
    assert json.loads((output / "answers-summary.json").read_text(encoding="utf-8"))["ok"] == 9
    text = summary.text()
    assert "rows     12: 9 ok, 3 failed (" in text
    assert str(output / "answers.jsonl") in text


def test_clips_without_records_are_asked_the_one_question(tiny_valley: Path, tmp_path: Path) -> None:
    records = make_records(tmp_path / "set")
    values = json.loads(records.read_text(encoding="utf-8"))[:1]
    records.write_text(json.dumps(values), encoding="utf-8")
    folder = {"path": str(records.parent)}
    config = settings(records, question="Which colour?")
    config = config.model_validate(config.model_dump() | {"sources": [{"path": str(records)}, folder]})
    summary = write_answers(answer(config, tiny_valley, tmp_path / "out", on_ray=False), tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "answers.parquet").to_pylist()
    names = [Path(row["media"][0]["uri"]).name for row in rows]
    assert names == [values[0]["video"], *sorted({"0.mp4", "1.mp4", "2.mp4", "broken.mp4"} - {values[0]["video"]})]
    assert [row["question"] for row in rows[1:]] == ["Which colour?"] * 3
    assert (summary.ok, summary.failed) == (3, 1)


def test_a_set_without_one_answer_is_written_with_its_reasons(tiny_valley: Path, tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(json.dumps([record("a", "missing.mp4", "What?")]), encoding="utf-8")
    summary = write_answers(answer(settings(path), tiny_valley, tmp_path / "out", on_ray=False), tmp_path / "out")
    assert (summary.rows_in, summary.ok, summary.failed) == (1, 0, 1)
    assert json.loads((tmp_path / "out" / "answers.jsonl").read_text(encoding="utf-8"))["answer"] is None
