"""Numbers become bars: bins that suit what is there, from one value to long tails. Knows no tables and no HTML."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

MAX_SINGLE = 12
"""Up to so many different values of a discrete quantity get a bar each."""
_STEPS = (1, 2, 5)
_MAX_DECADES = 6
_LONG_TAIL = 8.0
"""Where the largest value is so many times the median, bins grow with the value."""


@dataclass(frozen=True)
class Bar:
    """One bin: its place on the axis in words, how many values fall into it."""

    label: str
    count: int


def bars(values: Values, *, whole: bool = False, single: bool = False, form: Callable[[float], str]) -> list[Bar]:
    """The bins of `values` (float64 [N], finite, not negative) along the axis, empty ones between others included.

    Args:
        whole: the values are whole numbers, so that a bin is named by its first and last.
        single: few different values get a bar each, since what lies between them does not occur (frame rates, turns).
        form: writes a number.
    """
    if not len(values):
        return []
    different = np.unique(values)
    if len(different) == 1 or (single and len(different) <= MAX_SINGLE):
        counts = np.bincount(np.searchsorted(different, values))
        return [Bar(form(value), int(count)) for value, count in zip(different.tolist(), counts, strict=True)]
    return bars_between(values, _edges(values, whole=whole), whole=whole, form=form)


def bars_between(values: Values, edges: list[float], *, whole: bool, form: Callable[[float], str]) -> list[Bar]:
    """The bins between ascending `edges`, without empty ones at the ends; a bin holds its lower edge."""
    places = np.searchsorted(np.asarray(edges), values, side="right")
    counts = np.bincount(places, minlength=len(edges) + 1).tolist()
    filled = [place for place, count in enumerate(counts) if count]
    if not filled:
        return []
    shown = range(filled[0], filled[-1] + 1)
    return [Bar(_label(edges, place, whole=whole, form=form), counts[place]) for place in shown]


def _label(edges: list[float], place: int, *, whole: bool, form: Callable[[float], str]) -> str:
    if place == 0:
        return f"under {form(edges[0])}"
    if place == len(edges):
        return f"{form(edges[-1])} and more"
    low, high = edges[place - 1], edges[place]
    if not whole:
        return f"{form(low)} to {form(high)}"
    return form(low) if high - low <= 1 else f"{form(low)} to {form(high - 1)}"


def _edges(values: Values, *, whole: bool) -> list[float]:
    low, middle, high = float(values.min()), float(np.median(values)), float(values.max())
    if high > _LONG_TAIL * max(middle, 1e-9):
        return _growing_edges(low, high, whole=whole)
    step = _nice_step((high - low) / MAX_SINGLE)
    if whole:
        step = max(1.0, step)
    first, last = floor(low / step), floor(high / step) + 1
    return [index * step for index in range(first, last + 1)]


def _growing_edges(low: float, high: float, *, whole: bool) -> list[float]:
    """1, 2, 5, 10, 20 … from below `low`, six decades at most, to above `high`."""
    top = ceil(log10(high)) if high > 1 else 0
    lowest = max(low, 10.0 ** (top - _MAX_DECADES), 1.0 if whole else 0.0)
    decades = range(floor(log10(lowest)) - 1, top + 1)  # one more than needed: logarithms are rounded
    series = [step * 10.0**decade for decade in decades for step in _STEPS]
    first = max(index for index, edge in enumerate(series) if edge <= lowest)
    last = min(index for index, edge in enumerate(series) if edge > high)
    return series[first : last + 1]


def _nice_step(at_least: float) -> float:
    decade = 10.0 ** floor(log10(at_least))
    return next(step * decade for step in (*_STEPS, 10) if step * decade >= at_least * (1 - 1e-9))


def finite(values: Values) -> Values:
    """Those of `values` that are numbers a bar can stand for."""
    return values[np.isfinite(values) & (values >= 0)]


def summary(values: Values, form: Callable[[float], str]) -> str:
    """Median and range in words; empty where there are no values."""
    if not len(values):
        return ""
    low, middle, high = (float(value) for value in np.quantile(values, (0.0, 0.5, 1.0)))
    assert isfinite(high), "values are finite here"
    return f"all {form(low)}" if low == high else f"median {form(middle)}, from {form(low)} to {form(high)}"
