"""Resizing, cropping and normalising."""

import numpy as np
import pytest
from PIL import Image

from valley_ray.media.preprocess import Crop, normalize, resize_and_crop


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (32, 32), (33, 500), (10, 11)])
def test_crop_is_the_centre_of_the_pil_resize(shape):
    frames = np.random.default_rng(0).integers(0, 255, (2, *shape, 3), dtype=np.uint8)
    crop = Crop(size=28, short_side=32)
    cropped = resize_and_crop(frames, crop)
    assert cropped.shape == (2, 28, 28, 3)
    height, width = shape
    scaled = (32, int(32 * height / width)) if width < height else (int(32 * width / height), 32)
    resized = np.asarray(Image.fromarray(frames[1]).resize(scaled, Image.Resampling.BILINEAR))
    top, left = round((resized.shape[0] - 28) / 2), round((resized.shape[1] - 28) / 2)
    np.testing.assert_array_equal(cropped[1], resized[top : top + 28, left : left + 28])


def test_bicubic_differs_from_bilinear():
    frames = np.random.default_rng(0).integers(0, 255, (1, 40, 70, 3), dtype=np.uint8)
    bilinear, bicubic = (
        resize_and_crop(frames, Crop(size=16, short_side=16, resample=name)) for name in ("bilinear", "bicubic")
    )
    assert (bilinear != bicubic).any()


def test_corner_of_an_odd_margin_is_rounded_or_floored():
    frames = np.random.default_rng(0).integers(0, 255, (1, 4, 7, 3), dtype=np.uint8)
    rounded, floored = (
        resize_and_crop(frames, Crop(size=4, short_side=4, corner=name)) for name in ("rounded", "floored")
    )
    np.testing.assert_array_equal(rounded[0], frames[0, :, 2:6])
    np.testing.assert_array_equal(floored[0], frames[0, :, 1:5])


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (32, 32)])
def test_stretch_gives_the_square_whatever_the_shape(shape):
    frames = np.random.default_rng(0).integers(0, 255, (2, *shape, 3), dtype=np.uint8)
    stretched = resize_and_crop(frames, Crop(size=28, resample="bicubic", fit="stretch"))
    want = np.asarray(Image.fromarray(frames[1]).resize((28, 28), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(stretched[1], want)


@pytest.mark.parametrize(
    ("shape", "kept"),
    [((400, 640), (224, 358)), ((640, 400), (358, 224)), ((100, 300), (149, 447)), ((50, 50), (224, 224))],
)
def test_keep_holds_the_short_side_to_the_size_and_the_long_one_to_twice_of_it(shape, kept):
    frames = np.zeros((1, *shape, 3), np.uint8)
    assert resize_and_crop(frames, Crop(size=224, fit="keep")).shape == (1, *kept, 3)


def test_keys_tell_crops_apart_that_give_other_pixels():
    crops = [Crop(), Crop(fit="stretch"), Crop(fit="keep"), Crop(fit="keep", size=112), Crop(resample="bicubic")]
    assert len({crop.key for crop in crops}) == len(crops)
    assert Crop(fit="keep", short_side=300).key == Crop(fit="keep").key
    assert [crop.is_square for crop in crops] == [True, True, False, False, True]


def test_crop_larger_than_the_resize_is_refused():
    with pytest.raises(ValueError, match="short_side must be at least size"):
        Crop(size=224, short_side=200)


def test_normalize_moves_colours_first():
    frames = np.random.default_rng(0).integers(0, 255, (2, 4, 4, 3), dtype=np.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    pixels = normalize(frames, mean=mean, std=std)
    assert pixels.shape == (2, 3, 4, 4)
    assert pixels.dtype == np.float32
    want = (frames / 255.0 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(pixels, want.transpose(0, 3, 1, 2), atol=1e-6)  # float32 against float64
