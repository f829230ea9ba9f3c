"""What an evaluation leaves: predictions with their numbers as Parquet, the numbers of the whole as JSON."""

import math
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from valley_ray.data.commit import write_json
from valley_ray.data.mapped import TableRows, mapped
from valley_ray.evaluate.answers import AnswerSet
from valley_ray.evaluate.config import EvaluationConfig
from valley_ray.evaluate.judge import Case, judge
from valley_ray.evaluate.ledger import CLIPS_TYPE
from valley_ray.evaluate.metrics import COLUMNS, is_measured, row_metrics, summarize, summarize_by
from valley_ray.evaluate.questions import BATCH_ROWS, question_of

if TYPE_CHECKING:
    from valley_ray.evaluate.bertscore import BertScore

PREDICTIONS_FILE, METRICS_FILE, PAGE_FILE, JUDGED_FILE = (
    "predictions.parquet",
    "metrics.json",
    "predictions.html",
    "judged.jsonl",
)

PREDICTIONS_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("turn", pa.int32()),
        ("source", pa.string()),
        ("kind", pa.string()),
        ("question", pa.string()),
        ("reference", pa.string()),
        ("prediction", pa.string()),
        *((name, pa.float64()) for name in COLUMNS),
        ("finish_reason", pa.string()),
        ("num_prompt_tokens", pa.int32()),
        ("num_new_tokens", pa.int32()),
        ("clip_ids", pa.list_(pa.string())),
        ("clips", CLIPS_TYPE),
        ("status", pa.string()),
        ("error_class", pa.string()),
        ("error", pa.string()),
        ("judge_error", pa.string()),
    ]
)
"""predictions. One row per question, in the order of the sources; (sample_id, turn) names it. question: the last user
turn without its marks. reference: null where there is none. prediction: null where status is failed. The numbers are
those of metrics.py, null where they were not asked for or could not be computed; judge_error: why there is no verdict.
clips: shard and row of the frames that were shown."""

Row = dict[str, Any]


def measure(answers: AnswerSet, settings: EvaluationConfig, kept: Path) -> TableRows:
    """Every row with its numbers (PREDICTIONS_SCHEMA), on disk; verdicts of a judge are kept in the file `kept`.

    Raises:
        CheckpointError, ConfigError: BERTScore's encoder cannot be used.
    """
    return TableRows(mapped(_measured(answers.table, settings, kept), PREDICTIONS_SCHEMA, answers.catalog_dir))


def _measured(table: pa.Table, settings: EvaluationConfig, kept: Path) -> Iterator[pa.RecordBatch]:
    encoder = _encoder(settings) if settings.bertscore_model is not None else None
    for batch in table.to_batches(max_chunksize=BATCH_ROWS):
        rows = [_row(row) | row_metrics(row, settings.metrics) for row in batch.to_pylist()]
        measured = [row for row in rows if is_measured(row)]
        if encoder is not None:
            scores = encoder.scores([row["prediction"] for row in measured], [row["reference"] for row in measured])
            for row, score in zip(measured, scores, strict=True):
                row["bertscore"] = score
        if settings.judge is not None:
            cases = [Case(row["question"], row["reference"], row["prediction"]) for row in measured]
            for row, verdict in zip(measured, judge(cases, settings.judge, kept), strict=True):
                row["judge_score"], row["judge_error"] = verdict.score, verdict.error
                row["judge_accuracy"] = None if verdict.is_right is None else float(verdict.is_right)
        yield pa.RecordBatch.from_pylist(rows, schema=PREDICTIONS_SCHEMA)


def _encoder(settings: EvaluationConfig) -> "BertScore":
    import torch

    from valley_ray.evaluate.bertscore import BertScore

    assert settings.bertscore_model is not None, "asked for"
    # Actors may run elsewhere: a driver that asks for GPUs need not have one.
    device = "cuda" if settings.actor_gpus and torch.cuda.is_available() else "cpu"
    return BertScore(settings.bertscore_model, layer=settings.bertscore_layer, device=device)


def summary_of(rows: TableRows, answers: AnswerSet) -> dict[str, Any]:
    """What metrics.json holds: counts of rows, `metrics`, and the same by source and by kind of question."""
    return {
        "rows_in": answers.rows_in,
        "ok": answers.by_status["ok"],
        "failed": answers.by_status["failed"],
        "by_error_class": dict(answers.by_error_class.most_common()),
        "without_reference": sum(row["status"] == "ok" and row["reference"] is None for row in rows),
        "without_verdict": sum(bool(row["judge_error"]) for row in rows),
        "metrics": summarize(rows),
        "by_source": summarize_by(rows, "source"),
        "by_kind": summarize_by(rows, "kind"),
        "seconds": round(answers.seconds, 3),
    }


def write_predictions(rows: TableRows, summary: Mapping[str, Any], output: Path) -> None:
    """Write predictions.parquet and metrics.json into `output`, each whole or not at all."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / PREDICTIONS_FILE
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    pq.write_table(rows.table, temporary)
    os.replace(temporary, path)
    write_json(output / METRICS_FILE, summary)


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those that are numbers."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _row(row: Row) -> Row:
    return {name: row.get(name) for name in PREDICTIONS_SCHEMA.names} | {
        "question": question_of(row["messages"]),
        "judge_error": "",
    }
