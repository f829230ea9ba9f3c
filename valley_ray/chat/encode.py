"""Conversation → input_ids and labels, in the house's own prompt style `valley`.

The text is upstream's training form, ``system\\n\\n### Human: question\\n### Assistant: answer``, and every answer ends
with the tokenizer's end token, by which generation stops. Prompt and training tokens come from one walk over the turns
that cuts the text after each "### Assistant:", so a prompt is a prefix of its training sequence for any tokenizer, and
the learned positions (answer and end token) are known without measuring. Knows no torch and no media. L tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from valley_ray.chat.conversation import Conversation, Message
from valley_ray.chat.style import Encoded, PromptOptions, check_asks, check_counts, fill_media_marks, fitting
from valley_ray.chat.templates import VALLEY
from valley_ray.chat.tokens import ADDED_TOKENS, IGNORE_INDEX, Tokenizer, tokenize
from valley_ray.errors import CheckpointError, ConversationError, PromptTooLongError

STOP_STRINGS: tuple[str, ...] = ()
"""None: answers end with the end token."""


@dataclass(frozen=True)
class _Piece:
    """Consecutive text of one kind; what is learned ends with the end token, which is not text."""

    text: str
    learned: bool


def encode_training(tokenizer: Tokenizer, conversation: Conversation, options: PromptOptions) -> Encoded:
    """Tokens and labels of a whole conversation; what lies behind `max_length` is cut, as upstream does.

    Raises:
        ConversationError: no answer to learn from, marks and `num_frames` differ, a mark outside a user turn, or an
            added token (``<im_patch>`` and friends) written in a text.
        PromptTooLongError: the cut falls into or before a visual block, or leaves nothing to learn.
        CheckpointError: the tokenizer has no end token.
    """
    pieces = list(_pieces(conversation, options))
    ids = _token_ids(tokenizer, pieces, options)
    input_ids = np.array([token for piece in ids for token in piece], dtype=np.int64)
    learned = np.repeat([piece.learned for piece in pieces], [len(piece) for piece in ids])
    if not learned.any():
        raise ConversationError("a training conversation needs an assistant turn to learn from, got none")
    placeholder_ids = [tokenizer.get_added_vocab()[token] for token in ADDED_TOKENS[1:]]
    max_length = options.max_length
    if len(input_ids) > max_length and (
        np.isin(input_ids[max_length:], placeholder_ids).any() or not learned[:max_length].any()
    ):
        raise PromptTooLongError(
            f"the sequence has {len(input_ids)} tokens and {max_length=} would cut its media or all of its answer; "
            "raise max_length, sample fewer frames or shorten the text"
        )
    labels = np.where(learned, input_ids, IGNORE_INDEX)
    return Encoded(input_ids[:max_length], labels[:max_length])


def encode_prompt(tokenizer: Tokenizer, conversation: Conversation, options: PromptOptions) -> tuple[int, ...]:
    """Tokens up to and including "### Assistant:" after the last turn, which must be the user's.

    Exactly the first tokens that `encode_training` gives once the answer is appended.

    Raises:
        ConversationError: as `encode_training`, or the last turn is not the user's.
        PromptTooLongError: more than `max_length` tokens.
        CheckpointError: the tokenizer has no end token.
    """
    pieces = _prompt_pieces(conversation, options)
    return fitting([token for piece in _token_ids(tokenizer, pieces, options) for token in piece], options)


def prompt_text(conversation: Conversation, options: PromptOptions) -> str:
    """The prompt as text; the end tokens behind earlier answers are not text."""
    return "".join(f" {piece.text}" if piece.learned else piece.text for piece in _prompt_pieces(conversation, options))


def clean_answer(text: str) -> str:
    """Without white space around it."""
    return text.strip()


def _prompt_pieces(conversation: Conversation, options: PromptOptions) -> list[_Piece]:
    check_asks(conversation)
    *before, _empty_answer = _pieces(Conversation((*conversation.messages, Message("assistant", ""))), options)
    return before


def _pieces(conversation: Conversation, options: PromptOptions) -> Iterator[_Piece]:
    """The sequence as alternating not-learned and learned pieces; each answer is a piece of its own."""
    _check(conversation, options)
    counts = iter(options.num_frames)
    system = options.system_prompt if conversation.system is None else conversation.system
    pending = system.strip() + VALLEY.after_system if system.strip() else ""
    for turn in conversation.turns:
        if turn.role == "user":
            content = fill_media_marks(turn.content.strip(), num_patches=options.num_patches, num_frames=counts)
            pending += f"{VALLEY.before_turn}{VALLEY.user}{VALLEY.after_name} {content}{VALLEY.end_of_turn}"
            continue
        yield _Piece(pending + VALLEY.cue, learned=False)
        yield _Piece(turn.content.strip(), learned=True)
        pending = VALLEY.end_of_turn
    if pending != VALLEY.end_of_turn:
        yield _Piece(pending, learned=False)


def _token_ids(tokenizer: Tokenizer, pieces: list[_Piece], options: PromptOptions) -> list[list[int]]:
    """Ids of each piece: the begin token in front of the first, the end token behind each answer."""
    if tokenizer.eos_token_id is None:
        raise CheckpointError("the tokenizer has no end token, by which answers end; set eos_token on the tokenizer")
    bos_token_ids = [options.bos_token_id(tokenizer), *[None] * len(pieces)]
    return [
        [*_continuation_ids(tokenizer, piece.text), tokenizer.eos_token_id]
        if piece.learned
        else tokenize(tokenizer, piece.text, bos_token_id=bos_token_id)
        for piece, bos_token_id in zip(pieces, bos_token_ids, strict=False)
    ]


def _continuation_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text` as it reads after "### Assistant: ".

    Tokenizers of the sentencepiece kind put a space before each piece by themselves; others need it in the text.
    """
    if not text:
        return []
    alone = tokenizer.encode("a", add_special_tokens=False)
    in_context = tokenizer.encode(": a", add_special_tokens=False)
    has_own_space = in_context[-len(alone) :] == alone
    return tokenizer.encode(text if has_own_space else f" {text}", add_special_tokens=False)


def _check(conversation: Conversation, options: PromptOptions) -> None:
    check_counts(conversation.num_media, options)
    for message in conversation.messages:
        if message.role != "user" and message.num_media:
            raise ConversationError(
                f"<video> and <image> belong in user turns, got one in a turn of role {message.role!r}"
            )
        written = next((token for token in ADDED_TOKENS if token in message.content), None)
        if written is not None:
            raise ConversationError(
                f"the text contains the reserved token {written}; write <video> or <image> for media"
            )
