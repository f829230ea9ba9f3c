"""The report of a data set: two tables and the shards behind them → one HTML file that needs nothing else to be read.

No script, no network, no more than about 5 MB whatever the data set: lists end with the number of those that follow.
"""

import datetime
import importlib.metadata
import importlib.resources
import os
import platform
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from valley_ray import __version__
from valley_ray.data.report import facts, sections
from valley_ray.data.report.markup import count, counted, duration, section, shorten, size, table, text

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Should a text of the data set ever pass as markup, the browser still runs and loads nothing of it."""
_PACKAGES = ("av", "decord", "numpy", "pyarrow", "ray")


def write_report(
    clips: pa.Table,
    samples: pa.Table,
    shards_dir: Path,
    output: Path,
    *,
    title: str,
    made_with: Mapping[str, str] | None = None,
    seed: int = 0,
) -> None:
    """Write the report of a data set to `output`, whose folder is made.

    Args:
        clips: CLIPS_SCHEMA; what came of every clip.
        samples: SAMPLES_SCHEMA; may be empty, then the clips speak for themselves.
        shards_dir: where the shards lie that `clips` name. Frames that cannot be read are said to be so.
        made_with: what else the data set was made with (decoder, model, …), name by value.
        seed: draws the rows whose frames are shown.
    """
    shows = facts.Shows(clips, samples)
    page = document(
        title,
        {
            "In short": _totals(clips, samples),
            "Sources": sections.sources(clips, samples, shows),
            "What is in it": sections.histograms(clips, samples),
            "Rows to look at": sections.rows(clips, samples, shows, shards_dir, seed=seed),
            "What failed": sections.failures(clips, samples, shows),
            "Equal contents": sections.equal_contents(clips),
            "Made with": _made_with(clips, made_with or {}),
        },
    )
    write_document(page, output)


def write_document(page: str, output: Path) -> None:
    """Write a page to `output`, whose folder is made; whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.write_text(page, encoding="utf-8", errors="replace")
    os.replace(temporary, output)


def document(title: str, parts: Mapping[str, str], *, style: str = "") -> str:
    """A page that needs nothing else to be read: its parts (HTML, by heading) under the house's style.

    Args:
        style: rules after those of report.css.
    """
    own = importlib.resources.files("valley_ray.data.report").joinpath("report.css").read_text(encoding="utf-8")
    anchors = {part: part.lower().replace(" ", "-") for part in parts}
    items = "".join(f'<li><a href="#{anchor}">{part}</a></li>' for part, anchor in anchors.items())
    body = "".join(section(anchors[part], part, content) for part, content in parts.items())
    heading = text(shorten(title, 120))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{heading}</title>
<style>
{own}{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header><h1 dir="auto">{heading}</h1>
<nav aria-label="Parts of the report"><ul>{items}</ul></nav></header>
<main id="main">
{body}</main>
</body>
</html>
"""


def _totals(clips: pa.Table, samples: pa.Table) -> str:
    of_clips, of_samples = facts.counts(clips), facts.counts(samples)
    seconds = _total(clips.filter(pa.array(facts.is_status(clips, "ok")))["duration_s"])
    tiles = [
        ("clips in", count(of_clips.rows_in), ""),
        ("clips ok", count(of_clips.ok), ""),
        ("clips failed", count(of_clips.failed), "failed" if of_clips.failed else ""),
        ("samples in", count(of_samples.rows_in), ""),
        ("samples ok", count(of_samples.ok), ""),
        ("samples failed", count(of_samples.failed), "failed" if of_samples.failed else ""),
        ("frames kept", count(int(_total(clips["num_frames"]))), ""),
        ("of video that decodes", duration(seconds), ""),
        ("of files", size(int(_total(clips["size_bytes"]))), ""),
    ]
    rows = "".join(f'<div class="{kind}"><dt>{label}</dt><dd>{value}</dd></div>' for label, value, kind in tiles)
    return f'<dl class="tiles">{rows}</dl>\n{_balance(of_clips, "clips")}{_balance(of_samples, "samples")}'


def _balance(counts: facts.Counts, what: str) -> str:
    if counts.pending:
        unfinished = f"{count(counts.pending)} of {count(counts.rows_in)} {what} are pending: the work has not ended."
        return f"<p><strong>{unfinished}</strong></p>\n"
    return (
        f'<p class="quiet">{what.capitalize()}: {count(counts.rows_in)} in = {count(counts.ok)} ok + '
        f"{count(counts.failed)} failed.</p>\n"
    )


def _total(column: Any) -> float:
    values = facts.numbers_of(column)
    return float(np.nansum(values[np.isfinite(values)]))


def _made_with(clips: pa.Table, made_with: Mapping[str, str]) -> str:
    samplings, others = facts.most_frequent(clips["sampling"].filter(pc.is_valid(clips["sampling"])), limit=5)
    rows = [("date", f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC")]
    rows += [(shorten(key, 80), shorten(value, 400)) for key, value in made_with.items()]
    rows += [
        ("sampling", f"{shorten(key or 'not yet sampled', 300)} ({counted(number, 'clip')})")
        for key, number in samplings
    ]
    rows += [("sampling", f"others ({counted(others, 'clip')})")] if others else []
    rows += [("valley_ray", __version__), ("Python", platform.python_version())]
    rows += [(package, version) for package in _PACKAGES if (version := _version(package))]
    return table("What the data set was made with", ("what", "value"), [(text(a), text(b)) for a, b in rows])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
