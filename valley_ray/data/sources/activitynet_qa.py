"""ActivityNet-QA: questions and answers in two JSON lists, joined by `question_id` (the repository's dataset/README).

``test_q.json``: ``[{"video_name", "question", "question_id"}, ...]``; ``test_a.json``: ``[{"answer", "type",
"question_id"}, ...]``. Both files are read side by side, so only what one is ahead of the other is held. ActivityNet's
own archives call the files ``v_<video_name>.mp4``.
"""

from collections.abc import Iterator
from typing import Any

from valley_ray.data.sources.files import beside, last_part, shown
from valley_ray.data.sources.json_text import read_json_list
from valley_ray.data.sources.rows import CatalogRow, Source, failed, id_text, question_row
from valley_ray.data.sources.video_qa import video_row
from valley_ray.errors import DataError, ValleyError


def read_activitynet_qa(source: Source) -> Iterator[CatalogRow]:
    """A row per question, and a failed one per answer without a question.

    Raises:
        DataError: one of the two files is missing or no JSON list.
    """
    answers = _answers(source.companion or _answers_path(source.path))
    waiting: dict[str, Any] = {}
    for row, record in enumerate(read_json_list(source.path)):
        sample_id = source.default_id(row)
        try:
            if not isinstance(record, dict):
                raise DataError(f"a question must be an object with question_id, got {type(record).__name__}")
            sample_id = id_text(record.get("question_id"), "question_id")
            video = id_text(record.get("video_name"), "video_name")
            answer = _take(sample_id, waiting, answers)
        except ValleyError as error:
            yield failed(sample_id, source.name, error)
            continue
        yield question_row(
            record.get("question"),
            answer,
            sample_id=sample_id,
            source=source.name,
            clip=lambda video=video: video_row(source, [f"v_{video}", video]),  # type: ignore[misc]
        )
    waiting.update(answers)
    for question_id in waiting:
        yield failed(question_id, source.name, DataError(f"an answer without a question: question_id {question_id!r}"))


def _answers_path(path: str) -> str:
    name = last_part(path)
    stem, mark, suffix = name.rpartition("_q.")
    if not mark:
        raise DataError(f"{shown(path)}: questions without answers; name the file of answers as companion=...")
    return beside(path, f"{stem}_a.{suffix}")


def _answers(path: str) -> Iterator[tuple[str, Any]]:
    for row, record in enumerate(read_json_list(path)):
        if not isinstance(record, dict) or "question_id" not in record:
            raise DataError(f"answer {row} of {shown(path)} must be an object with question_id, got {record!r:.80}")
        yield id_text(record["question_id"], "question_id"), record.get("answer")


def _take(question_id: str, waiting: dict[str, Any], answers: Iterator[tuple[str, Any]]) -> Any:
    """The answer to a question; those that come before it in their file wait for their own."""
    if question_id in waiting:
        return waiting.pop(question_id)
    for other, answer in answers:
        if other == question_id:
            return answer
        waiting[other] = answer
    raise DataError(f"there is no answer with question_id {question_id!r}")
