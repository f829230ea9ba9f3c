"""What the tables of clips and samples say, counted column by column: no row becomes a Python object unless it is
shown, so that 700,000 rows cost what their columns do. Knows no HTML.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from valley_ray.data.schema import FAILED, OK, PENDING

_STATUSES = (OK, FAILED, PENDING)
Rows = npt.NDArray[np.int64]
"""Row numbers of a table."""


@dataclass(frozen=True)
class Counts:
    """Rows by status."""

    ok: int
    failed: int
    pending: int

    @property
    def rows_in(self) -> int:
        """All of them."""
        return self.ok + self.failed + self.pending


@dataclass(frozen=True)
class SourceCounts:
    """Samples of one source, and the clips that they show; a clip of two sources counts for each."""

    source: str
    samples: Counts
    clips: Counts


@dataclass(frozen=True)
class Group:
    """Rows that have something in common: how many there are, and the first of them."""

    label: str
    num_rows: int
    rows: Rows


class Shows:
    """Which clips the samples show: `sample` and `clip` are row numbers, int64 [M], one pair for each place."""

    def __init__(self, clips: pa.Table, samples: pa.Table) -> None:
        lengths = pc.fill_null(pc.list_value_length(samples["clip_ids"]), 0).to_numpy()
        flat = pc.list_flatten(samples["clip_ids"])
        found = pc.fill_null(pc.index_in(flat, value_set=clips["clip_id"]), -1).to_numpy().astype(np.int64)
        sample = np.repeat(np.arange(samples.num_rows, dtype=np.int64), lengths)
        self.sample: Rows = sample[found >= 0]
        self.clip: Rows = found[found >= 0]
        self.num_samples = samples.num_rows

    def samples_with(self, of_clips: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """bool [samples]: shows at least one of the clips that are marked (bool [clips])."""
        numbers = np.bincount(self.sample[of_clips[self.clip]], minlength=self.num_samples)
        return numbers.astype(np.bool_)


def status_codes(table: pa.Table) -> npt.NDArray[np.int64]:
    """int64 [rows]: 0 ok, 1 failed, 2 pending."""
    codes = pc.fill_null(pc.index_in(table["status"], value_set=pa.array(_STATUSES)), _STATUSES.index(PENDING))
    return np.asarray(codes.to_numpy(), np.int64)


def is_status(table: pa.Table, status: str) -> npt.NDArray[np.bool_]:
    """bool [rows]"""
    return np.asarray(status_codes(table) == _STATUSES.index(status), np.bool_)


def counts(table: pa.Table) -> Counts:
    """Rows of a table by status."""
    return _counts(np.bincount(status_codes(table), minlength=3))


def by_source(clips: pa.Table, samples: pa.Table, shows: Shows, *, limit: int) -> tuple[list[SourceCounts], Counts]:
    """The `limit` sources of most samples (further ones as one), and the clips that no sample shows."""
    codes, names = coded(samples["source"])
    of_samples = np.bincount(codes * 3 + status_codes(samples), minlength=3 * len(names)).reshape(-1, 3)
    pairs = np.unique(codes[shows.sample] * max(1, clips.num_rows) + shows.clip)
    sources, rows = np.divmod(pairs, max(1, clips.num_rows))
    clip_status = status_codes(clips)
    of_clips = np.bincount(sources * 3 + clip_status[rows], minlength=3 * len(names)).reshape(-1, 3)
    order = np.argsort(-of_samples.sum(axis=1), kind="stable")
    top, rest = order[:limit], order[limit:]
    found = [
        SourceCounts(names[code].as_py() or "(no source)", _counts(of_samples[code]), _counts(of_clips[code]))
        for code in top.tolist()
    ]
    if len(rest):
        further = f"({len(rest):,} further sources)"
        found.append(SourceCounts(further, _counts(of_samples[rest].sum(axis=0)), _counts(of_clips[rest].sum(axis=0))))
    is_shown = np.zeros(clips.num_rows, bool)
    is_shown[shows.clip] = True
    return found, _counts(np.bincount(clip_status[~is_shown], minlength=3))


def failures(table: pa.Table, among: npt.NDArray[np.bool_], *, limit: int) -> list[Group]:
    """The marked rows by error class, most frequent class first, with `limit` rows at most in all.

    Rare classes come in whole before frequent ones take the rest: one common fault must not hide the others.
    """
    rows = np.flatnonzero(among)
    codes, names = coded(table["error_class"].filter(pa.array(among)))
    numbers = np.bincount(codes, minlength=len(names))
    order = np.argsort(-numbers, kind="stable")
    shares = _shares(numbers[order].tolist(), limit)
    return [
        Group(names[code].as_py() or "(no class)", int(numbers[code]), rows[places])
        for code, places in zip(order.tolist(), _first_places(codes, order, shares), strict=True)
    ]


def equal_contents(clips: pa.Table, *, limit: int, rows_each: int) -> tuple[int, int, list[Group]]:
    """Clips whose files hold the same bytes, read in the same window.

    Returns:
        the number of groups, the number of rows that repeat an earlier one, and the `limit` largest groups.
    """
    digests = pc.fill_null(clips["content_digest"], "")
    has_digest = pc.not_equal(digests, "")
    rows = np.flatnonzero(has_digest.to_numpy())
    window = (pc.fill_null(pc.cast(clips[edge], pa.string()), "") for edge in ("start_s", "end_s"))
    codes, keys = coded(pc.binary_join_element_wise(digests, *window, " ").filter(has_digest))
    numbers = np.bincount(codes, minlength=len(keys))
    repeated = np.flatnonzero(numbers > 1)
    largest = repeated[np.argsort(-numbers[repeated], kind="stable")][:limit]
    shown = _first_places(codes, largest, np.minimum(numbers[largest], rows_each).tolist())
    groups = [
        Group(keys[code].as_py().split()[0], int(numbers[code]), rows[places])
        for code, places in zip(largest.tolist(), shown, strict=True)
    ]
    return len(repeated), int((numbers[repeated] - 1).sum()), groups


def most_frequent(column: Any, *, limit: int) -> tuple[list[tuple[str, int]], int]:
    """The `limit` most frequent values of a text column with their counts, and how many rows have others."""
    codes, names = coded(column)
    numbers = np.bincount(codes, minlength=len(names))
    top = np.argsort(-numbers, kind="stable")[:limit].tolist()
    return [(names[code].as_py(), int(numbers[code])) for code in top], int(numbers.sum() - numbers[top].sum())


def numbers_of(column: Any) -> npt.NDArray[np.float64]:
    """float64 [N]: a numeric column, null as NaN."""
    values = pc.fill_null(pc.cast(column, pa.float64()), float("nan"))
    return np.asarray(values.to_numpy(), np.float64)


def rows_of(table: pa.Table, columns: Sequence[str], rows: Rows) -> list[Mapping[str, Any]]:
    """The few rows that are shown, as Python objects."""
    found: list[Mapping[str, Any]] = table.select(list(columns)).take(pa.array(rows, pa.int64())).to_pylist()
    return found


def _counts(numbers: npt.NDArray[np.int64]) -> Counts:
    ok, failed, pending = numbers.tolist()
    return Counts(ok, failed, pending)


def coded(column: Any) -> tuple[Rows, Any]:
    """A text column as a code for each row and the texts of the codes (an Arrow array); null counts as empty."""
    filled = pc.fill_null(column, "")
    names = pc.unique(filled)
    return np.asarray(pc.index_in(filled, value_set=names).to_numpy(), np.int64), names


def _first_places(codes: Rows, of: Rows, numbers: Sequence[int]) -> list[Rows]:
    """For each code in `of` the first `numbers` places that hold it, in order; one sort for all of them."""
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], of).tolist()
    return [order[start : start + number] for start, number in zip(starts, numbers, strict=True)]


def _shares(numbers: Sequence[int], limit: int) -> list[int]:
    shares, left = [0] * len(numbers), limit
    by_size = sorted(range(len(numbers)), key=lambda index: numbers[index])
    for place, index in enumerate(by_size):
        shares[index] = min(numbers[index], left // (len(by_size) - place))
        left -= shares[index]
    return shares
