"""The seven added tokens, the visual block they form, and the tokenisation rule around them.

Knows no particular tokenizer: anything with the few methods of `Tokenizer` serves (every Hugging Face tokenizer does).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from typing import Any, Protocol

from valley_ray.errors import CheckpointError

PAD = "[PAD]"
VI_FRAME = "<vi_frame>"
VI_START = "<vi_start>"
VI_END = "<vi_end>"
IM_PATCH = "<im_patch>"
IM_START = "<im_start>"
IM_END = "<im_end>"

ADDED_TOKENS = (PAD, VI_FRAME, VI_START, VI_END, IM_PATCH, IM_START, IM_END)
"""In upstream's training order, which fixes their ids: first free id of the backbone's tokenizer onwards."""

IGNORE_INDEX = -100
"""Label of a position that is not learned."""


class Tokenizer(Protocol):
    """What this house asks of a tokenizer; Hugging Face tokenizers and `SentencePieceTokenizer` both have it."""

    @property
    def bos_token_id(self) -> int | None:
        """Begin-of-sequence id, None where the tokenizer has none."""

    @property
    def eos_token_id(self) -> int | None:
        """End-of-sequence id, None where the tokenizer has none."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of `text` alone."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of `token_ids`."""

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id, added ones included."""

    def get_added_vocab(self) -> dict[str, int]:
        """Tokens that are matched as a whole before the model splits the text."""

    def save_pretrained(self, save_directory: str | PathLike[str]) -> Any:
        """Write the tokenizer's files."""


@dataclass(frozen=True)
class AddedTokenIds:
    """Ids of the seven added tokens in one tokenizer."""

    pad: int
    vi_frame: int
    vi_start: int
    vi_end: int
    im_patch: int
    im_start: int
    im_end: int


def added_token_ids(tokenizer: Tokenizer) -> AddedTokenIds:
    """Look the seven tokens up; raises CheckpointError naming those that the tokenizer lacks."""
    vocab = tokenizer.get_added_vocab()
    missing = [token for token in ADDED_TOKENS if token not in vocab]
    if missing:
        raise CheckpointError(
            f"the tokenizer lacks the added tokens {', '.join(missing)}; expected all of {', '.join(ADDED_TOKENS)}: "
            "use the tokenizer saved with the Valley model, or make the model with from_backbones"
        )
    return AddedTokenIds(*(vocab[token] for token in ADDED_TOKENS))


def visual_block(*, num_patches: int, num_frames: int) -> str:
    """Text that stands for one clip or image: P patch placeholders, then one placeholder per frame, as upstream."""
    return IM_START + IM_PATCH * num_patches + IM_END + VI_START + VI_FRAME * num_frames + VI_END


def tokenize(tokenizer: Tokenizer, text: str, *, bos_token_id: int | None = None) -> list[int]:
    """Ids of `text` by upstream's rule (the slow LLaMA tokenizer of transformers 4.28), which holds for any tokenizer.

    The text is cut at the added tokens; white space beside one of the seven is dropped (beside other special tokens it
    stays); every piece that is left is encoded on its own. `bos_token_id` is put in front where given; no end token.
    """
    added = tokenizer.get_added_vocab()
    pieces = _added_token_pattern(frozenset(added)).split(text)
    ids = [] if bos_token_id is None else [bos_token_id]
    for position, piece in enumerate(pieces):
        if position % 2:
            ids.append(added[piece])
            continue
        if position and pieces[position - 1] in ADDED_TOKENS:
            piece = piece.lstrip()
        if position + 1 < len(pieces) and pieces[position + 1] in ADDED_TOKENS:
            piece = piece.rstrip()
        if piece:
            ids.extend(tokenizer.encode(piece, add_special_tokens=False))
    return ids


@lru_cache(maxsize=16)
def _added_token_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
