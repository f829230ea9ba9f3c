"""One record → one row of the catalog: a sample with the clips that it shows, or the reason why it cannot be used.

Knows the turns and marks of conversations, but neither files of records nor where media lie.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from valley_ray.chat.conversation import MEDIA_MARK, Conversation, from_valley_record
from valley_ray.data.schema import FAILED, PENDING
from valley_ray.data.sources.media import Media, encodable, printable
from valley_ray.errors import ConversationError, DataError, ValleyError

MEDIA_KEYS = ("image", "video")
"""Keys of a record that name media; where both are there and only one kind is marked, that one is used (upstream)."""

Locate = Callable[[str, Sequence[str], Mapping[str, Any]], dict[str, Any]]
"""(kind, file names, record) → clip row."""


@dataclass(frozen=True, slots=True)
class CatalogRow:
    """What one record gives."""

    sample: dict[str, Any] | None
    """Row of SAMPLES_SCHEMA; None: media that nobody talks about."""
    clips: tuple[dict[str, Any], ...] = ()
    """Rows of CLIPS_SCHEMA, those that the sample shows; rows of one clip_id are equal."""


@dataclass(frozen=True)
class Source:
    """One source as readers take it."""

    path: str
    """The file of records, or the folder."""
    name: str
    media: Media
    companion: str | None = None
    """The format's second file, where one is named."""

    def default_id(self, row: int) -> str:
        """Id of a record that has none."""
        return f"{self.name}#{row}"


def sample_of(
    record: Any, *, default_id: str | None = None, fallback_id: str, source: str, locate: Locate
) -> CatalogRow:
    """The row of a LLaVA / Valley record: ``{"id", "video" | "image", "conversations": [{"from", "value"}]}``.

    Args:
        default_id: id of a record that has none; None: such a record fails.
        fallback_id: id of the row of a record that fails before its own id is known.
    """
    sample_id = fallback_id
    try:
        sample_id = _id_of(record, default_id)
        conversation = from_valley_record(record)
        _check_text(conversation)
        clips = tuple(locate(kind, names, record) for kind, names in _media_of(record, conversation))
    except ValleyError as error:
        return failed(sample_id, source, error)
    turns = [
        {"role": message.role, "content": message.content, "speaker": message.speaker}
        for message in conversation.messages
    ]
    return CatalogRow(_sample(sample_id, source, [clip["clip_id"] for clip in clips], turns), clips)


def question_row(question: Any, answer: Any, *, sample_id: str, source: str, clip: dict[str, Any]) -> CatalogRow:
    """The row of a question about one video, and its answer; failed where one of them has no words."""
    try:
        turns = [
            {"role": "user", "content": f"<video>\n{_words(question, 'question')}", "speaker": "human"},
            {"role": "assistant", "content": _words(answer, "answer"), "speaker": "gpt"},
        ]
    except ValleyError as error:
        return failed(sample_id, source, error)
    return CatalogRow(_sample(sample_id, source, [clip["clip_id"]], turns), (clip,))


def failed(sample_id: str, source: str, error: ValleyError) -> CatalogRow:
    """The row of a record that cannot be used because of `error`."""
    reason = {"status": FAILED, "error_class": error.code, "error": printable(str(error))}
    return CatalogRow(_sample(printable(sample_id), source, [], []) | reason)


def id_text(value: Any, key: str = "id") -> str:
    """An id as text; raises DataError for anything but text and whole numbers."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        wanted = "a record needs an 'id'" if key == "id" else f"'{key}' must be an id"
        raise DataError(f"{wanted} (text or number), got {value!r:.80}")
    return encodable(str(value), key)


def file_names(record: Mapping[str, Any], key: str) -> list[str]:
    """The file names under `key`: one, or a list of them; raises DataError for anything else."""
    value = record[key]
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"'{key}' must be a file name or a list of them, got {value!r:.80}")
    return [encodable(name, key) for name in names]


def _sample(sample_id: str, source: str, clip_ids: list[str], turns: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "sample_id": sample_id,
        "clip_ids": clip_ids,
        "conversation": turns,
        "source": source,
        "num_tokens": 0,
        "status": PENDING,
        "error_class": "",
        "error": "",
    }


def _words(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConversationError(f"'{key}' must be a text with words, got {value!r:.80}")
    if key == "question" and MEDIA_MARK.search(value):
        value = MEDIA_MARK.sub("", value)
    return encodable(value.strip(), key)


def _id_of(record: Any, default_id: str | None) -> str:
    if not isinstance(record, dict):
        raise DataError(f"a record must be an object with id and conversations, got {type(record).__name__}")
    if default_id is not None and record.get("id") is None:
        return default_id
    return id_text(record.get("id"))


def _check_text(conversation: Conversation) -> None:
    for message in conversation.messages:
        encodable(message.content, "conversations")
    if not any(message.role == "assistant" and message.content.strip() for message in conversation.messages):
        raise ConversationError(
            "the conversation has no answer to learn from; expected at least one gpt turn with text"
        )


def _media_of(record: dict[str, Any], conversation: Conversation) -> list[tuple[str, Sequence[str]]]:
    """(kind, file names) for every mark, in the order of the marks; several names only for a group of images."""
    media = {key: file_names(record, key) for key in MEDIA_KEYS if record.get(key) is not None}
    marks = [
        mark.strip("<>")
        for message in conversation.messages
        if message.role == "user"
        for mark in MEDIA_MARK.findall(message.content)
    ]
    if len(media) == 1:
        # With one kind of media, upstream's records use either mark for it.
        [kind] = media
        marks = [kind] * len(marks)
    clips: dict[str, Iterator[Sequence[str]]] = {}
    for kind in MEDIA_KEYS:
        names, num_marks = media.get(kind, []), marks.count(kind)
        is_group = kind == "image" and num_marks == 1 and len(names) > 1
        is_unused = bool(names) and num_marks == 0 and bool(marks)
        if num_marks != len(names) and not is_group and not is_unused:
            raise ConversationError(
                f"the conversation has {num_marks} <{kind}> mark(s) for {len(names)} '{kind}' file(s); "
                "give one mark in a user turn for each file"
            )
        clips[kind] = iter([names] if is_group else [[name] for name in names])
    return [(kind, next(clips[kind])) for kind in marks]
