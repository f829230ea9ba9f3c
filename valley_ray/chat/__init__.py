"""Conversations and prompts: messages in, token ids and labels out. The tokenizer is passed in; knows no torch."""

from valley_ray.chat.conversation import (
    Conversation,
    MediaPart,
    Message,
    from_marked_messages,
    from_openai,
    from_valley_record,
)
from valley_ray.chat.style import Encoded

__all__ = [
    "Conversation",
    "Encoded",
    "MediaPart",
    "Message",
    "from_marked_messages",
    "from_openai",
    "from_valley_record",
]
