"""Conversations: LLaVA / Valley JSON records and OpenAI-style messages become one immutable form.

A `<video>` or `<image>` mark in a user's text stands for one piece of media, in order. Knows no tokenizer and no media.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from valley_ray.errors import ConversationError

Role = Literal["system", "user", "assistant"]
MediaKind = Literal["video", "image"]

MEDIA_MARK = re.compile(r"<(?:video|image)>")
"""Stands for one clip or image in the text of a user turn."""

_ROLE_OF_SPEAKER: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_KIND_OF_PART: dict[str, MediaKind] = {"video_url": "video", "image_url": "image"}


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str
    speaker: str | None = None
    """The speaker as a training record spells it ("human", "Human", "gpt"); upstream's label rule depends on it."""

    @property
    def num_media(self) -> int:
        """Marks in the content."""
        return len(MEDIA_MARK.findall(self.content))


@dataclass(frozen=True)
class Conversation:
    """Turns in order; at most one system message, and it comes first."""

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        if not self.turns:
            raise ConversationError("a conversation needs at least one user or assistant message, got none")
        if any(message.role == "system" for message in self.messages[1:]):
            raise ConversationError("a system message is allowed once, as the first message; got one further down")

    @property
    def system(self) -> str | None:
        """Text of the system message, None where there is none."""
        return self.messages[0].content if self.messages[0].role == "system" else None

    @property
    def turns(self) -> tuple[Message, ...]:
        """The messages without the system message."""
        return self.messages[1:] if self.messages and self.messages[0].role == "system" else self.messages

    @property
    def num_media(self) -> int:
        """Marks over all user turns."""
        return sum(message.num_media for message in self.messages if message.role == "user")


@dataclass(frozen=True)
class MediaPart:
    """Where the media of one mark comes from, as the request said."""

    kind: MediaKind
    url: str


def from_valley_record(record: Mapping[str, Any]) -> Conversation:
    """Read the turns of a LLaVA / Valley JSON record: ``{"conversations": [{"from", "value"}, ...]}``.

    Raises:
        ConversationError: no list of turns, a turn without text, or a speaker other than human, gpt, user, assistant
            and system (in any case of letters).
    """
    turns = record.get("conversations")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise ConversationError(f"expected 'conversations' to be a list of turns, got {_short(turns)}")
    return Conversation(tuple(_message_of_turn(turn) for turn in turns))


def from_openai(messages: Sequence[Mapping[str, Any]]) -> tuple[Conversation, list[MediaPart]]:
    """Read OpenAI-style chat messages; media parts become marks and are listed in the order of the marks.

    `content` is a string or a list of parts: ``{"type": "text", "text"}``, ``{"type": "video_url", "video_url":
    {"url"}}``, ``{"type": "image_url", "image_url": {"url"}}``. A literal mark in a text is refused, since it would
    stand for media that nobody sent.

    Raises:
        ConversationError: an unknown role or part, media outside a user message, a literal mark, text that is not
            valid Unicode, no message, a user message of nothing, or a last one without a question.
    """
    media: list[MediaPart] = []
    read = []
    for message in messages:
        role = _role_of(message)
        content, parts = _read_content(message.get("content"))
        if parts and role != "user":
            raise ConversationError(f"media parts belong in user messages, got one in a message of role {role!r}")
        if role == "user":
            check_question(content)
        media.extend(parts)
        read.append(Message(role, content))
    conversation = Conversation(tuple(read))
    last = conversation.turns[-1]
    if last.role == "user":
        check_question(MEDIA_MARK.sub("", last.content))
    return conversation, media


def check_question(text: str) -> None:
    """Raise ConversationError for a text without words."""
    if not text.strip():
        raise ConversationError("the question is empty; ask something, for example 'What is moving?'")


def from_marked_messages(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """Read the messages of upstream's `completion`: ``{"role", "content"}`` with `<video>` and `<image>` in the text.

    Upstream spells the model's role "assistent"; "assistant" is the same here.

    Raises:
        ConversationError: an unknown role, content that is no text, no message.
    """
    return Conversation(tuple(_marked_message(message) for message in messages))


def _role_of(message: Mapping[str, Any]) -> Role:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in get_args(Role):
        raise ConversationError(f"message role must be system, user or assistant, got {_short(role)}")
    return cast(Role, role)


def _marked_message(message: Mapping[str, Any]) -> Message:
    if isinstance(message, Mapping) and message.get("role") == "assistent":
        message = {**message, "role": "assistant"}
    content = message.get("content") if isinstance(message, Mapping) else None
    role = _role_of(message)
    if not isinstance(content, str):
        raise ConversationError(f"message content must be a text with <video> or <image> in it, got {_short(content)}")
    return Message(role, content)


def _message_of_turn(turn: Any) -> Message:
    speaker = turn.get("from") if isinstance(turn, Mapping) else None
    value = turn.get("value") if isinstance(turn, Mapping) else None
    if not isinstance(speaker, str) or not isinstance(value, str):
        raise ConversationError(f"expected a turn {{'from': str, 'value': str}}, got {_short(turn)}")
    role = _ROLE_OF_SPEAKER.get(speaker.lower())
    if role is None:
        known = ", ".join(_ROLE_OF_SPEAKER)
        raise ConversationError(f"unknown speaker {speaker!r}; expected one of {known}")
    return Message(role, value, speaker=speaker)


def _read_content(content: Any) -> tuple[str, list[MediaPart]]:
    if isinstance(content, str):
        return _plain_text(content), []
    if not isinstance(content, Sequence) or not content:
        raise ConversationError(f"message content must be a string or a list of parts, got {_short(content)}")
    texts, media = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(_plain_text(part["text"]))
        elif kind in _KIND_OF_PART:
            media.append(MediaPart(_KIND_OF_PART[kind], _url_of_part(part, kind)))
            texts.append(f"<{_KIND_OF_PART[kind]}>")
        else:
            raise ConversationError(f"content part type must be text, video_url or image_url, got {_short(part)}")
    return "\n".join(texts), media


def _url_of_part(part: Mapping[str, Any], kind: str) -> str:
    value = part.get(kind)
    url = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str) or not url:
        raise ConversationError(f"a {kind} part needs {{'{kind}': {{'url': '...'}}}}, got {_short(value)}")
    return url


def _plain_text(text: str) -> str:
    mark = MEDIA_MARK.search(text)
    if mark:
        raise ConversationError(f"the text contains {mark[0]}, which stands for media; send a media part instead")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(f"the text is not valid Unicode (half a surrogate pair): {error}") from error
    return text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
