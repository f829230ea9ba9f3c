"""The parts of the report: what facts.py counted and pictures.py drew, as HTML of bounded length."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from valley_ray.data.report import facts, pictures
from valley_ray.data.report import histograms as binning
from valley_ray.data.report.markup import bar, count, counted, cut, duration, name, quantity, shorten, table, text
from valley_ray.data.schema import FAILED, OK
from valley_ray.errors import ValleyError

MAX_SOURCES = 50
MAX_FAILED_CLIPS = 5000
MAX_FAILED_SAMPLES = 1000
MAX_EQUAL_GROUPS = 100
MAX_EQUAL_NAMES = 10
MAX_ROWS = 12
MAX_TURNS = 12
MAX_TURN_CHARACTERS = 600
MAX_PICTURE_BYTES = 1_200_000
MAX_FAILURE_BYTES = 2_200_000
MAX_EQUAL_BYTES = 400_000
"""Together with the bounds above they keep the page below about 5 MB, however long the names."""
Row = tuple[str, ...]
"""Cells of a row as HTML."""
_ROW_MARKUP_BYTES = 60
_OPEN_ROWS = 20
_OPEN_TURNS = 2
"""A list of so many failures, and so many turns of a conversation, are open from the start."""
_SHORT_SIDES = (120.0, 240.0, 360.0, 480.0, 720.0, 1080.0, 1440.0, 2160.0, 4320.0)


def sources(clips: pa.Table, samples: pa.Table, shows: facts.Shows) -> str:
    """Samples and clips by source and status."""
    found, alone = facts.by_source(clips, samples, shows, limit=MAX_SOURCES)
    if not found and not alone.rows_in:
        return "<p>There are no rows.</p>\n"
    of_clips = [(name(one.source), one.clips) for one in found]
    of_clips += [("clips that no sample shows", alone)] if alone.rows_in else []
    note = '<p class="quiet">A clip that two sources show counts for each of them.</p>\n' if len(found) > 1 else ""
    return (
        '<div class="grid wide">'
        + _statuses("samples", [(name(one.source), one.samples) for one in found])
        + _statuses("clips", of_clips)
        + f"</div>\n{note}"
    )


def _statuses(what: str, rows: Sequence[tuple[str, facts.Counts]]) -> str:
    cells = [(f"{label}{_shares(of)}", count(of.rows_in), count(of.ok), count(of.failed)) for label, of in rows]
    head = (f"{what} of", "all", "ok", "failed")
    return table(f"{what} by source and status", head, cells, numbers=(1, 2, 3)) if rows else ""


def _shares(of: facts.Counts) -> str:
    parts = [(kind, getattr(of, kind) / of.rows_in) for kind in ("ok", "failed", "pending") if getattr(of, kind)]
    words = ", ".join(f"{share:.1%} {kind}" for kind, share in parts)
    bars = "".join(bar(share, kind=kind) for kind, share in parts)
    return f'<div class="status" role="img" aria-label="{words}">{bars}</div>' if parts else ""


def histograms(clips: pa.Table, samples: pa.Table) -> str:
    """How long, how large, how fast the clips are, how long the conversations."""
    decoded = clips.filter(pa.array(facts.is_status(clips, OK)))
    turns = pc.list_value_length(samples["conversation"])
    tokenized = pc.greater(pc.fill_null(samples["num_tokens"], 0), 0)
    tokens = samples["num_tokens"].filter(tokenized)
    drawn = [
        _histogram("Duration", "seconds", "clips", facts.numbers_of(clips["duration_s"]), form=duration),
        _resolution(clips),
        _histogram(
            "Frame rate", "frames per second", "clips", np.round(facts.numbers_of(clips["fps"]), 2), single=True
        ),
        _histogram(
            "Frames kept per clip", "frames", "clips", facts.numbers_of(decoded["num_frames"]), whole=True, single=True
        ),
        _histogram("Conversation length", "turns", "samples", facts.numbers_of(turns), whole=True, single=True),
        _histogram("Conversation length in tokens", "tokens", "samples", facts.numbers_of(tokens), whole=True),
    ]
    return f'<div class="grid">{"".join(drawn)}</div>\n'


def _histogram(
    title: str,
    axis: str,
    counted: str,
    values: npt.NDArray[np.float64],
    *,
    whole: bool = False,
    single: bool = False,
    form: Any = quantity,
) -> str:
    known = binning.finite(values)
    note = "" if len(known) == len(values) else f"; {count(len(values) - len(known))} unknown"
    bars = binning.bars(known, whole=whole, single=single, form=quantity)
    return _drawn(title, axis, counted, bars, f"{binning.summary(known, form)}{note}", num_known=len(known))


def _drawn(title: str, axis: str, counted: str, bars: list[binning.Bar], words: str, *, num_known: int) -> str:
    if not bars:
        return f"<div><h3>{title}</h3>\n<p>Not known of any.</p></div>\n"
    most = max(one.count for one in bars)
    rows = [(text(one.label), f"{bar(one.count / most) if one.count else ''}", count(one.count)) for one in bars]
    head = (axis, "", counted)
    listed = table(f"{title}: {counted} by {axis}", head, rows, numbers=(2,), kind="histogram")
    return f'<div><h3>{title}</h3>\n<p class="quiet">{count(num_known)} {counted}: {text(words)}</p>\n{listed}</div>\n'


def _resolution(clips: pa.Table) -> str:
    width, height = facts.numbers_of(clips["width"]), facts.numbers_of(clips["height"])
    short = np.minimum(width, height)
    known = binning.finite(short)
    bars = binning.bars_between(known, list(_SHORT_SIDES), whole=True, form=quantity)
    joined = pc.binary_join_element_wise(
        pc.cast(clips["width"], pa.string()), pc.cast(clips["height"], pa.string()), " x "
    )
    sizes, others = facts.most_frequent(joined.filter(pc.is_valid(joined)), limit=3)
    words = ", ".join(f"{key} ({count(number)})" for key, number in sizes) + (
        f", others ({count(others)})" if others else ""
    )
    if len(known) < len(short):
        words += f"; {count(len(short) - len(known))} unknown"
    return _drawn("Resolution", "short side, pixels", "clips", bars, words, num_known=len(known))


def rows(clips: pa.Table, samples: pa.Table, shows: facts.Shows, shards_dir: Path, *, seed: int) -> str:
    """A few rows with their frames and conversations."""
    drawn = pictures.drawn(clips, samples, shows, shards_dir, num_rows=MAX_ROWS, seed=seed, max_bytes=MAX_PICTURE_BYTES)
    articles = "".join(_article(number, shown) for number, shown in enumerate(drawn, 1))
    if not articles:
        return "<p>No clip has frames to show.</p>\n"
    return f'<p class="quiet">Drawn at random (seed {seed}).</p>\n<div class="rows">{articles}</div>\n'


def _article(number: int, shown: pictures.Shown) -> str:
    heading = f"Sample {name(shown.label)}" if shown.label else f"Clip {number}"
    facts_of = [name(shown.source)] if shown.source else []
    facts_of += [f"{count(shown.num_tokens)} tokens"] if shown.num_tokens else []
    hidden = shown.num_clips - len(shown.strips)
    more = f'<p class="quiet">and {count(hidden)} more clips</p>\n' if hidden else ""
    return (
        f'<article><h3>{heading}</h3>\n<p class="quiet">{", ".join(facts_of)}</p>\n'
        f"{''.join(_figure(strip) for strip in shown.strips)}{more}"
        f"{_turns(shown.turns)}</article>\n"
    )


def _figure(strip: pictures.Strip) -> str:
    shown = len(strip.pictures)
    number = f"{shown} of {count(strip.num_frames)} frames" if shown < strip.num_frames else f"{shown} frames"
    number = "1 frame" if strip.num_frames == 1 else number
    if strip.problem:
        return f"<figure><figcaption>{name(strip.label)}: {text(shorten(strip.problem, 300))}</figcaption></figure>\n"
    file = text(shorten(Path(strip.label).name, 60))
    images = "".join(
        f'<img src="{picture}" alt="Frame {place} of {shown} shown of {file}">'
        for place, picture in enumerate(strip.pictures, 1)
    )
    return (
        f'<figure><div class="frames">{images}</div><figcaption>{name(strip.label)}, {number}</figcaption></figure>\n'
    )


def _turns(turns: Sequence[Mapping[str, Any]]) -> str:
    first, further = turns[:_OPEN_TURNS], turns[_OPEN_TURNS:MAX_TURNS]
    listed = "".join(_turn(turn) for turn in first)
    parts = f'<ol class="turns">{listed}</ol>\n' if first else ""
    if further:
        hidden = len(turns) - MAX_TURNS
        more = f'<p class="quiet">and {count(hidden)} more</p>' if hidden > 0 else ""
        listed = "".join(_turn(turn) for turn in further)
        summary = f"{counted(len(turns) - len(first), 'further turn')}"
        parts += f'<details><summary>{summary}</summary><ol class="turns">{listed}</ol>{more}</details>\n'
    return parts


def _turn(turn: Mapping[str, Any]) -> str:
    said = text(cut(str(turn["content"] or ""), MAX_TURN_CHARACTERS))
    return f'<li><span class="role">{text(shorten(str(turn["role"] or ""), 20))}</span><p dir="auto">{said}</p></li>'


def failures(clips: pa.Table, samples: pa.Table, shows: facts.Shows) -> str:
    """Every failed clip with its reason, by class; then the samples that failed for a reason of their own."""
    clip_failed, sample_failed = facts.is_status(clips, FAILED), facts.is_status(samples, FAILED)
    for_clip = sample_failed & shows.samples_with(clip_failed)
    parts = [f"<h3>Files ({count(int(clip_failed.sum()))})</h3>\n"]
    parts += _classes(clips, clip_failed, MAX_FAILED_CLIPS, "clips/*.parquet", _clip_row, ("file and reason", "tries"))
    if for_clip.any():
        parts.append(f"<p>{counted(int(for_clip.sum()), 'sample')} failed with a clip.</p>\n")
    own = sample_failed & ~for_clip
    if own.any():
        parts.append(f"<h3>Samples with a fault of their own ({count(int(own.sum()))})</h3>\n")
        head = ("sample and reason", "source")
        parts += _classes(samples, own, MAX_FAILED_SAMPLES, "samples/*.parquet", _sample_row, head)
    return "".join(parts)


def _clip_row(row: Mapping[str, Any]) -> tuple[str, str]:
    return f"{name(pictures.label_of(row))}{_reason(row)}", count(row["attempts"] or 0)


def _sample_row(row: Mapping[str, Any]) -> tuple[str, str]:
    return f"{name(row['sample_id'] or '')}{_reason(row)}", name(row["source"] or "")


def _reason(row: Mapping[str, Any]) -> str:
    return f'<p class="reason" dir="auto">{text(shorten(row["error"] or "no reason was given", 400))}</p>'


def _classes(
    failed: pa.Table, among: npt.NDArray[np.bool_], limit: int, where: str, form: Any, head: tuple[str, str]
) -> Iterator[str]:
    groups = facts.failures(failed, among, limit=limit)
    if not groups:
        yield "<p>None.</p>\n"
    columns = [column for column in _FAILURE_COLUMNS if column in failed.column_names]
    left = MAX_FAILURE_BYTES * limit // MAX_FAILED_CLIPS
    meanings = _meanings()
    # The shortest lists are written first, so that bytes run out for the longest only.
    written: dict[int, str] = {}
    for place in sorted(range(len(groups)), key=lambda place: len(groups[place].rows)):
        group = groups[place]
        lines = _within(left, (form(row) for row in facts.rows_of(failed, columns, group.rows)))
        left -= sum(map(_num_bytes, lines))
        hidden = group.num_rows - len(lines)
        more = f"<p>and {count(hidden)} more in <code>{where}</code></p>\n" if hidden else ""
        meaning = f' <span class="quiet">{text(meanings[group.label])}</span>' if group.label in meanings else ""
        is_open = " open" if group.num_rows <= _OPEN_ROWS else ""
        label = shorten(group.label, 60)
        listed = table(f"Failed with {label}", head, lines, numbers=(1,) if head[1] == "tries" else ()) if lines else ""
        written[place] = (
            f'<details class="files"{is_open}><summary><strong>{text(label)}</strong>: '
            f"{count(group.num_rows)}.{meaning}</summary>\n{listed}{more}</details>\n"
        )
    yield from (written[place] for place in range(len(groups)))


_FAILURE_COLUMNS = ("kind", "uri", "start_s", "end_s", "attempts", "sample_id", "source", "error")


def _meanings() -> dict[str, str]:
    """What each error class stands for, by its code."""
    found: dict[str, str] = {}
    classes: list[type[ValleyError]] = [ValleyError]
    for error_class in classes:
        found.setdefault(error_class.code, (error_class.__doc__ or "").partition("\n")[0])
        classes.extend(error_class.__subclasses__())
    return found


def equal_contents(clips: pa.Table) -> str:
    """Groups of clips that hold the same bytes."""
    num_groups, num_repeats, groups = facts.equal_contents(clips, limit=MAX_EQUAL_GROUPS, rows_each=MAX_EQUAL_NAMES)
    num_known = int(pc.sum(pc.not_equal(pc.fill_null(clips["content_digest"], ""), "")).as_py() or 0)
    known = f"Files of equal size were compared: {count(num_known)} of {counted(clips.num_rows, 'clip')}. "
    if not groups:
        return f"<p>{known}No two are equal.</p>\n"
    listed = _within(MAX_EQUAL_BYTES, ((_names(clips, group), count(group.num_rows)) for group in groups))
    hidden = num_groups - len(listed)
    return (
        f"<p>{known}Repetitions of an earlier one: {counted(num_repeats, 'clip')}, in "
        f"{counted(num_groups, 'group')}.</p>\n"
        + table("Clips with equal contents", ("clips", "number"), listed, numbers=(1,))
        + (f"<p>and {count(hidden)} more groups in <code>clips/*.parquet</code></p>\n" if hidden else "")
    )


def _within(max_bytes: int, lines: Iterable[Row]) -> list[Row]:
    """The first lines of a table, as many as fit."""
    taken = []
    for line in lines:
        max_bytes -= _num_bytes(line)
        if max_bytes < 0:
            break
        taken.append(line)
    return taken


def _num_bytes(line: Row) -> int:
    return sum(len(cell.encode(errors="replace")) for cell in line) + _ROW_MARKUP_BYTES


def _names(clips: pa.Table, group: facts.Group) -> str:
    found = facts.rows_of(clips, ("kind", "uri", "start_s", "end_s"), group.rows)
    names = [name(pictures.label_of(row)) for row in found]
    hidden = group.num_rows - len(names)
    more = f"and {count(hidden)} more, " if hidden else ""
    return f'{"".join(names)}<span class="quiet">{more}digest {text(shorten(group.label, 16))}</span>'
