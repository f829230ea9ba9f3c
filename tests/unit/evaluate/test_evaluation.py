"""A checkpoint's model is measured in one process: numbers, predictions, a line per step, a page that is safe."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from asked import make_records, record, settings
from pydantic import ValidationError
from report_tables import Page

from valley_ray.errors import CheckpointError, ConfigError, DataError
from valley_ray.evaluate.evaluation import check_evaluation, evaluate_checkpoint, read_evaluations
from valley_ray.evaluate.predictions import PREDICTIONS_SCHEMA

HOSTILE = "<script>document.title = 'owned'</script>"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_records(tmp_path_factory.mktemp("asked"))
    values = json.loads(path.read_text(encoding="utf-8"))
    values.append(record(HOSTILE, "0.mp4", f"Which {HOSTILE}"))
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def evaluated(
    tmp_path_factory: pytest.TempPathFactory, tiny_valley: Path, records: Path
) -> tuple[Path, dict[str, float]]:
    output = tmp_path_factory.mktemp("run")
    return output, evaluate_checkpoint(tiny_valley, settings(records), output=output, step=20)


def test_numbers_are_finite_named_and_counted_over_all_rows(evaluated: tuple[Path, dict[str, float]]) -> None:
    output, metrics = evaluated
    assert set(metrics) == {"answered", "exact_match", "qa_accuracy", "bleu", "rouge_1", "rouge_2", "rouge_l"}
    assert metrics["answered"] == pytest.approx(10 / 13)
    summary = json.loads((output / "evaluation/step-00000020/metrics.json").read_text(encoding="utf-8"))
    assert (summary["rows_in"], summary["ok"], summary["failed"]) == (13, 10, 3)
    assert summary["metrics"] == metrics
    assert {kind: of["rows"] for kind, of in summary["by_kind"].items()} == {"What": 5, "How": 3, "Which": 4, "": 1}


def test_predictions_hold_every_row_with_its_numbers(evaluated: tuple[Path, dict[str, float]]) -> None:
    output, metrics = evaluated
    table = pq.read_table(output / "evaluation/step-00000020/predictions.parquet")
    assert table.schema.equals(PREDICTIONS_SCHEMA)
    rows = table.to_pylist()
    assert len(rows) == 13
    ok = [row for row in rows if row["status"] == "ok"]
    assert sum(row["rouge_1"] for row in ok) / len(ok) == pytest.approx(metrics["rouge_1"])
    assert {row["question"] for row in ok} >= {"What is moving?", f"Which {HOSTILE}"}
    assert all(row["rouge_1"] is None and row["error"] for row in rows if row["status"] == "failed")


def test_a_line_per_step_and_a_step_that_is_done_again_replaces_its_line(
    evaluated: tuple[Path, dict[str, float]], tiny_valley: Path, records: Path
) -> None:
    output, metrics = evaluated
    shards = set((output / "evaluation/shards").glob("*.arrow"))
    for step in (10, 20):
        assert evaluate_checkpoint(tiny_valley, settings(records), output=output, step=step) == metrics
    lines = read_evaluations(output / "evaluation.jsonl")
    assert [line["step"] for line in lines] == [10, 20]
    assert all(line["exact_match"] == metrics["exact_match"] and line["seconds"] > 0 for line in lines)
    assert set((output / "evaluation/shards").glob("*.arrow")) == shards, "later checkpoints decode nothing"
    assert not (output / "evaluation/answers").exists()


def test_the_page_shows_rows_with_frames_and_runs_nothing(evaluated: tuple[Path, dict[str, float]]) -> None:
    html = (evaluated[0] / "evaluation/step-00000020/predictions.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert all(one["src"].startswith("data:image/webp;base64,") for one in page.of("img"))
    assert len(page.of("img")) == 10 * 4
    assert len(page.rows("Answers")) == 10
    assert f"Which {HOSTILE}" in page.words
    assert [row[1] for row in page.rows("Questions without an answer")] == [
        "invalid_conversation",
        "media_not_recognised",
        "source_not_found",
    ]
    assert [row[:2] for row in page.rows("Numbers by kind of question")] == [
        ["What", "5"],
        ["Which", "4"],
        ["How", "3"],
        ["not said", "1"],
    ]


def test_clips_that_no_record_asks_about_are_answered_without_numbers(tiny_valley: Path, tmp_path: Path) -> None:
    folder = make_records(tmp_path / "asked").parent
    (folder / "records.json").unlink()
    config = settings(folder, question="What is moving?", best="answered")
    assert evaluate_checkpoint(tiny_valley, config, output=tmp_path / "run") == {"answered": 3 / 4}
    rows = pq.read_table(tmp_path / "run/evaluation/latest/predictions.parquet").to_pylist()
    assert [Path(row["sample_id"]).name for row in rows if row["prediction"]] == ["0.mp4", "1.mp4", "2.mp4"]
    page = Page((tmp_path / "run/evaluation/latest/predictions.html").read_text(encoding="utf-8"))
    assert [row[2] for row in page.rows("Answers")] == ["no reference"] * 3
    fewer = settings(folder, question="What is moving?", best="answered", max_samples=1, seed=1)
    assert evaluate_checkpoint(tiny_valley, fewer, output=tmp_path / "run") == {"answered": 1.0}


def test_mistakes_are_said_before_a_model_is_opened(tiny_valley: Path, records: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs model and output"):
        check_evaluation(settings(records))
    with pytest.raises(CheckpointError, match="no model folder"):
        check_evaluation(settings(records, model=tmp_path, output=tmp_path))
    with pytest.raises(DataError, match="no such file"):
        check_evaluation(settings(tmp_path / "none.json", model=tiny_valley, output=tmp_path))
    with pytest.raises(CheckpointError, match="bertscore_model"):
        check_evaluation(settings(records, model=tiny_valley, output=tmp_path, bertscore_model=tmp_path))
    with pytest.raises(ValidationError, match="best='judge_score' is none of the metrics"):
        settings(records, best="judge_score")
    with pytest.raises(ConfigError, match="folder to write to"):
        evaluate_checkpoint(tiny_valley, settings(records))


def test_a_split_that_nothing_could_be_asked_of_is_an_error_that_says_why(tiny_valley: Path, tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(json.dumps([record("a", "missing.mp4", "What?")]), encoding="utf-8")
    with pytest.raises(DataError, match=r"none of 1 questions was answered \(source_not_found 1\)"):
        evaluate_checkpoint(tiny_valley, settings(path), output=tmp_path / "run", step=1)
    assert not (tmp_path / "run" / "evaluation.jsonl").exists()
    assert not (tmp_path / "run" / "evaluation" / "answers").exists(), "an answer that nobody comes back to"
