"""A model folder and sources → a row per question in Parquet and in JSON lines, and how many of them failed.

    answers.parquet, answers.jsonl   the same rows (ANSWER_ROWS_SCHEMA), in the order of the sources
    answers-summary.json             AnswerSummary
beside what answers.py keeps in the folder. Each file appears whole or not at all; one of an earlier run is replaced.
"""

import dataclasses
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from valley_ray.data.commit import storing, write_json
from valley_ray.data.mapped import pick
from valley_ray.evaluate.answers import AnswerSet, answer
from valley_ray.evaluate.check import check_answers
from valley_ray.evaluate.config import AnswerSettings
from valley_ray.evaluate.questions import question_of

PARQUET_FILE, JSONL_FILE, SUMMARY_FILE = "answers.parquet", "answers.jsonl", "answers-summary.json"
_BATCH_ROWS = 4096

ANSWER_ROWS_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("turn", pa.int32()),
        ("source", pa.string()),
        ("kind", pa.string()),
        ("media", pa.list_(pa.struct([("uri", pa.string()), ("start_s", pa.float64()), ("end_s", pa.float64())]))),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("reference", pa.string()),
        ("finish_reason", pa.string()),
        ("num_prompt_tokens", pa.int32()),
        ("num_new_tokens", pa.int32()),
        ("status", pa.string()),
        ("error_class", pa.string()),
        ("error", pa.string()),
    ]
)
"""One row per question; (sample_id, turn) names it. media: what was shown, in order. question: the last user turn
without its marks. reference: the recorded answer, which the model does not see; null where there is none. answer: null
where status is failed, and error says why in one line."""


@dataclasses.dataclass(frozen=True)
class AnswerSummary:
    """What a folder of answers holds. Rows are questions: `rows_in` = `ok` + `failed` always."""

    rows_in: int
    ok: int
    failed: int
    repeated_rows: int
    """Rows of the written files that name a question a second time: 0 unless something is broken."""
    by_error_class: dict[str, int]
    """Failed rows by class."""
    asked: int
    """Rows that this run worked on; the others were there, or could not be asked."""
    output: str
    """The folder."""
    seconds: float

    def text(self) -> str:
        """The lines that a user reads."""
        output = Path(self.output)
        classes = ", ".join(f"{name} {count}" for name, count in self.by_error_class.items())
        return (
            f"rows     {self.rows_in:,}: {self.ok:,} ok, {self.failed:,} failed{f' ({classes})' if classes else ''}\n"
            f"         {self.asked:,} asked in this run\n"
            f"answers  {output / PARQUET_FILE}\n         {output / JSONL_FILE}\nsummary  {output / SUMMARY_FILE}"
        )


def answer_sources(settings: AnswerSettings) -> AnswerSummary:
    """Answer all questions of the sources with `settings.model` on the connected Ray; write `settings.output`.

    A run that was stopped is gone on with by running it again: no answer is asked for twice.

    Raises:
        ConfigError: model or output are missing, or cannot be used.
        ValleyError: as `answers.answer`.
    """
    check_answers(settings)
    model, output = settings.model, settings.output
    assert model is not None, "checked just now"
    assert output is not None, "checked just now"
    return write_answers(answer(settings, model, output, on_ray=True, shows_progress=True), output.absolute())


def write_answers(answers: AnswerSet, output: Path) -> AnswerSummary:
    """Write the three files into `output`, and count what can be read back.

    Raises:
        StorageError: the disk is full or cannot be written.
    """
    name = uuid.uuid4().hex[:8]
    paths = [output / one for one in (PARQUET_FILE, JSONL_FILE)]
    drafts = [path.with_name(f".{path.name}.{name}.tmp") for path in paths]
    with storing(output, setting="output"):
        try:
            with (
                pq.ParquetWriter(drafts[0], ANSWER_ROWS_SCHEMA) as table,
                drafts[1].open("w", encoding="utf-8") as lines,
            ):
                for rows in _rows(answers):
                    table.write_table(pa.Table.from_pylist(rows, schema=ANSWER_ROWS_SCHEMA))
                    lines.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
            for draft, path in zip(drafts, paths, strict=True):
                os.replace(draft, path)
        finally:
            for draft in drafts:
                draft.unlink(missing_ok=True)
        summary = _counted(paths[0], answers)
        write_json(output / SUMMARY_FILE, dataclasses.asdict(summary))
    return summary


def _rows(answers: AnswerSet) -> Iterator[list[dict[str, Any]]]:
    place_of = {clip_id: place for place, clip_id in enumerate(answers.clips["clip_id"].to_pylist())}
    media = answers.clips.select(["clip_id", "uri", "start_s", "end_s"])
    for batch in answers.table.to_batches(max_chunksize=_BATCH_ROWS):
        rows = batch.to_pylist()
        shown = sorted({place_of[one] for row in rows for one in row["clip_ids"]})
        clips = {clip.pop("clip_id"): clip for clip in pick(media, shown).to_pylist()}
        yield [_row(row, [clips[one] for one in row["clip_ids"]]) for row in rows]


def _row(row: Mapping[str, Any], media: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    own = {"media": media, "question": question_of(row["messages"]), "answer": row["prediction"]}
    # One line for people and for their tools: reasons from decoders have several.
    own |= {"error": " ".join(row["error"].split())}
    return {name: own[name] if name in own else row[name] for name in ANSWER_ROWS_SCHEMA.names}


def _counted(path: Path, answers: AnswerSet) -> AnswerSummary:
    written = pq.read_table(path, columns=["sample_id", "turn", "status"])
    assert written.num_rows == answers.rows_in, f"{answers.rows_in} rows, {written.num_rows} of them written"
    names = written.group_by(["sample_id", "turn"]).aggregate([]).num_rows
    by_status = answers.by_status
    return AnswerSummary(
        rows_in=written.num_rows,
        ok=by_status["ok"],
        failed=by_status["failed"],
        repeated_rows=written.num_rows - names,
        by_error_class=dict(answers.by_error_class.most_common()),
        asked=answers.num_answered,
        output=str(path.parent),
        seconds=round(answers.seconds, 3),
    )
