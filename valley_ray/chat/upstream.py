"""Conversation → input_ids and labels exactly as the original trained: prompt style `upstream-train`.

The text is that of valley/util/data_util.py (preprocess), and labels come from its offset arithmetic: every turn is
measured by tokenising it alone and the lengths are laid end to end. With a tokenizer whose pieces depend on what stands
before them the offsets drift; that is kept, since results depend on it. Use `chat.encode` where nothing has to match.
"""

from collections.abc import Iterator

import numpy as np

from valley_ray.chat.conversation import Conversation, Message
from valley_ray.chat.style import Encoded, PromptOptions, check_asks, check_counts, fill_media_marks, fitting
from valley_ray.chat.templates import ANSWER_END, VALLEY
from valley_ray.chat.tokens import IGNORE_INDEX, Tokenizer, tokenize

STOP_STRINGS = (ANSWER_END,)
"""The original learns to open the next turn after an answer; generation stops at this text."""

_SPEAKER_OF_ROLE = {"user": "human", "assistant": "gpt", "system": "system"}
_NUM_HEADER_TOKENS_KEPT = 2
"""Human turns are masked from this token on: the begin token and "###" of LLaMA's vocabulary."""


def encode_training(tokenizer: Tokenizer, conversation: Conversation, options: PromptOptions) -> Encoded:
    """Tokens and labels of a whole conversation, cut at `max_length` without regard for visual blocks.

    With `only_mask_system` the human turns are learned too (the original's switch of that name never reaches this
    place in its training).

    Raises:
        ConversationError: marks and `num_frames` differ in number.
    """
    max_length = options.max_length
    bos = options.bos_token_id(tokenizer)
    header, turns = _texts(conversation, options)
    text = header + "".join(turns) + VALLEY.before_turn
    input_ids = np.array(tokenize(tokenizer, text, bos_token_id=bos)[:max_length], dtype=np.int64)
    labels = input_ids.copy()
    offset, *lengths = (min(len(tokenize(tokenizer, part, bos_token_id=bos)), max_length) for part in (header, *turns))
    labels[:offset] = IGNORE_INDEX
    for message, length in zip(_turn_messages(conversation), lengths, strict=True):
        if not options.only_mask_system and _speaker(message) == "human":
            labels[offset + _NUM_HEADER_TOKENS_KEPT : offset + length] = IGNORE_INDEX
        offset += length
    return Encoded(input_ids, labels)


def training_text(conversation: Conversation, options: PromptOptions) -> str:
    """The whole text of a training sequence, visual blocks spelled out."""
    header, turns = _texts(conversation, options)
    return header + "".join(turns) + VALLEY.before_turn


def prompt_text(conversation: Conversation, options: PromptOptions) -> str:
    """The training text up to "### Assistant:" after the last turn, which must be the user's."""
    check_asks(conversation)
    header, turns = _texts(conversation, options)
    return header + "".join(turns) + VALLEY.cue


def encode_prompt(tokenizer: Tokenizer, conversation: Conversation, options: PromptOptions) -> tuple[int, ...]:
    """Tokens of `prompt_text`.

    Raises:
        ConversationError: marks and `num_frames` differ in number, or the last turn is not the user's.
        PromptTooLongError: more than `max_length` tokens.
    """
    text = prompt_text(conversation, options)
    return fitting(tokenize(tokenizer, text, bos_token_id=options.bos_token_id(tokenizer)), options)


def clean_answer(text: str) -> str:
    """Without white space around it."""
    return text.strip()


def _texts(conversation: Conversation, options: PromptOptions) -> tuple[str, list[str]]:
    """Header and turns as text, each turn with its signs before and after."""
    messages = _turn_messages(conversation)
    check_counts(sum(message.num_media for message in messages), options)
    counts = iter(options.num_frames)
    system = conversation.messages[0].content if _has_own_header(conversation) else options.system_prompt
    return system + VALLEY.after_system, [_turn_text(message, options.num_patches, counts) for message in messages]


def _turn_text(message: Message, num_patches: int, counts: Iterator[int]) -> str:
    name = {"human": VALLEY.user, "gpt": VALLEY.assistant}.get(_speaker(message).lower(), "unknown")
    content = fill_media_marks(message.content, num_patches=num_patches, num_frames=counts)
    return f"{VALLEY.before_turn}{name}{VALLEY.after_name} {content}{VALLEY.end_of_turn}"


def _turn_messages(conversation: Conversation) -> tuple[Message, ...]:
    return conversation.turns if _has_own_header(conversation) else conversation.messages


def _has_own_header(conversation: Conversation) -> bool:
    """A record's own "system" turn is an unknown speaker to the original; only messages of a request set the header."""
    first = conversation.messages[0]
    return first.role == "system" and first.speaker is None


def _speaker(message: Message) -> str:
    return _SPEAKER_OF_ROLE[message.role] if message.speaker is None else message.speaker
