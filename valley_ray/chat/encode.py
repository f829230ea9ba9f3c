"""Conversation → input_ids and labels, in the house's own prompt style `valley`.

The text is upstream's training form, ``system\\n\\n### Human: question\\n### Assistant: answer``, and every answer ends
with the tokenizer's end token, by which generation stops. Prompt and training tokens come from one walk over the turns
that cuts the text after each "### Assistant:", so a prompt is a prefix of its training sequence for any tokenizer, and
the learned positions (answer and end token) are known without measuring. Knows no torch and no media. L tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from valley_ray.chat.conversation import MEDIA_MARK, Conversation, Message
from valley_ray.chat.templates import VALLEY
from valley_ray.chat.tokens import ADDED_TOKENS, IGNORE_INDEX, Tokenizer, tokenize, visual_block
from valley_ray.errors import CheckpointError, ConversationError, PromptTooLongError


@dataclass(frozen=True, eq=False)
class Encoded:
    """One training sequence."""

    input_ids: npt.NDArray[np.int64]
    """int64 [L]."""
    labels: npt.NDArray[np.int64]
    """int64 [L]; the id itself where it is learned, else -100. Not shifted: position i is predicted from i - 1."""

    @property
    def num_label_tokens(self) -> int:
        """Positions that are learned."""
        return int(np.count_nonzero(self.labels != IGNORE_INDEX))


@dataclass(frozen=True)
class _Piece:
    """Consecutive tokens of one kind."""

    ids: tuple[int, ...]
    learned: bool


def encode_training(
    tokenizer: Tokenizer,
    conversation: Conversation,
    *,
    system_prompt: str,
    num_patches: int,
    num_frames: Sequence[int],
    max_length: int,
) -> Encoded:
    """Tokens and labels of a whole conversation; what lies behind `max_length` is cut, as upstream does.

    `num_frames` holds one count per media mark. `system_prompt` is used where the conversation brings none.

    Raises:
        ConversationError: no answer to learn from, marks and `num_frames` differ, a mark outside a user turn, or an
            added token (``<im_patch>`` and friends) written in a text.
        PromptTooLongError: the cut falls into or before a visual block, or leaves nothing to learn.
        CheckpointError: the tokenizer has no end token.
    """
    pieces = list(_pieces(tokenizer, conversation, system_prompt, num_patches, num_frames))
    input_ids = np.array([token for piece in pieces for token in piece.ids], dtype=np.int64)
    learned = np.repeat([piece.learned for piece in pieces], [len(piece.ids) for piece in pieces])
    if not learned.any():
        raise ConversationError("a training conversation needs an assistant turn to learn from, got none")
    placeholder_ids = [tokenizer.get_added_vocab()[token] for token in ADDED_TOKENS[1:]]
    if len(input_ids) > max_length and (
        np.isin(input_ids[max_length:], placeholder_ids).any() or not learned[:max_length].any()
    ):
        raise PromptTooLongError(
            f"the sequence has {len(input_ids)} tokens and {max_length=} would cut its media or all of its answer; "
            "raise max_length, sample fewer frames or shorten the text"
        )
    labels = np.where(learned, input_ids, IGNORE_INDEX)
    return Encoded(input_ids[:max_length], labels[:max_length])


def encode_prompt(
    tokenizer: Tokenizer,
    conversation: Conversation,
    *,
    system_prompt: str,
    num_patches: int,
    num_frames: Sequence[int],
    max_length: int,
) -> tuple[int, ...]:
    """Tokens up to and including "### Assistant:" after the last turn, which must be the user's.

    Exactly the first tokens that `encode_training` gives once the answer is appended.

    Raises:
        ConversationError: as `encode_training`, or the last turn is not the user's.
        PromptTooLongError: more than `max_length` tokens.
    """
    if conversation.turns[-1].role != "user":
        raise ConversationError(f"the last message must be the user's, got role {conversation.turns[-1].role!r}")
    answered = Conversation((*conversation.messages, Message("assistant", "")))
    *before, _empty_answer = _pieces(tokenizer, answered, system_prompt, num_patches, num_frames)
    ids = tuple(token for piece in before for token in piece.ids)
    if len(ids) > max_length:
        raise PromptTooLongError(
            f"the prompt has {len(ids)} tokens but the model takes {max_length}; "
            "shorten the conversation or send fewer frames"
        )
    return ids


def replace_media_marks(text: str, *, num_patches: int, num_frames: Iterator[int]) -> str:
    """Put a visual block in place of each mark, taking one frame count from `num_frames` per mark."""
    return MEDIA_MARK.sub(lambda _: visual_block(num_patches=num_patches, num_frames=next(num_frames)), text)


def _pieces(
    tokenizer: Tokenizer, conversation: Conversation, system_prompt: str, num_patches: int, num_frames: Sequence[int]
) -> Iterator[_Piece]:
    """The sequence as alternating not-learned and learned pieces; each answer is a piece of its own, end token last."""
    _check(conversation, num_frames)
    if tokenizer.eos_token_id is None:
        raise CheckpointError("the tokenizer has no end token, by which answers end; set eos_token on the tokenizer")
    counts = iter(num_frames)
    system = system_prompt if conversation.system is None else conversation.system
    pending = system.strip() + VALLEY.after_system if system.strip() else ""
    bos_token_id = tokenizer.bos_token_id
    for turn in conversation.turns:
        if turn.role == "user":
            content = replace_media_marks(turn.content.strip(), num_patches=num_patches, num_frames=counts)
            pending += f"{VALLEY.before_turn}{VALLEY.user}{VALLEY.after_name} {content}{VALLEY.end_of_turn}"
            continue
        yield _Piece(tuple(tokenize(tokenizer, pending + VALLEY.cue, bos_token_id=bos_token_id)), learned=False)
        answer = _continuation_ids(tokenizer, turn.content.strip())
        yield _Piece((*answer, tokenizer.eos_token_id), learned=True)
        pending, bos_token_id = VALLEY.end_of_turn, None
    if pending != VALLEY.end_of_turn:
        yield _Piece(tuple(tokenize(tokenizer, pending, bos_token_id=bos_token_id)), learned=False)


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


def _check(conversation: Conversation, num_frames: Sequence[int]) -> None:
    if conversation.num_media != len(num_frames):
        raise ConversationError(
            f"the conversation has {conversation.num_media} <video>/<image> marks but {len(num_frames)} pieces of "
            "media came; write one mark per piece, in order"
        )
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
