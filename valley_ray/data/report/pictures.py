"""A few rows to look at: drawn from a seed, their frames as small pictures that the page carries in itself."""

import base64
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from valley_ray.data.frame_store import FrameStore
from valley_ray.data.report import facts
from valley_ray.data.schema import FAILED, OK, uris_of
from valley_ray.errors import DataError

MAX_FRAMES = 8
MAX_CLIPS = 4
"""Frames of a clip and clips of a row that are shown."""
_SIDE = 144
"""Longest side of a picture, pixels; shown at most so wide."""
_QUALITY = 55
_COLUMNS = ("kind", "uri", "start_s", "end_s", "shard", "row", "num_frames")


@dataclass(frozen=True)
class Strip:
    """Frames of one clip."""

    label: str
    num_frames: int
    pictures: tuple[str, ...]
    """data: URIs of WebP pictures; none where the frames could not be read."""
    problem: str
    """Why there are none."""


@dataclass(frozen=True)
class Shown:
    """One row of the samples table to look at, or one clip that no sample shows."""

    label: str
    source: str
    strips: tuple[Strip, ...]
    num_clips: int
    turns: tuple[Mapping[str, Any], ...]
    num_tokens: int | None


def drawn(
    clips: pa.Table,
    samples: pa.Table,
    shows: facts.Shows,
    shards_dir: Path,
    *,
    num_rows: int,
    seed: int,
    max_bytes: int,
) -> Iterator[Shown]:
    """Rows with decoded frames, drawn from `seed` evenly over the sources; then clips that no sample shows, a third.

    Args:
        max_bytes: pictures end where they take more.
    """
    generator = np.random.default_rng(seed)
    store = FrameStore(shards_dir)
    is_ok = facts.is_status(clips, OK)
    has_clip = shows.samples_with(is_ok)
    good = has_clip & ~shows.samples_with(~is_ok) & ~facts.is_status(samples, FAILED)
    alone = is_ok.copy()
    alone[shows.clip] = False
    alone_rows = generator.permutation(np.flatnonzero(alone))
    chosen = _spread(samples["source"], good, num_rows - min(len(alone_rows), num_rows // 3), generator)
    num_bytes = 0
    for row in chosen:
        if num_bytes < max_bytes:
            shown = _sample(clips, samples, shows, row, store)
            yield shown
            num_bytes += _num_bytes(shown)
    for row in alone_rows[: num_rows - len(chosen)].tolist():
        if num_bytes < max_bytes:
            shown = Shown("", "", (_strip(facts.rows_of(clips, _COLUMNS, np.array([row]))[0], store),), 1, (), None)
            yield shown
            num_bytes += _num_bytes(shown)


def label_of(clip: Mapping[str, Any]) -> str:
    """What a clip is called: its file, further files of a group counted, its window in seconds."""
    try:
        first, *others = uris_of(clip["kind"], clip["uri"] or "")
    except ValueError:  # a group that is no list, or an empty one
        first, others = clip["uri"] or "", []
    more = f" and {len(others)} more" if others else ""
    start_s, end_s = clip["start_s"], clip["end_s"]
    if start_s is None and end_s is None:
        return f"{first}{more}"
    return f"{first}{more} [{start_s or 0:g} s to {'the end' if end_s is None else f'{end_s:g} s'}]"


def _spread(source: Any, good: npt.NDArray[np.bool_], num_rows: int, generator: np.random.Generator) -> list[int]:
    """Rows among the good ones, a row of each source in turn, so that a small source is seen beside a large one."""
    rows = generator.permutation(np.flatnonzero(good))
    codes = facts.coded(source)[0][rows]
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    turn = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    chosen: list[int] = rows[order[np.lexsort((ordered, turn))[:num_rows]]].tolist()
    return chosen


def _sample(clips: pa.Table, samples: pa.Table, shows: facts.Shows, row: int, store: FrameStore) -> Shown:
    places = shows.clip[np.searchsorted(shows.sample, row) : np.searchsorted(shows.sample, row, side="right")]
    strips = [_strip(clip, store) for clip in facts.rows_of(clips, _COLUMNS, places[:MAX_CLIPS])]
    return Shown(
        label=samples["sample_id"][row].as_py() or "",
        source=samples["source"][row].as_py() or "",
        strips=tuple(strips),
        num_clips=len(places),
        turns=tuple(samples["conversation"][row].as_py() or ()),
        num_tokens=samples["num_tokens"][row].as_py(),
    )


def _strip(clip: Mapping[str, Any], store: FrameStore) -> Strip:
    return strip(label_of(clip), clip["shard"], clip["row"], store, num_frames=clip["num_frames"] or 0)


def strip(
    label: str, shard: str, row: int, store: FrameStore, *, num_frames: int = 0, max_frames: int = MAX_FRAMES
) -> Strip:
    """Up to `max_frames` frames of the clip in a row of a shard; `num_frames` is told where they cannot be read."""
    try:
        frames_THWC = store.frames(shard, row)
        pictures = tuple(_pictures(frames_THWC, max_frames))
    except (DataError, IndexError, ValueError, OSError) as error:
        # The report tells of a store that was moved or damaged; it must not fail with it.
        return Strip(label, num_frames, (), f"{type(error).__name__}: {error}")
    return Strip(label, len(frames_THWC), pictures, "")


def _pictures(frames_THWC: npt.NDArray[np.uint8], max_frames: int) -> Iterator[str]:
    for index in np.linspace(0, len(frames_THWC) - 1, min(len(frames_THWC), max_frames)).astype(int).tolist():
        picture = Image.fromarray(frames_THWC[index])
        picture.thumbnail((_SIDE, _SIDE))
        encoded = io.BytesIO()
        picture.save(encoded, "WEBP", quality=_QUALITY)
        yield "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")


def _num_bytes(shown: Shown) -> int:
    return sum(len(picture) for strip in shown.strips for picture in strip.pictures)
