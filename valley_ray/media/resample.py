"""The part of a resized picture that a crop keeps, computed without the rest. H height, W width, C = 3 colours (RGB).

Equal, bit by bit, to resizing the whole picture with PIL's bilinear filter and cropping: PIL resamples columns, rounds
to bytes, then resamples rows, and so does this, on as few of them as it can.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

_COEFFICIENT_BITS = 22
"""PIL rounds its filter coefficients to this many bits (Pillow, src/libImaging/Resample.c, PRECISION_BITS)."""


def resized_part(
    frame_HWC: npt.NDArray[np.uint8], size_wh: tuple[int, int], part: tuple[int, int, int, int]
) -> npt.NDArray[np.uint8]:
    """`part` (left, top, right, bottom) of the frame resized to `size_wh`: uint8 [bottom - top, right - left, 3]."""
    from PIL import Image

    height, width = frame_HWC.shape[:2]
    left, top, right, bottom = part
    across = _span(width, size_wh[0], left, right)
    first_row, last_row = _seen(height, size_wh[1], top, bottom)
    needed_HWC = frame_HWC[first_row:last_row, across.start : across.stop]
    image = Image.fromarray(np.ascontiguousarray(needed_HWC))
    bilinear, box = Image.Resampling.BILINEAR, (across.box[0], 0, across.box[1], image.height)
    columns = image.resize((across.num_out, image.height), bilinear, box=box)
    # Black rows stand in for those that no row of the part sees, so that every row keeps its place.
    shift = left - across.first_out
    columns = columns.crop((shift, -first_row, shift + right - left, height - first_row))
    rows = columns.resize((right - left, size_wh[1]), bilinear)
    return np.asarray(rows.crop((0, top, right - left, bottom)))


@dataclass(frozen=True)
class _Span:
    """Input pixels `start` to `stop` of one axis, of which `box` (counted from `start`) becomes `num_out` pixels."""

    start: int
    stop: int
    box: tuple[int, int]
    first_out: int
    """Place of the first of the `num_out` pixels among those of the whole picture."""
    num_out: int


@lru_cache(maxsize=1024)
def _span(num_in: int, num_out: int, first: int, last: int) -> _Span:
    """What output pixels [first, last) need of an axis of `num_in` pixels that becomes `num_out` long.

    The filter's phase comes back every `period_out` output pixels, which are a whole number of input pixels: boxes of
    whole periods have the coefficients of the whole picture. Other boxes do not: PIL takes them as 32-bit floats.
    """
    divisor = math.gcd(num_in, num_out)
    period_in, period_out = num_in // divisor, num_out // divisor
    first_period, last_period = first // period_out, -(-last // period_out)
    box_start, box_stop = first_period * period_in, last_period * period_in
    margin = math.ceil(max(num_in / num_out, 1.0)) + 1
    start, stop = max(0, box_start - margin), min(num_in, box_stop + margin)
    if (start, stop) == (0, num_in) or not _rounds_alike(num_in, num_out, first, last):
        return _Span(0, num_in, (0, num_in), 0, num_out)
    num_pixels = (last_period - first_period) * period_out
    return _Span(start, stop, (box_start - start, box_stop - start), first_period * period_out, num_pixels)


def _seen(num_in: int, num_out: int, first: int, last: int) -> tuple[int, int]:
    """Half-open range of the input pixels that output pixels [first, last) are computed from, and a few around it."""
    scale = num_in / num_out
    margin = max(scale, 1.0) + 1
    return max(0, math.floor(first * scale - margin)), min(num_in, math.ceil(last * scale + margin))


def _rounds_alike(num_in: int, num_out: int, first: int, last: int) -> bool:
    """Whether coefficients round to the same integers however 64-bit floats lose their last bits.

    A box shifts the coordinates that they are computed from by whole pixels, which may change the last bits.
    """
    scale = num_in / num_out
    support = max(scale, 1.0)
    centers = (np.arange(first, last) + 0.5) * scale
    pixels = np.floor(centers - support)[:, None] + np.arange(math.ceil(2 * support) + 2)
    weights = np.clip(1 - np.abs(pixels + 0.5 - centers[:, None]) / support, 0, None)
    weights[(pixels < 0) | (pixels >= num_in)] = 0
    coefficients = weights / weights.sum(axis=1, keepdims=True) * 2**_COEFFICIENT_BITS
    distance = np.abs(coefficients - np.floor(coefficients) - 0.5)
    tolerance = 8 * np.spacing(float(num_in)) / support * 2**_COEFFICIENT_BITS
    return bool(distance.min() > tolerance)
