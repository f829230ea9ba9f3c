"""Messages and records in, conversations out."""

from typing import Any

import pytest

from valley_ray.chat import (
    Conversation,
    MediaPart,
    Message,
    from_marked_messages,
    from_openai,
    from_valley_record,
)
from valley_ray.errors import ConversationError

IMAGE_PART = {"type": "image_url", "image_url": {"url": "x.png"}}


def test_openai_parts_become_marks_and_media_in_order() -> None:
    conversation, media = from_openai(
        [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "video_url", "video_url": {"url": "clip.mp4"}},
                    {"type": "text", "text": "Compare it with"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
                ],
            },
            {"role": "assistant", "content": "They differ."},
            {"role": "user", "content": "How?"},
        ]
    )
    assert conversation.system == "Be brief."
    assert [turn.content for turn in conversation.turns] == [
        "<video>\nCompare it with\n<image>",
        "They differ.",
        "How?",
    ]
    assert media == [MediaPart("video", "clip.mp4"), MediaPart("image", "data:image/png;base64,AA")]
    assert conversation.num_media == 2


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one"),
        ([{"role": "system", "content": "x"}], "at least one"),
        ([{"role": "robot", "content": "x"}], "role must be"),
        ([{"role": "user", "content": None}], "must be a string or a list"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "part type must be"),
        ([{"role": "user", "content": [{"type": "video_url", "video_url": {}}]}], "needs"),
        ([{"role": "user", "content": "look at <video>"}], "send a media part"),
        ([{"role": "user", "content": "\ud800"}], "not valid Unicode"),
        ([{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}], "not valid Unicode"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "first message"),
        ([{"role": "user", "content": " \n"}], "question is empty"),
        ([{"role": "user", "content": ""}, {"role": "user", "content": "a"}], "question is empty"),
        ([{"role": "user", "content": [IMAGE_PART]}], "question is empty"),
        ([{"role": "user", "content": [IMAGE_PART, {"type": "text", "text": " "}]}], "question is empty"),
        (
            [{"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "belong in user messages",
        ),
    ],
)
def test_messages_that_form_no_conversation_are_refused(messages: list[dict[str, object]], reason: str) -> None:
    with pytest.raises(ConversationError, match=reason):
        from_openai(messages)


def test_a_message_of_media_alone_may_come_before_the_question() -> None:
    conversation, media = from_openai([{"role": "user", "content": [IMAGE_PART]}, {"role": "user", "content": "Why?"}])
    assert [turn.content for turn in conversation.turns] == ["<image>", "Why?"]
    assert len(media) == 1


def test_upstreams_messages_keep_their_marks_and_both_spellings_of_a_role() -> None:
    messages = [{"role": "user", "content": "<video>\nWhat?"}, {"role": "assistent", "content": "A cat."}]
    expected = Conversation((Message("user", "<video>\nWhat?"), Message("assistant", "A cat.")))
    assert from_marked_messages(messages) == expected
    assert from_marked_messages([messages[0], messages[1] | {"role": "assistant"}]) == expected


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one"),
        ([{"role": "human", "content": "<video>"}], "role must be"),
        ([{"role": "user", "content": [IMAGE_PART]}], "must be a text"),
        ([{"role": "user"}], "must be a text"),
        (["hello"], "role must be"),
    ],
)
def test_upstreams_messages_that_form_no_conversation_are_refused(messages: list[Any], reason: str) -> None:
    with pytest.raises(ConversationError, match=reason):
        from_marked_messages(messages)


def test_valley_record_keeps_its_speakers() -> None:
    record = {"conversations": [{"from": "Human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A cat."}]}
    assert from_valley_record(record) == Conversation(
        (Message("user", "<video>\nWhat?", speaker="Human"), Message("assistant", "A cat.", speaker="gpt"))
    )


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "to be a list of turns"),
        ({"conversations": []}, "to be a list of turns"),
        ({"conversations": "hello"}, "to be a list of turns"),
        ({"conversations": ["hello"]}, "expected a turn"),
        ({"conversations": [{"from": "human", "value": 3}]}, "expected a turn"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "unknown speaker 'narrator'"),
    ],
)
def test_broken_records_are_refused_with_the_reason(record: dict[str, object], reason: str) -> None:
    with pytest.raises(ConversationError, match=reason):
        from_valley_record(record)
