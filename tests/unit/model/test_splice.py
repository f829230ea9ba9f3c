"""Which visual tokens stand on which placeholders, by each of the three rules. P is 1, D is 3."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from valley_ray.errors import CheckpointError, ConversationError
from valley_ray.model import ValleyConfig
from valley_ray.model.splice import Placement, build_splice

PATCH, FRAME, IM_START, IM_END, VI_START, VI_END, TEXT = 40, 41, 42, 43, 44, 45, 7


def rule(name: str) -> ValleyConfig:
    return ValleyConfig(
        text_config=LlamaConfig(vocab_size=50, hidden_size=8, num_attention_heads=2),
        vision_config=CLIPVisionConfig(image_size=1, patch_size=1),
        splice=name,
        im_patch_token_id=PATCH,
        vi_frame_token_id=FRAME,
        im_start_token_id=IM_START,
        im_end_token_id=IM_END,
        vi_start_token_id=VI_START,
        vi_end_token_id=VI_END,
    )


def place(name: str, rows: list[list[int]], clips: list[torch.Tensor]) -> Placement | None:
    length = max(map(len, rows))
    return build_splice(rule(name))(torch.tensor([row + [0] * (length - len(row)) for row in rows]), clips)


def block(num_frames: int, *, num_patches: int = 1) -> list[int]:
    return [IM_START, *[PATCH] * num_patches, IM_END, VI_START, *[FRAME] * num_frames, VI_END]


def clip(num_frames: int, value: float, *, num_patches: int = 1) -> torch.Tensor:
    """Visual tokens [P + T, 3]: patches are `value`, frame tokens a half more."""
    return torch.tensor([value] * num_patches + [value + 0.5] * num_frames)[:, None].expand(-1, 3)


def placed(placement: Placement | None) -> dict[int, float]:
    """Value by position."""
    assert placement is not None
    return dict(zip(placement.positions.tolist(), placement.tokens[:, 0].tolist(), strict=True))


def test_strict_gives_every_block_its_own_clip() -> None:
    row = [TEXT, *block(2), *block(1)]
    assert placed(place("strict", [row], [clip(2, 1.0), clip(1, 2.0)])) == {2: 1.0, 5: 1.5, 6: 1.5, 9: 2.0, 12: 2.5}


def test_strict_refuses_clips_in_the_wrong_order() -> None:
    with pytest.raises(ConversationError, match="do not take clips of 1, 2 frames in this order"):
        place("strict", [[*block(2), *block(1)]], [clip(1, 1.0), clip(2, 2.0)])


def test_upstream_puts_one_clip_in_every_block_of_its_row_and_skips_frames_that_do_not_add_up() -> None:
    two_blocks = [*block(2), *block(2)]
    assert placed(place("upstream", [two_blocks], [clip(2, 1.0)])) == {1: 1.0, 8: 1.0}
    assert placed(place("upstream", [block(2)], [clip(2, 1.0)])) == {1: 1.0, 4: 1.5, 5: 1.5}
    assert placed(place("upstream-serve", [block(2)], [clip(2, 1.0)])) == {1: 1.0}


def test_upstream_gives_the_clip_of_a_text_row_to_the_next_row() -> None:
    rows = [[TEXT] * 6, block(1)]
    assert placed(place("upstream", rows, [clip(1, 1.0), clip(1, 2.0)])) == {7: 1.0, 10: 1.5}


def test_upstream_leaves_placeholders_alone_without_any_media() -> None:
    assert place("upstream", [block(1)], []) is None
    assert place("upstream", [[TEXT]], [clip(1, 1.0)]) is None


def test_upstream_refuses_cut_blocks_and_rows_without_a_clip() -> None:
    with pytest.raises(ConversationError, match="unequal numbers of <im_start> and <im_end>"):
        place("upstream", [block(1)[:2]], [clip(1, 1.0)])
    with pytest.raises(ConversationError, match="does not hold 1 patches"):
        place("upstream", [block(1, num_patches=2)], [clip(1, 1.0)])
    with pytest.raises(ConversationError, match="2 rows of token ids have visual blocks but the media give 1 clips"):
        place("upstream", [block(1), block(1)], [clip(1, 1.0)])


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(CheckpointError, match="splice='loose' is unknown; expected one of strict, upstream"):
        build_splice(rule("loose"))
