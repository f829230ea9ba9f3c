"""Pieces of HTML: escaped text, names, tables and bars. What data sets say is hostile: it all passes `text`."""

import html
import re
from collections.abc import Iterable, Sequence

_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")
_MAX_TITLE = 400
_MAX_FOLDER = 32
_MAX_NAME = 60


def text(value: str) -> str:
    """`value` as HTML text or as the value of a quoted attribute."""
    return html.escape(_CONTROLS.sub("\ufffd", value), quote=True)


def shorten(value: str, limit: int) -> str:
    """`value` in at most `limit` characters: the middle goes, since names differ at their ends."""
    if len(value) <= limit:
        return value
    tail = limit * 2 // 3
    return f"{value[: limit - tail - 1]}…{value[-tail:]}"


def cut(value: str, limit: int) -> str:
    """The first `limit` characters of `value`, and how many more there are."""
    return value if len(value) <= limit else f"{value[:limit]}… ({len(value) - limit:,} more characters)"


def name(value: str) -> str:
    """A name in its own direction of writing, the folder quieter than the file; whole as title where shortened."""
    folder, slash, last = value.rpartition("/")
    folder, last = shorten(folder + slash, _MAX_FOLDER), shorten(last, _MAX_NAME)
    title = f' title="{text(shorten(value, _MAX_TITLE))}"' if folder + last != value else ""
    quiet = f'<span class="quiet">{text(folder)}</span>' if folder else ""
    return f'<bdi class="name"{title}>{quiet}{text(last)}</bdi>'


def count(value: int) -> str:
    """12,345"""
    return f"{value:,}"


def counted(value: int, what: str) -> str:
    """1 clip, 12,345 clips"""
    return f"{value:,} {what}" if value == 1 else f"{value:,} {what}s"


def quantity(value: float) -> str:
    """A measured number with as many digits as one reads."""
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.2f}".rstrip("0").rstrip(".") if value >= 0.01 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """90 min 12 s as "1 h 30 min"; below a minute in seconds. A number and its unit stay on one line."""
    if seconds < 60:
        return f"{quantity(seconds)}\u00a0s"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,}\u00a0h {minutes}\u00a0min"
    return f"{minutes}\u00a0min {rest_s}\u00a0s"


def size(num_bytes: int) -> str:
    """Bytes in the unit that fits: 1.5 MB."""
    value, units = float(num_bytes), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    for larger in units:
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:,.0f}\u00a0{unit}" if value >= 100 else f"{value:.3g}\u00a0{unit}"


def table(
    label: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = (), kind: str = ""
) -> str:
    """A table in a box of its own that scrolls where it is wider than the page.

    Args:
        label: what the table is called for those who do not see it.
        head: texts of the header cells; escaped here.
        rows: cells as HTML; the first of a row names it.
        numbers: columns of numbers, set flush right.
        kind: its class in the style sheet.
    """
    classes = [' class="number"' if column in numbers else "" for column in range(len(head))]
    header = "".join(f'<th scope="col"{kind}>{text(cell)}</th>' for cell, kind in zip(head, classes, strict=True))
    body = "".join(f"<tr>{_cells(row, classes)}</tr>\n" for row in rows)
    return (
        f'<div class="scroll {kind}" role="region" aria-label="{text(label)}" tabindex="0"><table>\n'
        f"<thead><tr>{header}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def _cells(row: Sequence[str], classes: Sequence[str]) -> str:
    first, *rest = row
    cells = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(rest, classes[1:], strict=True))
    return f'<th scope="row"{classes[0]}>{first}</th>{cells}'


def bar(share: float, *, kind: str = "plain") -> str:
    """A bar of `share` (0 to 1) of its cell. It repeats a number beside it, so readers of text are spared it."""
    return f'<span class="bar {kind}" style="width:{100 * share:.2f}%" aria-hidden="true"></span>'


def section(anchor: str, heading: str, body: str) -> str:
    """A part of the page under its heading."""
    return (
        f'<section id="{anchor}" aria-labelledby="{anchor}-h"><h2 id="{anchor}-h">{text(heading)}</h2>\n'
        f"{body}</section>\n"
    )
