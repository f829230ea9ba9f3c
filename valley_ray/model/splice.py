"""Splice: which visual tokens stand on which placeholders of a batch of token ids.

`strict` is the rule of this house: every visual block has a clip of its own and they fit, or there is an error.
`upstream` and `upstream-serve` are the original's rules (valley/model/valley.py, the loop over rows in forward), kept
to repeat its numbers. B rows, L tokens, C clips, T frames, P patches, D language width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from valley_ray.errors import CheckpointError, ConversationError
from valley_ray.model.config import ValleyConfig


class Placement(NamedTuple):
    """`tokens` [N, D] belong on `positions` int64 [N] of the flattened batch."""

    positions: torch.Tensor
    tokens: torch.Tensor


Splice = Callable[[torch.Tensor, Sequence[torch.Tensor]], Placement | None]
"""Token ids int64 [B, L] and the visual tokens [P + T, D] of C clips → where they go, None where nothing does."""


def build_splice(config: ValleyConfig) -> Splice:
    """The rule that `config.splice` names; raises CheckpointError where there is none."""
    match config.splice:
        case "strict":
            return partial(place_strictly, config)
        case "upstream":
            return partial(place_like_upstream, config, frame_tokens=True)
        case "upstream-serve":
            return partial(place_like_upstream, config, frame_tokens=False)
        case other:
            raise CheckpointError(
                f"config.json: splice={other!r} is unknown; expected one of strict, upstream, upstream-serve"
            )


def place_strictly(
    config: ValleyConfig, input_ids: torch.Tensor, visual_tokens: Sequence[torch.Tensor]
) -> Placement | None:
    """One clip per visual block, in the order of the blocks over the batch.

    Raises:
        ConversationError: more or fewer placeholders than visual tokens, or a block whose patches and frames are not
            those of its clip.
    """
    ids = input_ids.flatten()
    is_patch = ids == config.im_patch_token_id
    positions = (is_patch | (ids == config.vi_frame_token_id)).nonzero().squeeze(-1)
    num_tokens = sum(map(len, visual_tokens))
    if len(positions) != num_tokens:
        raise ConversationError(
            f"the token ids hold {len(positions)} visual placeholders but the media give {num_tokens} visual tokens; "
            "encode the prompt with the frame counts of the media"
        )
    if not num_tokens:
        return None
    num_patches = config.num_patches
    expected = torch.cat([torch.arange(len(tokens), device=ids.device) < num_patches for tokens in visual_tokens])
    if not torch.equal(is_patch[positions], expected):
        frames = ", ".join(str(len(tokens) - num_patches) for tokens in visual_tokens)
        raise ConversationError(
            f"the visual blocks of the token ids do not take clips of {frames} frames in this order; give the media in "
            "the order of the messages"
        )
    return Placement(positions, torch.cat(list(visual_tokens)))


def place_like_upstream(
    config: ValleyConfig, input_ids: torch.Tensor, visual_tokens: Sequence[torch.Tensor], *, frame_tokens: bool
) -> Placement | None:
    """One clip per row that has patches, its patches in every block of the row.

    Clips are taken in order and rows of text take none: clips may be left over, and one meant for a row of text goes
    to the next row. Frame tokens are put in only with `frame_tokens` and where the row has as many as its clip.

    Raises:
        ConversationError: fewer clips than rows with patches, or a block that was cut.
    """
    if not visual_tokens:
        return None
    rows = [row for row in range(len(input_ids)) if (input_ids[row] == config.im_patch_token_id).any()]
    if len(rows) > len(visual_tokens):
        raise ConversationError(
            f"{len(rows)} rows of token ids have visual blocks but the media give {len(visual_tokens)} clips; give one "
            "clip per row"
        )
    found = []
    for row, tokens in zip(rows, visual_tokens, strict=False):
        offset = row * input_ids.shape[1]
        placements = _blocks_of_row(config, input_ids[row], tokens, frame_tokens=frame_tokens)
        found += [Placement(block.positions + offset, block.tokens) for block in placements]
    if not found:
        return None
    return Placement(torch.cat([block.positions for block in found]), torch.cat([block.tokens for block in found]))


def _blocks_of_row(
    config: ValleyConfig, ids: torch.Tensor, tokens: torch.Tensor, *, frame_tokens: bool
) -> list[Placement]:
    """Where the clip `tokens` [P + T, D] goes in one row [L]."""
    patches, frames = tokens[: config.num_patches], tokens[config.num_patches :]
    if (ids == config.im_start_token_id).sum() != (ids == config.im_end_token_id).sum():
        raise ConversationError(
            "a row of token ids has unequal numbers of <im_start> and <im_end>: a visual block was cut; "
            "raise max_length or shorten the text"
        )
    blocks = _inside(ids, config.im_start_token_id, config.im_end_token_id, length=len(patches))
    if blocks is None:
        raise ConversationError(
            f"a visual block of the token ids does not hold {len(patches)} patches; encode the prompt with the "
            "processor of this model"
        )
    placements = [Placement(positions, patches) for positions in blocks]
    has_as_many = (ids == config.vi_frame_token_id).sum() == len(frames)
    is_whole = (ids == config.vi_start_token_id).sum() == (ids == config.vi_end_token_id).sum()
    if frame_tokens and has_as_many and is_whole:
        blocks = _inside(ids, config.vi_start_token_id, config.vi_end_token_id, length=len(frames))
        placements += [Placement(positions, frames) for positions in blocks or ()]
    return placements


def _inside(ids: torch.Tensor, start: int, end: int, *, length: int) -> list[torch.Tensor] | None:
    """Positions [length] after every `start`, or None where one is not followed by `end` after so many."""
    starts = (ids == start).nonzero().squeeze(-1).tolist()
    if any(at + length + 1 >= len(ids) or ids[at + length + 1] != end for at in starts):
        return None
    return [torch.arange(at + 1, at + 1 + length, device=ids.device) for at in starts]
