"""Logits, features and losses of the original's checkpoints (mean pooling over a CLIP tower so far)."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from parity_set import ROOT, load_json, require_set

from valley_ray.model import ValleyForConditionalGeneration

ATOL, RTOL = 1e-3, 1e-4
"""The set's README; measured noise between float32 and float64 is 2e-5."""

SAME_RULE_CASES = {
    "mixed_video_image_text": ("video", "image"),
    "text_first_images_only_for_visual": ("video", "image"),
    "two_videos_tensor": ("video", "reversed"),
    "text_only_no_images": (),
    "fps_frames": ("video_fps",),
}
"""Cases in which the original follows its own rule, and the media of their visual blocks; the others show its slips."""


def open_mean_checkpoints(monkeypatch: pytest.MonkeyPatch) -> dict[str, ValleyForConditionalGeneration]:
    """The set's mean-pooling checkpoints over a plain CLIP tower, by name."""
    monkeypatch.chdir(ROOT)
    opened = {}
    for name in load_json("forward.json"):
        config = load_json(f"checkpoints/{name}/config.json")
        if any(config.get(switch) for switch in ("use_patch_importance_pooling", "use_delta_transformer")):
            continue
        if "chinese" in config["mm_vision_tower"]:
            continue
        opened[name] = ValleyForConditionalGeneration.from_pretrained(Path("checkpoints") / name)
    return opened


def stored_pixels() -> dict[str, torch.Tensor]:
    """The set's inputs: [T, 3, S, S], stored float16."""
    require_set()
    video, fps, image = (np.load(ROOT / name) for name in ("media_video.npz", "media_video_fps.npz", "media_image.npz"))
    pixels = {
        "video": torch.from_numpy(video["fixed8_pixel_values"]).float(),
        "video_fps": torch.from_numpy(fps["fps05_pixel_values"]).float(),
        "image": torch.from_numpy(image["clip_pixel_values"]).float(),
    }
    return pixels | {"reversed": pixels["video"].flip(0)}


@torch.no_grad()
def test_logits_and_losses_equal_the_recorded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = load_json("forward.json")
    pixels = stored_pixels()
    for name, model in open_mean_checkpoints(monkeypatch).items():
        arrays = np.load(ROOT / f"forward_{name}.npz")
        for case, media in SAME_RULE_CASES.items():
            if case not in recorded[name]["cases"]:
                continue
            assert_case(model, arrays, case, recorded[name]["cases"][case], [pixels[kind] for kind in media])


@torch.no_grad()
def test_tower_projector_and_pooling_equal_the_recorded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    video = stored_pixels()["video"]
    for name, model in open_mean_checkpoints(monkeypatch).items():
        arrays = np.load(ROOT / f"forward_{name}.npz")
        features = model.encode_frames(video)
        tokens = model.core.visual_tokens(features)
        num_patches = model.config.num_patches
        assert_close(features[0], arrays["video.tower_hidden_frame0"], name)
        assert_close(tokens[:num_patches], arrays["video.patches_pooled"], name)
        assert_close(tokens[num_patches:], arrays["video.cls_projected"], name)


def assert_case(
    model: ValleyForConditionalGeneration, arrays: Any, case: str, recorded: dict[str, Any], media: list[torch.Tensor]
) -> None:
    input_ids = torch.from_numpy(arrays[f"{case}.input_ids"]).long()
    labels = torch.from_numpy(arrays[f"{case}.labels"]).long()
    mask = torch.arange(input_ids.shape[1])[None] < torch.tensor(recorded["lengths"])[:, None]
    output = model(input_ids, mask.long(), pixel_values=media, labels=labels)
    np.testing.assert_allclose(output.loss.item(), recorded["loss"], atol=ATOL, rtol=RTOL, err_msg=case)
    for row, length in enumerate(recorded["lengths"]):
        last = output.logits[row, length - 8 : length]
        assert_close(last, arrays[f"{case}.last8_logits"][row], f"{case} row {row}")
        sure = arrays[f"{case}.top1_gap"][row, :length] > 1e-2
        argmax = output.logits[row, :length].argmax(-1).numpy()
        np.testing.assert_array_equal(argmax[sure], arrays[f"{case}.argmax"][row, :length][sure], err_msg=case)
        maximum = output.logits[row, :length].amax(-1)
        assert_close(maximum, arrays[f"{case}.max"][row, :length], f"{case} row {row}")


def assert_close(ours: torch.Tensor, theirs: npt.NDArray[np.float32], context: str) -> None:
    np.testing.assert_allclose(ours.numpy(), theirs, atol=ATOL, rtol=RTOL, err_msg=context)
