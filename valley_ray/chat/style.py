"""What a prompt style is: one interface over the forms in which a conversation becomes text and tokens.

Knows no particular style; `chat.styles` names them all. L tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from valley_ray.chat.conversation import MEDIA_MARK, Conversation
from valley_ray.chat.tokens import IGNORE_INDEX, Tokenizer, visual_block
from valley_ray.errors import ConfigError, ConversationError, PromptTooLongError


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


BosToken = Literal["own", "eos"]
"""What stands in front of a sequence: the tokenizer's begin token, or its end token.

The original takes the end token where the model's path contains "llama" (valley/train/train.py).
"""


@dataclass(frozen=True)
class PromptOptions:
    """What a style needs to know beside the conversation and the tokenizer."""

    system_prompt: str
    """Used where the conversation brings none."""
    num_patches: int
    """P, patch placeholders per visual block."""
    num_frames: Sequence[int] = field(default=())
    """One count per media mark, in order."""
    max_length: int = 2048
    """Tokens that the language model takes."""
    bos_token: BosToken = "own"
    only_mask_system: bool = False
    """Learn the user's turns too; `upstream-train` alone knows it."""

    def bos_token_id(self, tokenizer: Tokenizer) -> int | None:
        """The id in front of a sequence, None where the tokenizer has none."""
        return tokenizer.eos_token_id if self.bos_token == "eos" else tokenizer.bos_token_id


class Style(Protocol):
    """A form of prompts; each module of one style has these names."""

    @property
    def STOP_STRINGS(self) -> tuple[str, ...]:
        """Text that ends an answer beside the end token."""

    def prompt_text(self, conversation: Conversation, options: PromptOptions) -> str:
        """The prompt that `encode_prompt` tokenizes, visual blocks spelled out."""

    def encode_prompt(
        self, tokenizer: Tokenizer, conversation: Conversation, options: PromptOptions
    ) -> tuple[int, ...]:
        """Tokens up to where the answer begins; raises ConversationError or PromptTooLongError."""

    def encode_training(self, tokenizer: Tokenizer, conversation: Conversation, options: PromptOptions) -> Encoded:
        """Tokens and labels of a whole conversation, or ConfigError for a style that only asks."""

    def clean_answer(self, text: str) -> str:
        """What is shown of an answer's text."""


def no_training_form(style: str) -> ConfigError:
    """The error of a style that only asks."""
    return ConfigError(
        f"prompt_style {style!r} has no training form, only a prompt; train with 'valley' or 'upstream-train'"
    )


def fill_media_marks(text: str, *, num_patches: int, num_frames: Iterator[int]) -> str:
    """Put a visual block in place of each mark, taking one frame count from `num_frames` per mark."""
    return MEDIA_MARK.sub(lambda _: visual_block(num_patches=num_patches, num_frames=next(num_frames)), text)


def check_counts(num_marks: int, options: PromptOptions) -> None:
    """Raise ConversationError unless there is one frame count per mark."""
    if num_marks != len(options.num_frames):
        raise ConversationError(
            f"the conversation has {num_marks} <video>/<image> marks but {len(options.num_frames)} pieces of "
            "media came; write one mark per piece, in order"
        )


def check_asks(conversation: Conversation) -> None:
    """Raise ConversationError unless the last turn is the user's."""
    if conversation.turns[-1].role != "user":
        raise ConversationError(f"the last message must be the user's, got role {conversation.turns[-1].role!r}")


def fitting(ids: Sequence[int], options: PromptOptions) -> tuple[int, ...]:
    """The prompt itself; raises PromptTooLongError where it is longer than the model takes."""
    if len(ids) > options.max_length:
        raise PromptTooLongError(
            f"the prompt has {len(ids)} tokens but the model takes {options.max_length}; "
            "shorten the conversation or send fewer frames"
        )
    return tuple(ids)
