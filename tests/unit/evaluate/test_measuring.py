"""Measuring holds a batch of rows, however many there are."""

import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from asked import settings

from valley_ray.data.mapped import mapped
from valley_ray.data.schema import CLIPS_SCHEMA
from valley_ray.evaluate.answers import ANSWERS_SCHEMA, AnswerSet
from valley_ray.evaluate.page import write_page
from valley_ray.evaluate.predictions import measure, summary_of, write_predictions

NUM_ROWS, NUM_PER_BATCH = 6000, 500
BYTES_PER_ROW = 200
"""Places and marks of a row that may be drawn for the page; its dict alone takes ten times as many."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> AnswerSet:
    """Long answers, every fourth one right, every tenth row failed."""
    folder = tmp_path_factory.mktemp("many")

    def batch(first: int) -> pa.RecordBatch:
        rows = []
        for number in range(first, first + NUM_PER_BATCH):
            named = {"sample_id": f"sample-{number}", "turn": 0, "source": f"source-{number % 3}", "kind": ""}
            said = {"reference": f"{number % 4}" * 200, "prediction": "0" * 200, "clip_ids": [], "clips": []}
            asked = {"messages": [{"role": "user", "content": f"What is {number}? " + "?" * 200}]}
            status = {"status": "ok", "error_class": "", "error": ""}
            if number % 10 == 0:
                said["prediction"] = None
                status = {"status": "failed", "error_class": "media_empty", "error": "nothing in it"}
            rows.append(named | said | asked | status)
        return pa.RecordBatch.from_pylist(rows, schema=ANSWERS_SCHEMA)

    table = mapped((batch(first) for first in range(0, NUM_ROWS, NUM_PER_BATCH)), ANSWERS_SCHEMA, folder)
    return AnswerSet(table, CLIPS_SCHEMA.empty_table(), folder, folder / "shards", NUM_ROWS, 1.0)


def test_memory_does_not_hold_the_rows_that_are_measured(answers: AnswerSet, tmp_path: Path) -> None:
    config = settings(tmp_path / "records.json", metrics=("exact_match",))
    tracemalloc.start()
    try:
        rows = measure(answers, config, tmp_path / "judged.jsonl")
        summary = summary_of(rows, answers)
        write_predictions(rows, summary, tmp_path)
        write_page(rows, summary, answers.shards_dir, tmp_path / "page.html", title="Many", seed=0)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A batch of rows of 2 to 3 KB is there at a time, the failed rows of the page, and what it is told of each row.
    assert peak_bytes < 3 * NUM_PER_BATCH * 3000 + NUM_ROWS * BYTES_PER_ROW, (
        f"{peak_bytes / NUM_ROWS:.0f} bytes per row"
    )
    assert (summary["rows_in"], summary["ok"], summary["failed"]) == (NUM_ROWS, NUM_ROWS * 9 // 10, NUM_ROWS // 10)
    # Right are those whose number divides by four, of which every fifth is among the failed ones.
    assert summary["metrics"]["exact_match"] == pytest.approx((NUM_ROWS / 4 - NUM_ROWS / 20) / (NUM_ROWS * 9 / 10))
    assert [of["rows"] for of in summary["by_source"].values()] == [NUM_ROWS / 3] * 3
