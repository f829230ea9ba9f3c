"""Conversation → input_ids and labels exactly as the original trained: prompt style `upstream-train`.

The text is that of valley/util/data_util.py (preprocess), and labels come from its offset arithmetic: every turn is
measured by tokenising it alone and the lengths are laid end to end. With a tokenizer whose pieces depend on what stands
before them the offsets drift; that is kept, since results depend on it. Use `chat.encode` where nothing has to match.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from valley_ray.chat.conversation import Conversation, Message
from valley_ray.chat.encode import Encoded, replace_media_marks
from valley_ray.chat.templates import VALLEY
from valley_ray.chat.tokens import IGNORE_INDEX, Tokenizer, tokenize
from valley_ray.errors import ConversationError, PromptTooLongError

ANSWER_END = "###"
"""The original learns to open the next turn after an answer; generation stops at this text."""

_SPEAKER_OF_ROLE = {"user": "human", "assistant": "gpt", "system": "system"}
_NUM_HEADER_TOKENS_KEPT = 2
"""Human turns are masked from this token on: the begin token and "###" of LLaMA's vocabulary."""


def encode_training(
    tokenizer: Tokenizer,
    conversation: Conversation,
    *,
    system_prompt: str,
    num_patches: int,
    num_frames: Sequence[int],
    max_length: int,
    bos_token_id: int | None = None,
    mask_system_only: bool = False,
) -> Encoded:
    """Tokens and labels of a whole conversation, cut at `max_length` without regard for visual blocks.

    `bos_token_id` replaces the tokenizer's (the original takes </s> where the model's path contains "llama");
    `mask_system_only` learns the human turns too (the original's switch of that name has no effect in training).

    Raises:
        ConversationError: marks and `num_frames` differ in number.
    """
    bos = tokenizer.bos_token_id if bos_token_id is None else bos_token_id
    header, turns = _texts(conversation, system_prompt, num_patches, num_frames)
    text = header + "".join(turns) + VALLEY.before_turn
    input_ids = np.array(tokenize(tokenizer, text, bos_token_id=bos)[:max_length], dtype=np.int64)
    labels = input_ids.copy()
    offset, *lengths = (min(len(tokenize(tokenizer, part, bos_token_id=bos)), max_length) for part in (header, *turns))
    labels[:offset] = IGNORE_INDEX
    for message, length in zip(_turn_messages(conversation), lengths, strict=True):
        if not mask_system_only and _speaker(message) == "human":
            labels[offset + _NUM_HEADER_TOKENS_KEPT : offset + length] = IGNORE_INDEX
        offset += length
    return Encoded(input_ids, labels)


def training_text(
    conversation: Conversation, *, system_prompt: str, num_patches: int, num_frames: Sequence[int]
) -> str:
    """The whole text of a training sequence, visual blocks spelled out."""
    header, turns = _texts(conversation, system_prompt, num_patches, num_frames)
    return header + "".join(turns) + VALLEY.before_turn


def encode_prompt(
    tokenizer: Tokenizer,
    conversation: Conversation,
    *,
    system_prompt: str,
    num_patches: int,
    num_frames: Sequence[int],
    max_length: int,
) -> tuple[int, ...]:
    """Tokens of the training text up to "### Assistant:" after the last turn.

    Raises:
        ConversationError: marks and `num_frames` differ in number, or the last turn is not the user's.
        PromptTooLongError: more than `max_length` tokens.
    """
    if conversation.turns[-1].role != "user":
        raise ConversationError(f"the last message must be the user's, got role {conversation.turns[-1].role!r}")
    header, turns = _texts(conversation, system_prompt, num_patches, num_frames)
    ids = tokenize(tokenizer, header + "".join(turns) + VALLEY.cue, bos_token_id=tokenizer.bos_token_id)
    if len(ids) > max_length:
        raise PromptTooLongError(
            f"the prompt has {len(ids)} tokens but the model takes {max_length}; "
            "shorten the conversation or send fewer frames"
        )
    return tuple(ids)


def _texts(
    conversation: Conversation, system_prompt: str, num_patches: int, num_frames: Sequence[int]
) -> tuple[str, list[str]]:
    """Header and turns as text, each turn with its signs before and after."""
    messages = _turn_messages(conversation)
    num_media = sum(message.num_media for message in messages)
    if num_media != len(num_frames):
        raise ConversationError(
            f"the conversation has {num_media} <video>/<image> marks but {len(num_frames)} pieces of media came; "
            "write one mark per piece, in order"
        )
    counts = iter(num_frames)
    system = conversation.messages[0].content if _has_own_header(conversation) else system_prompt
    return system + VALLEY.after_system, [_turn_text(message, num_patches, counts) for message in messages]


def _turn_text(message: Message, num_patches: int, counts: Iterator[int]) -> str:
    name = {"human": VALLEY.user, "gpt": VALLEY.assistant}.get(_speaker(message).lower(), "unknown")
    content = replace_media_marks(message.content, num_patches=num_patches, num_frames=counts)
    return f"{VALLEY.before_turn}{name}{VALLEY.after_name} {content}{VALLEY.end_of_turn}"


def _turn_messages(conversation: Conversation) -> tuple[Message, ...]:
    return conversation.turns if _has_own_header(conversation) else conversation.messages


def _has_own_header(conversation: Conversation) -> bool:
    """A record's own "system" turn is an unknown speaker to the original; only messages of a request set the header."""
    first = conversation.messages[0]
    return first.role == "system" and first.speaker is None


def _speaker(message: Message) -> str:
    return _SPEAKER_OF_ROLE[message.role] if message.speaker is None else message.speaker
