"""The part of a resized picture equals, bit by bit, the cut of the whole."""

import numpy as np
import pytest
from PIL import Image

from valley_ray.media import resample
from valley_ray.media.resample import resized_part

SIZES_WH = [
    (320, 240),
    (426, 240),
    (568, 320),
    (640, 360),
    (360, 640),
    (720, 480),
    (854, 480),
    (1280, 720),
    (1920, 1080),
    (1080, 1920),
    (256, 256),
    (50, 50),
    (1008, 256),
    (17, 900),
]


def whole_and_part(size_wh, short=256, side=224):
    """The picture resized by PIL and cut, and the same by `resized_part`; `side` from the middle."""
    width, height = size_wh
    picture = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    resized_wh = (max(short, short * width // min(size_wh)), max(short, short * height // min(size_wh)))
    left, top = round((resized_wh[0] - side) / 2), round((resized_wh[1] - side) / 2)
    part = (left, top, left + side, top + side)
    whole = Image.fromarray(picture).resize(resized_wh, Image.Resampling.BILINEAR).crop(part)
    return np.asarray(whole), resized_part(picture, resized_wh, part)


@pytest.mark.parametrize("size_wh", SIZES_WH)
def test_part_of_a_usual_size_equals_the_cut_of_the_whole(size_wh):
    whole, part = whole_and_part(size_wh)
    np.testing.assert_array_equal(part, whole)


def test_part_of_any_size_equals_the_cut_of_the_whole():
    random = np.random.default_rng(0)
    for _ in range(60):
        size_wh = tuple(random.integers(8, 400, 2).tolist())
        short = int(random.integers(8, 120))
        whole, part = whole_and_part(size_wh, short, int(random.integers(1, short + 1)))
        np.testing.assert_array_equal(part, whole, err_msg=f"{size_wh=} {short=}")


def test_columns_that_are_cut_off_are_not_computed():
    span = resample._span(1920, 455, 116, 340)
    assert span.num_out == 273
    assert span.stop - span.start < 1200


def test_whole_width_is_taken_where_rounding_might_differ(monkeypatch):
    monkeypatch.setattr(resample, "_rounds_alike", lambda *_: False)
    resample._span.cache_clear()
    try:
        assert resample._span(1920, 455, 116, 340).num_out == 455
        whole, part = whole_and_part((640, 360))
        np.testing.assert_array_equal(part, whole)
    finally:
        resample._span.cache_clear()


def test_coefficient_on_the_edge_of_rounding_is_noticed():
    # A picture doubled in size has the weights 1/4 and 3/4; in bits of 1/2 the first lies half way between two of them.
    assert resample._rounds_alike(64, 128, 10, 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resample, "_COEFFICIENT_BITS", 1)
        assert not resample._rounds_alike(64, 128, 10, 20)
