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
from valley_ray.data.sources.video_qa import video_finder
from valley_ray.errors import DataError, ValleyError


def read_activitynet_qa(source: Source) -> Iterator[CatalogRow]:
    """A row per question, then a failed one per answer that fits none.

    Raises:
        DataError: one of the two files is missing or no JSON list.
    """
    answers = _Answers(source.companion or _answers_path(source.path))
    find = video_finder(source)
    for row, record in enumerate(read_json_list(source.path)):
        sample_id = source.default_id(row)
        try:
            if not isinstance(record, dict):
                raise DataError(f"a question must be an object with question_id, got {type(record).__name__}")
            sample_id = id_text(record.get("question_id"), "question_id")
            video = id_text(record.get("video_name"), "video_name")
            clip = find((f"v_{video}", video))
        except ValleyError as error:
            yield failed(sample_id, source.name, error)
            continue
        if not answers.has(sample_id):
            yield failed(sample_id, source.name, DataError(f"there is no answer with question_id {sample_id!r}"))
            continue
        answer = answers.take(sample_id)
        yield question_row(record.get("question"), answer, sample_id=sample_id, source=source.name, clip=clip)
    for answer_id, reason in answers.left():
        yield failed(answer_id, source.name, DataError(reason))


class _Answers:
    """The answers, read as far as they are asked for; those that come before their question wait for it."""

    def __init__(self, path: str) -> None:
        self._name = last_part(path)
        self._records = enumerate(read_json_list(path))
        self._waiting: dict[str, Any] = {}
        self._bad: list[tuple[str, str]] = []

    def has(self, question_id: str) -> bool:
        """Whether there is an answer to the question; reads on until it comes."""
        while question_id not in self._waiting and self._read_one():
            pass
        return question_id in self._waiting

    def take(self, question_id: str) -> Any:
        """The answer to a question that has one."""
        return self._waiting.pop(question_id)

    def left(self) -> Iterator[tuple[str, str]]:
        """(id, reason) of every answer that no question took; reads to the end."""
        while self._read_one():
            pass
        yield from self._bad
        for question_id in self._waiting:
            yield question_id, f"an answer without a question: question_id {question_id!r}"

    def _read_one(self) -> bool:
        row, record = next(self._records, (None, None))
        if row is None:
            return False
        try:
            if not isinstance(record, dict):
                raise DataError(f"an answer must be an object with question_id, got {type(record).__name__}")
            question_id = id_text(record.get("question_id"), "question_id")
            if question_id in self._waiting:
                raise DataError(f"a second answer with question_id {question_id!r}")
            self._waiting[question_id] = record.get("answer")
        except DataError as error:
            self._bad.append((f"{self._name}#{row}", str(error)))
        return True


def _answers_path(path: str) -> str:
    name = last_part(path)
    stem, mark, suffix = name.rpartition("_q.")
    if not mark:
        raise DataError(f"{shown(path)}: questions without answers; name the file of answers as companion=...")
    return beside(path, f"{stem}_a.{suffix}")
