"""Sampled indices and pixels of the parity set's media against those that the original code recorded."""

import hashlib

import numpy as np
import pytest
from parity_set import ROOT, load_json

from valley_ray.media import decode
from valley_ray.media.preprocess import Crop, normalize, resize_and_crop
from valley_ray.media.sampling import FrameSampling, frame_indices

STORED_TOLERANCE = 2e-3
"""Pixel values are stored as float16 (README)."""
FLOAT32_TOLERANCE = 1e-5
RAW_MEAN_TOLERANCE = 0.5
"""Levels of 0..255; decoders other than decord may round colours otherwise."""


def find(name):
    return next((ROOT / "media").rglob(name))


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


def image_statistics(media):
    config = media["image"]["processors"]["clip"]["config"]
    return {"mean": config["image_mean"], "std": config["image_std"]}


def image_crop(media):
    config = media["image"]["processors"]["clip"]["config"]
    size = config["crop_size"]["height"]
    return Crop(size=size, short_side=config["size"]["shortest_edge"], resample="bicubic", corner="floored")


def test_indices_of_every_mode():
    media = load_json("media.json")
    for mode, want in media["modes"].items():
        indices = frame_indices(sampling_of(want["kwargs"]), num_frames=media["num_frames"], fps=media["avg_fps"])
        assert indices.tolist() == want["indices"], mode


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_raw_frames_of_every_mode(backend):
    if backend == "decord":
        pytest.importorskip("decord")
    media = load_json("media.json")
    path = find(media["video"])
    for mode, want in media["modes"].items():
        frames_THWC = decode.frames(path, sampling_of(want["kwargs"]), backend=backend).frames_THWC
        assert frames_THWC.shape[1:3] == (media["height"], media["width"])
        means = frames_THWC.reshape(len(frames_THWC), -1).mean(1)
        np.testing.assert_allclose(means, want["raw_mean_per_frame"], rtol=0, atol=RAW_MEAN_TOLERANCE, err_msg=mode)
        if backend == "decord":
            digests = [hashlib.sha256(frame.tobytes()).hexdigest() for frame in frames_THWC]
            assert digests == want["raw_uint8_sha256_per_frame"], mode


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_pixel_values_of_every_recorded_mode(backend):
    if backend == "decord":
        pytest.importorskip("decord")
    media = load_json("media.json")
    path = find(media["video"])
    recorded = {**load_arrays("media_video.npz"), **load_arrays("media_video_fps.npz")}
    for mode, want in media["modes"].items():
        arrays = {key: array for key, array in recorded.items() if key.startswith(f"{mode}_")}
        crop = Crop(size=want["shape_CTHW"][-1])
        frames_THWC = decode.frames(path, sampling_of(want["kwargs"]), backend=backend, crop=crop).frames_THWC
        pixels = normalize(frames_THWC, **image_statistics(media))
        np.testing.assert_allclose(pixels.mean((1, 2, 3)), want["per_frame_mean"], atol=1e-4, err_msg=mode)
        for key, array in arrays.items():
            if key.endswith("first_frame_float32"):
                np.testing.assert_allclose(pixels[0], array, atol=FLOAT32_TOLERANCE, err_msg=key)
            else:
                stride = int(key.rpartition("stride")[2]) if "stride" in key else 1
                ours = pixels[:, :, ::stride, ::stride]
                np.testing.assert_allclose(ours, array.astype(np.float32), atol=STORED_TOLERANCE, err_msg=key)


def test_pixel_values_of_the_image():
    media = load_json("media.json")
    recorded = load_arrays("media_image.npz")
    video = decode.frames(find(media["image"]["file"]), FrameSampling())
    assert list(video.frames_THWC.shape[2:0:-1]) == media["image"]["size_wh"]
    pixels = normalize(resize_and_crop(video.frames_THWC, image_crop(media)), **image_statistics(media))
    np.testing.assert_allclose(pixels, recorded["clip_pixel_values"].astype(np.float32), atol=STORED_TOLERANCE)


def test_pixel_values_of_the_folder_of_frames():
    media = load_json("media.json")
    folder = media.get("frames_folder")
    recorded = load_arrays("media_image.npz").get("frames_folder_pixel_values_stride4")
    if folder is None or recorded is None:
        pytest.skip("this set records no folder of frames")
    # The original takes the files as the directory lists them, ours by name: the recorded order is followed here.
    indices = np.linspace(0, len(folder["listing"]) - 1, folder["fixed_frame_number"]).astype(int)
    crop = image_crop(media)
    frames = [
        decode.frames(find(folder["listing"][index]), FrameSampling(), crop=crop).frames_THWC[0] for index in indices
    ]
    pixels = normalize(np.stack(frames), **image_statistics(media))
    ours = pixels[:, :, ::4, ::4] if recorded.shape[0] == len(frames) else pixels.transpose(1, 0, 2, 3)[:, :, ::4, ::4]
    np.testing.assert_allclose(ours, recorded.astype(np.float32), atol=STORED_TOLERANCE)


def test_a_folder_of_frames_is_sorted_by_name():
    media = load_json("media.json")
    folder = media.get("frames_folder")
    if folder is None:
        pytest.skip("this set records no folder of frames")
    names = sorted(folder["listing"])
    path = find(names[0]).parent
    video = decode.frames(path, FrameSampling(num_frames=len(names)))
    for frame, name in zip(video.frames_THWC, names, strict=True):
        np.testing.assert_array_equal(frame, decode.frames(path / name, FrameSampling()).frames_THWC[0])
