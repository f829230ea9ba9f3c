"""VideoChat-instruct-11K: ``{"video": "<folder>/<id>.mp4", "QA": [{"i", "q", "a"}, ...]}`` → a conversation.

`i` is an instruction that comes before the question; in detailed descriptions it is all there is. Names of keys and
files are those that public readers of the set use; its own file could not be looked into. The set also goes round as
``{"video", "conversations": [{"from", "value"}, ...]}``: such a record is known by its video and its missing id.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from valley_ray.chat.conversation import MEDIA_MARK
from valley_ray.data.sources.files import is_url, last_part
from valley_ray.data.sources.media import make_row, not_found, places
from valley_ray.data.sources.rows import CatalogRow, Source, failed, sample_of
from valley_ray.errors import ConversationError, ValleyError

QA_KEY = "QA"


def is_videochat(record: Mapping[str, Any]) -> bool:
    """Whether a record is VideoChat's, in either spelling."""
    return QA_KEY in record or ("video" in record and "conversations" in record and "id" not in record)


def videochat_row(record: Mapping[str, Any], *, fallback_id: str, source: Source) -> CatalogRow:
    """The row of one record; records without an id, as the set has them, get the number of their row."""

    def locate(kind: str, names: Sequence[str], record: Mapping[str, Any]) -> dict[str, Any]:
        """WebVid's folders differ from download to download: the bare name, which is unique there, will do."""
        name = names[0]
        if is_url(name) or len(names) > 1 or "/" not in name:
            return source.media.clip(kind, names, record)
        tried = [
            *places(kind, name, record, source.media.root),
            *places(kind, last_part(name), record, source.media.root),
        ]
        found = source.media.first(tried)
        if found is None:
            return make_row(kind, tried[0], [], error=not_found(name, tried))
        return make_row(kind, found.uri, [found])

    try:
        turns = _marked(_turns(record[QA_KEY]) if QA_KEY in record else record["conversations"])
    except ValleyError as error:
        return failed(fallback_id, source.name, error)
    return sample_of(
        {**record, "conversations": turns},
        default_id=fallback_id,
        fallback_id=fallback_id,
        source=source.name,
        locate=locate,
    )


def _turns(pairs: Any) -> list[dict[str, str]]:
    if not isinstance(pairs, list) or not pairs:
        raise ConversationError(f"'{QA_KEY}' must be a list of questions and answers, got {pairs!r:.80}")
    turns: list[dict[str, str]] = []
    instruction = ""
    for number, pair in enumerate(pairs, start=1):
        values = [pair.get(key, "") for key in ("i", "q", "a")] if isinstance(pair, dict) else []
        texts = [value.strip() for value in values if isinstance(value, str)]
        if len(texts) != 3:
            raise ConversationError(f"pair {number} of '{QA_KEY}' must have texts 'q' and 'a', got {pair!r:.80}")
        said, question, answer = texts
        # The instruction is often repeated with each question; said once, it holds for all.
        parts = [said if said != instruction else "", question]
        instruction = said or instruction
        text = "\n".join(part for part in parts if part) or said
        if not text or not answer:
            raise ConversationError(f"pair {number} of '{QA_KEY}' needs a question and an answer, got {pair!r:.80}")
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return turns


def _marked(turns: Any) -> Any:
    """`turns` with a mark for the video in the first, where no question has one; what is no list of turns stays."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return turns
    questions = [turn.get("value") for turn in turns if turn.get("from") != "gpt"]
    if not isinstance(turns[0].get("value"), str) or any(MEDIA_MARK.search(str(text)) for text in questions):
        return turns
    return [turns[0] | {"value": f"<video>\n{turns[0]['value']}"}, *turns[1:]]
