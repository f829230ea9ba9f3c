"""Logits, features and losses of the original's checkpoints: every variant, every case, under both splices."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from parity_model import has_variant, load_arrays, open_variant, stored_clips, text_case
from parity_set import load_json

from valley_ray.errors import ConversationError, ValleyError
from valley_ray.model import ValleyConfig, ValleyForConditionalGeneration

ATOL, RTOL = 1e-3, 1e-4
"""The set's README; measured noise between float32 and float64 is 2e-5."""

SURE = 1e-2
"""Gap between two logits above which their order is compared (the set's README)."""

LAST = 8
"""Positions of a row whose whole logits are recorded."""


class Case:
    """One recorded forward pass: `ids`, `labels`, `mask` [B, L] and the clips that the original was given."""

    def __init__(self, name: str, recorded: dict[str, Any], arrays: Any, clips: dict[int, torch.Tensor]) -> None:
        self.name, self.recorded, self.arrays = name, recorded, arrays
        self.ids = torch.from_numpy(arrays[f"{name}.input_ids"]).long()
        self.labels = torch.from_numpy(arrays[f"{name}.labels"]).long()
        self.lengths = recorded["lengths"]
        self.mask = (torch.arange(self.ids.shape[1])[None] < torch.tensor(self.lengths)[:, None]).long()
        self._clips = clips

    def media(self, config: ValleyConfig, *, text_rows: bool) -> list[torch.Tensor]:
        """What the images' shapes say: rows of text have a zero frame (left out unless `text_rows`), a stacked tensor
        is a video and itself reversed."""
        shapes = self.recorded["images"]
        if isinstance(shapes, str):
            numbers = [int(number) for number in re.findall(r"\d+", shapes)]
            return [self._clips[numbers[1]], self._clips[numbers[1]].flip(0)] if numbers else []
        is_text = ~(self.ids == config.im_patch_token_id).any(dim=1)
        if len(shapes) != len(self.ids):
            is_text = torch.zeros(len(shapes), dtype=torch.bool)
        clips = [
            torch.zeros(shape) if text else self._clips[shape[0]] for shape, text in zip(shapes, is_text, strict=True)
        ]
        return [clip for clip, text in zip(clips, is_text, strict=True) if text_rows or not text]

    def blocks(self, config: ValleyConfig) -> list[int]:
        """Frame tokens of each visual block over the batch."""
        counts = []
        for row in self.ids.tolist():
            _, *blocks = "".join(
                {config.im_start_token_id: "b", config.vi_frame_token_id: "f"}.get(token, "") for token in row
            ).split("b")
            counts += [len(block) for block in blocks]
        return counts


def each_variant(*, splice: str) -> Iterator[tuple[str, ValleyForConditionalGeneration, list[Case]]]:
    """Name, model and cases of every recorded checkpoint."""
    for name, recorded in load_json("forward.json").items():
        if not has_variant(name):
            continue
        arrays = load_arrays(f"forward_{name}.npz")
        cases = [
            Case(case, values, arrays, stored_clips(name, by_rate="fps" in case))
            for case, values in recorded["cases"].items()
            if "lengths" in values
        ]
        yield name, open_variant(name, splice=splice), cases


@torch.no_grad()
def test_upstream_splice_gives_the_logits_and_losses_of_every_case() -> None:
    for name, model, cases in each_variant(splice="upstream"):
        for case in cases:
            assert_equal(model, case, case.media(model.config, text_rows=True), context=f"{name} {case.name}")


@torch.no_grad()
def test_strict_splice_gives_the_same_or_refuses_what_the_original_puts_in_the_wrong_place() -> None:
    for name, model, cases in each_variant(splice="strict"):
        for case in cases:
            media, context = case.media(model.config, text_rows=True), f"{name} {case.name}"
            if case.blocks(model.config) == [len(clip) for clip in media]:
                assert_equal(model, case, media, context=context)
                continue
            with pytest.raises(ConversationError):
                model(case.ids, case.mask, pixel_values=media)
            visual = case.media(model.config, text_rows=False)
            is_slip = has_text_row_before_a_clip(case, model.config)
            if case.blocks(model.config) == [len(clip) for clip in visual] and not is_slip:
                assert_equal(model, case, visual, context=context)


@torch.no_grad()
def test_strict_splice_does_not_shift_pixels_behind_a_row_of_text() -> None:
    for name, model, cases in each_variant(splice="strict"):
        for case in cases:
            right = [c for c in cases if c is not case and torch.equal(c.ids, case.ids)]
            if not has_text_row_before_a_clip(case, model.config) or not right:
                continue
            assert_equal(
                model, right[0], case.media(model.config, text_rows=False), context=f"{name} {case.name} set right"
            )


@torch.no_grad()
def test_tower_projector_and_pooling_equal_the_recorded_ones() -> None:
    for name, model, _ in each_variant(splice="strict"):
        arrays = load_arrays(f"forward_{name}.npz")
        if "video.cls_projected" not in arrays:
            continue
        features = model.encode_frames(stored_clips(name)[len(arrays["video.cls_projected"])])
        tokens = model.core.visual_tokens(features)
        num_patches = model.config.num_patches
        assert_close(features[0], arrays["video.tower_hidden_frame0"], name)
        assert_close(tokens[:num_patches], arrays["video.patches_pooled"], name)
        assert_close(tokens[num_patches:], arrays["video.cls_projected"], name)


@torch.no_grad()
def test_without_frame_ids_frame_tokens_stay_away_as_in_the_serving_worker() -> None:
    for name, recorded in load_json("forward.json").items():
        case = recorded["cases"].get("vi_ids_unset")
        sample = text_case(case["note"].split()[0]) if case and has_variant(name) else None
        if sample is None:
            continue
        model = open_variant(name, splice="upstream-serve")
        ids, labels = sample
        video = stored_clips(name)[int((ids == model.config.vi_frame_token_id).sum())]
        output = model(ids, pixel_values=[video], labels=labels)
        np.testing.assert_allclose(output.loss.item(), case["loss"], atol=ATOL, rtol=RTOL, err_msg=name)
        last = load_arrays(f"forward_{name}.npz")["vi_ids_unset.last8_logits"]
        assert_close(output.logits[0, -LAST:], last, name)


@torch.no_grad()
def test_double_precision_gives_the_recorded_double_precision_loss() -> None:
    for name, model, cases in each_variant(splice="upstream"):
        reference = load_json("forward.json")[name]["cases"].get("float64_reference")
        for case in cases:
            if reference is None or case.name != reference["case"]:
                continue
            media = [clip.double() for clip in case.media(model.config, text_rows=True)]
            loss = model.double()(case.ids, case.mask, pixel_values=media, labels=case.labels).loss
            np.testing.assert_allclose(loss.item(), reference["loss"], atol=ATOL, rtol=RTOL, err_msg=name)


@torch.no_grad()
def test_what_the_original_crashes_on_is_an_error_that_says_what_to_do() -> None:
    for splice in ("strict", "upstream"):
        for name, model, cases in each_variant(splice=splice):
            config = model.config
            case = next((c for c in cases if len(c.blocks(config)) == 1 and len(c.ids) == 1), None)
            if case is None:
                continue
            side = config.image_size
            (media,) = case.media(config, text_rows=True)
            cut = int((case.ids == config.im_end_token_id).nonzero()[0, 1]) - 1
            wrong: dict[str, tuple[torch.Tensor, Any]] = {
                "text_with_3d_zeros_list": (case.ids, [media, torch.zeros(3, side, side)]),
                "all_text_stacked_3d": (case.ids, torch.zeros(2, 3, side, side)),
                "half_images_float_model": (case.ids, [media.half()]),
                "truncated_patches": (case.ids[:, :cut], [media]),
            }
            for error in load_json("forward.json")[name].get("errors", {}):
                if error not in wrong:
                    continue
                ids, pixel_values = wrong[error]
                with pytest.raises(ValleyError, match=r"; \w+ "):
                    model(ids, pixel_values=pixel_values)


def has_text_row_before_a_clip(case: Case, config: ValleyConfig) -> bool:
    """Whether the original gives a later row the pixels meant for a row of text."""
    is_visual = (case.ids == config.im_patch_token_id).any(dim=1).tolist()
    return len(case.media(config, text_rows=True)) == len(is_visual) and is_visual != sorted(is_visual, reverse=True)


def assert_equal(model: ValleyForConditionalGeneration, case: Case, media: list[torch.Tensor], *, context: str) -> None:
    """Loss, argmax, max, logsumexp, top 5 and last logits of `case` run with `media`."""
    output = model(case.ids, case.mask, pixel_values=media, labels=case.labels)
    np.testing.assert_allclose(output.loss.item(), case.recorded["loss"], atol=ATOL, rtol=RTOL, err_msg=context)
    arrays = {key: case.arrays[f"{case.name}.{key}"] for key in ("argmax", "max", "logsumexp", "top1_gap")}
    last_logits, last_top5 = (case.arrays[f"{case.name}.{key}"] for key in ("last8_logits", "top5_ids_last8"))
    for row, length in enumerate(case.lengths):
        logits = output.logits[row, :length]
        sure = arrays["top1_gap"][row, :length] > SURE
        np.testing.assert_array_equal(logits.argmax(-1)[sure], arrays["argmax"][row, :length][sure], err_msg=context)
        assert_close(logits.amax(-1), arrays["max"][row, :length], f"{context} row {row}")
        assert_close(logits.logsumexp(-1), arrays["logsumexp"][row, :length], f"{context} row {row}")
        assert_close(logits[-LAST:], last_logits[row], f"{context} row {row}")
        best = np.sort(last_logits[row], axis=-1)[:, :-7:-1]
        is_ordered = (-np.diff(best) > SURE).all(axis=1)
        top5 = logits[-LAST:].topk(5).indices.numpy()
        np.testing.assert_array_equal(top5[is_ordered], last_top5[row][is_ordered], err_msg=context)


def assert_close(ours: torch.Tensor, theirs: npt.NDArray[np.float32], context: str) -> None:
    np.testing.assert_allclose(ours.numpy(), theirs, atol=ATOL, rtol=RTOL, err_msg=context)
