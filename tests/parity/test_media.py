"""Sampled indices and pixels of the parity set's media against those that the original code recorded."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from parity_set import ROOT, crop_of, load_json

from valley_ray.media import decode
from valley_ray.media.preprocess import Crop, normalize
from valley_ray.media.sampling import FrameSampling, frame_indices
from valley_ray.processor import ProcessorConfig

STORED_TOLERANCE = 2e-3
"""Pixel values are stored as float16 (README)."""
FLOAT32_TOLERANCE = 1e-5
STATISTICS_TOLERANCE = 1e-4
"""Means over float32 pixels; the order of the additions differs."""
UPSTREAM_PATCH = 14
"""Patch side, pixels, that the original counts tokens with whatever the tower says (valley/data/dataset.py)."""
RAW_MEAN_TOLERANCE = 0.5
"""Levels of 0..255; decoders other than decord may round colours otherwise."""


def find(name):
    return next((ROOT / "media").rglob(Path(name).name))


def load_arrays(name):
    path = ROOT / name
    if not path.is_file():
        return {}
    with np.load(path) as arrays:
        return dict(arrays)


def sampling_of(kwargs):
    if kwargs.get("frame_mode") == "fps":
        return FrameSampling(fps=kwargs["fps_number"])
    return FrameSampling(num_frames=kwargs.get("fixed_frame_number", 8))


def statistics_of(config):
    return {"mean": config["image_mean"], "std": config["image_std"]}


OURS = ProcessorConfig(num_patches=1).model_dump()
"""CLIP's mean and deviation, which the original has in its code for videos, and its crops."""


def processor_named(media, name):
    """The recorded settings of an image processor; None where the set has none of that name."""
    return media.get("image", {}).get("processors", {}).get(name, {}).get("config")


def thinned(pixels, key, recorded):
    """Every n-th pixel as the array's name says."""
    stride = int(key.rpartition("stride")[2]) if "stride" in key else 1
    ours = pixels[:, :, ::stride, ::stride]
    assert ours.shape == recorded.shape, key
    return ours


def test_media_are_the_recorded_files():
    media = load_json("media.json")
    image = media.get("image", {})
    for name, digest in ((media["video"], media["sha256"]), (image.get("file"), image.get("sha256"))):
        assert name is None or hashlib.sha256(find(name).read_bytes()).hexdigest() == digest, name
    info = decode.probe(find(media["video"]))
    assert (info.num_frames, info.height, info.width) == (media["num_frames"], media["height"], media["width"])
    assert info.fps == pytest.approx(media["avg_fps"], abs=1e-3)


def test_indices_of_every_mode():
    media = load_json("media.json")
    for mode, want in media["modes"].items():
        indices = frame_indices(sampling_of(want["kwargs"]), num_frames=media["num_frames"], fps=media["avg_fps"])
        assert indices.tolist() == want["indices"], mode


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_raw_frames_of_every_mode(backend):
    media, arrays = load_json("media.json"), load_arrays("media_video.npz")
    path = find(media["video"])
    for mode, want in media["modes"].items():
        frames_THWC = decode.frames(path, sampling_of(want["kwargs"]), backend=backend).frames_THWC
        assert frames_THWC.shape[1:3] == (media["height"], media["width"])
        means = frames_THWC.reshape(len(frames_THWC), -1).mean(1)
        np.testing.assert_allclose(means, want["raw_mean_per_frame"], rtol=0, atol=RAW_MEAN_TOLERANCE, err_msg=mode)
        if backend == "decord":
            digests = [hashlib.sha256(frame.tobytes()).hexdigest() for frame in frames_THWC]
            assert digests == want["raw_uint8_sha256_per_frame"], mode
        if want["kwargs"] or backend != "decord":
            continue
        # The raw arrays belong to the mode without arguments.
        for key, array in arrays.items():
            if key.startswith("raw_"):
                frame_HWC = frames_THWC[0 if "first" in key else -1]
                stride = int(key.rpartition("downsampled")[2])
                np.testing.assert_array_equal(frame_HWC[::stride, ::stride], array, err_msg=key)


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_pixel_values_of_every_recorded_mode(backend):
    media = load_json("media.json")
    path = find(media["video"])
    recorded = {**load_arrays("media_video.npz"), **load_arrays("media_video_fps.npz")}
    for mode, want in media["modes"].items():
        crop = Crop(size=want["shape_CTHW"][-1])
        frames_THWC = decode.frames(path, sampling_of(want["kwargs"]), backend=backend, crop=crop).frames_THWC
        pixels = normalize(frames_THWC, **statistics_of(OURS))
        num_frames, num_colours, *size = pixels.shape
        assert [num_colours, num_frames, *size] == want["shape_CTHW"]
        assert f"torch.{pixels.dtype}" == want["dtype"]
        exact = pixels.astype(np.float64)
        for name, ours in (("mean", exact.mean((0, 2, 3))), ("per_frame_mean", exact.mean((1, 2, 3)))):
            np.testing.assert_allclose(ours, want[name], rtol=0, atol=STATISTICS_TOLERANCE, err_msg=f"{mode} {name}")
        np.testing.assert_allclose(exact.std((0, 2, 3), ddof=1), want["std"], rtol=0, atol=STATISTICS_TOLERANCE)
        assert exact.sum() / exact.size == pytest.approx(want["sum"] / exact.size, abs=STATISTICS_TOLERANCE)
        for key, array in recorded.items():
            if not key.startswith(f"{mode}_"):
                continue
            if key.endswith("first_frame_float32"):
                np.testing.assert_allclose(pixels[0], array, rtol=0, atol=FLOAT32_TOLERANCE, err_msg=key)
            else:
                ours = thinned(pixels, key, array)
                np.testing.assert_allclose(ours, array.astype(np.float32), rtol=0, atol=STORED_TOLERANCE, err_msg=key)


def test_pixel_values_of_the_image_by_every_processor():
    media = load_json("media.json")
    image, recorded = media.get("image"), load_arrays("media_image.npz")
    if image is None:
        return  # this set records none
    path = find(image["file"])
    whole = decode.frames(path, FrameSampling()).frames_THWC
    assert list(whole.shape[2:0:-1]) == image["size_wh"]
    for name, want in image["processors"].items():
        config = want.get("config") or OURS
        crop = Crop(resample="bicubic", fit="keep") if "shortest_edge" in want else crop_of(config)
        frames_THWC = decode.frames(path, FrameSampling(), crop=crop).frames_THWC
        pixels = normalize(frames_THWC, **statistics_of(config))
        assert list(pixels.shape) == want["shape"], name
        if "shortest_edge" in want:
            height, width = pixels.shape[2:]
            assert min(height, width) == want["shortest_edge"]
            assert (height // UPSTREAM_PATCH) * (width // UPSTREAM_PATCH) == want["cur_token_len"]
        if "mean" in want:
            assert pixels.mean(dtype=np.float64) == pytest.approx(want["mean"], abs=STATISTICS_TOLERANCE), name
        array = recorded.get(f"{name}_pixel_values")
        if array is not None:
            np.testing.assert_allclose(pixels, array.astype(np.float32), rtol=0, atol=STORED_TOLERANCE, err_msg=name)


def test_pixel_values_of_the_folder_of_frames_in_the_recorded_order(monkeypatch):
    media = load_json("media.json")
    folder = media.get("frames_folder")
    if folder is None:
        return  # this set records none
    listing = [find(name) for name in folder["listing"]]
    sampling = FrameSampling(num_frames=folder["fixed_frame_number"], folder_order="directory")
    # What this file system would list is another order; the recorded one was the original's.
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(listing))
    config = processor_named(media, "clip")
    crop = crop_of(config) if config else ProcessorConfig(num_patches=1).image_crop
    pixels = normalize(decode.frames(listing[0].parent, sampling, crop=crop).frames_THWC, **statistics_of(OURS))
    num_frames, num_colours, *size = pixels.shape
    assert [num_colours, num_frames, *size] == folder["shape_CTHW"]
    for key, array in load_arrays("media_image.npz").items():
        if key.startswith("frames_folder_pixel_values"):
            ours = thinned(pixels, key, array)
            np.testing.assert_allclose(ours, array.astype(np.float32), rtol=0, atol=STORED_TOLERANCE, err_msg=key)


def test_a_folder_of_frames_is_sorted_by_name():
    media = load_json("media.json")
    folder = media.get("frames_folder")
    if folder is None:
        return  # this set records none
    names = sorted(folder["listing"])
    path = find(names[0]).parent
    video = decode.frames(path, FrameSampling(num_frames=len(names)))
    for frame, name in zip(video.frames_THWC, names, strict=True):
        np.testing.assert_array_equal(frame, decode.frames(path / name, FrameSampling()).frames_THWC[0])
