"""The catalog's samples → one row per question, with its reference and the clips that it shows. Knows no model.

A sample of several turns gives a row for each of its answers, with the turns before it as they were recorded. What
could not be read keeps its row, with status failed.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from valley_ray.chat.conversation import MEDIA_MARK
from valley_ray.data.mapped import pick
from valley_ray.data.schema import FAILED, PENDING
from valley_ray.data.sources import CatalogSummary
from valley_ray.data.sources.files import last_part
from valley_ray.errors import ConversationError
from valley_ray.evaluate.config import AnswerSettings
from valley_ray.evaluate.kinds import Kinds, kind_of

MESSAGE_TYPE = pa.struct([("role", pa.string()), ("content", pa.string())])

QUESTIONS_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("turn", pa.int32()),
        ("source", pa.string()),
        ("kind", pa.string()),
        ("clip_ids", pa.list_(pa.string())),
        ("messages", pa.list_(MESSAGE_TYPE)),
        ("reference", pa.string()),
        ("status", pa.string()),
        ("error_class", pa.string()),
        ("error", pa.string()),
    ]
)
"""questions. (sample_id, turn) names a row; turn counts the answers of a sample from 0. messages: what is asked, the
turns before it included; marks in user turns stand for clip_ids in order. reference: the recorded answer, null where
there is none. status: pending, or failed with the reason."""

BATCH_ROWS = 4096
"""Rows that are Python objects at a time."""


def read_questions(
    clips: pa.Table, samples: pa.Table, settings: AnswerSettings, *, summary: CatalogSummary, kinds: Kinds
) -> Iterator[pa.RecordBatch]:
    """The questions of a catalog (QUESTIONS_SCHEMA), in its order, a few thousand at a time."""
    rows = np.arange(samples.num_rows)
    if settings.max_samples is not None:
        rows = _drawn(rows, settings.max_samples, settings.seed)
    formats = {source.name: source.format for source in summary.sources}
    batch = []
    for row in _rows(clips, samples, rows, settings):
        batch.append(row | {"kind": _kind(row, kinds, formats)})
        if len(batch) == BATCH_ROWS:
            yield pa.RecordBatch.from_pylist(batch, schema=QUESTIONS_SCHEMA)
            batch = []
    yield pa.RecordBatch.from_pylist(batch, schema=QUESTIONS_SCHEMA)


def question_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the last message, without its marks."""
    return MEDIA_MARK.sub("", messages[-1]["content"]).strip() if messages else ""


def _kind(row: Mapping[str, Any], kinds: Kinds, formats: Mapping[str, str]) -> str:
    source = row["source"]
    question = question_of(row["messages"])
    format_name = formats.get(source, "")
    return kind_of(kinds, source=source, format_name=format_name, sample_id=row["sample_id"], question=question)


def _rows(
    clips: pa.Table, samples: pa.Table, asked: npt.NDArray[np.int64], settings: AnswerSettings
) -> Iterator[dict[str, Any]]:
    shown: set[str] = set()
    for sample in _taken(samples, asked):
        shown.update(sample["clip_ids"])
        yield from _of_sample(sample, last_alone=settings.turns == "last")
    if settings.question is None:
        return
    alone = np.array([row for row, name in enumerate(clips["clip_id"].to_pylist()) if name not in shown], np.int64)
    if settings.max_samples is not None:
        alone = _drawn(alone, max(0, settings.max_samples - len(asked)), settings.seed)
    for clip in _taken(clips, alone):
        yield _of_clip(clip, settings.question)


def _taken(table: pa.Table, rows: npt.NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    """Rows of a mapped table, a few thousand of them in memory."""
    for first in range(0, len(rows), BATCH_ROWS):
        yield from pick(table, rows[first : first + BATCH_ROWS]).to_pylist()


def _drawn(rows: npt.NDArray[np.int64], number: int, seed: int) -> npt.NDArray[np.int64]:
    """At most `number` of the rows, in their order."""
    return np.sort(np.random.default_rng(seed).permutation(rows)[:number])


def _of_sample(sample: Mapping[str, Any], *, last_alone: bool) -> Iterator[dict[str, Any]]:
    named = {"sample_id": sample["sample_id"], "source": sample["source"] or ""}
    if sample["status"] != PENDING:
        reason = {"error_class": sample["error_class"], "error": sample["error"]}
        yield named | _nothing(status=FAILED, **reason)
        return
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in sample["conversation"]]
    asked = [place for place, turn in enumerate(turns) if turn["role"] == "assistant" and place]
    asked = [place for place in asked if turns[place - 1]["role"] == "user"]
    if turns and turns[-1]["role"] == "user":
        asked.append(len(turns))
    if not asked:
        error = ConversationError("no turn of the conversation answers a question")
        yield named | _nothing(status=FAILED, error_class=error.code, error=str(error))
    for number, place in enumerate(asked):
        if last_alone and number < len(asked) - 1:
            continue
        messages = turns[:place]
        num_marks = sum(len(MEDIA_MARK.findall(one["content"])) for one in messages if one["role"] == "user")
        row = {"turn": number, "clip_ids": sample["clip_ids"][:num_marks], "messages": messages}
        yield (
            named
            | _nothing(status=PENDING)
            | row
            | {"reference": turns[place]["content"] if place < len(turns) else None}
        )


def _of_clip(clip: Mapping[str, Any], question: str) -> dict[str, Any]:
    mark = "<image>" if clip["kind"] in ("image", "images") else "<video>"
    window = "" if clip["start_s"] is None and clip["end_s"] is None else f"[{clip['start_s'] or 0:g}-{clip['end_s']}]"
    row = {"sample_id": f"{clip['uri']}{window}", "source": last_part(clip["uri"].rpartition("/")[0] or "/")}
    messages = [{"role": "user", "content": f"{mark}\n{question}"}]
    return row | _nothing(status=PENDING) | {"clip_ids": [clip["clip_id"]], "messages": messages}


def _nothing(*, status: str, error_class: str = "", error: str = "") -> dict[str, Any]:
    row: dict[str, Any] = {"turn": 0, "clip_ids": [], "messages": [], "reference": None}
    return row | {"status": status, "error_class": error_class, "error": error}
