"""Predictions → one HTML page that needs nothing else to be read: numbers, answers with their frames, what failed.

Laid out and escaped by the parts of data/report. No script, no network, about 2 MB at most.
"""

import importlib.resources
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from valley_ray.data.frame_store import FrameStore
from valley_ray.data.report import document, write_document
from valley_ray.data.report.markup import count, cut, name, quantity, shorten, table, text
from valley_ray.data.report.pictures import Strip, strip
from valley_ray.evaluate.metrics import COLUMNS, is_measured

MAX_ROWS = 80
MAX_PICTURE_BYTES = 1_200_000
MAX_FAILED = 500
MAX_GROUPS = 50
MAX_CHARACTERS = 800
MAX_FRAMES = 4
MAX_CLIPS = 3
LABELS = {
    "answered": "answered",
    "exact_match": "exact match",
    "qa_accuracy": "QA accuracy",
    "bleu": "BLEU",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "bertscore": "BERTScore",
    "judge_score": "judge, 0 to 5",
    "judge_accuracy": "judge says right",
}
"""How people call the numbers."""
_RIGHT_BY = ("qa_accuracy", "exact_match", "judge_accuracy")

Row = Mapping[str, Any]


def write_page(
    rows: Sequence[Row], summary: Mapping[str, Any], shards_dir: Path, output: Path, *, title: str, seed: int
) -> None:
    """Write the page to `output`.

    Args:
        rows: PREDICTIONS_SCHEMA.
        summary: what metrics.json holds.
        shards_dir: where the frames lie; those that cannot be read are said to be so.
        seed: draws the answers that are shown.
    """
    parts = {"In short": _totals(summary)}
    groups = [(what, of) for what, of in (("source", "by_source"), ("kind", "by_kind")) if len(summary[of]) > 1]
    if groups:
        parts["In parts"] = "".join(_groups(what, summary[of]) for what, of in groups)
    parts["Answers"] = _answers(rows, FrameStore(shards_dir), seed=seed)
    parts["What failed"] = _failed(rows)
    style = importlib.resources.files("valley_ray.evaluate").joinpath("page.css").read_text(encoding="utf-8")
    write_document(document(title, parts, style=style), output)


def _totals(summary: Mapping[str, Any]) -> str:
    numbers = summary["metrics"]
    tiles = [("questions", count(summary["rows_in"]), ""), ("answered", count(summary["ok"]), "")]
    tiles.append(("failed", count(summary["failed"]), "failed" if summary["failed"] else ""))
    tiles += [(LABELS[key], _number(key, numbers[key]), "") for key in COLUMNS if key in numbers]
    listed = "".join(f'<div class="{kind}"><dt>{label}</dt><dd>{value}</dd></div>' for label, value, kind in tiles)
    notes = ["Numbers are over the questions that were answered and have a reference."]
    if summary["without_reference"]:
        notes.append(f"{count(summary['without_reference'])} have none.")
    if summary["without_verdict"]:
        notes.append(f"{count(summary['without_verdict'])} answers have no verdict of the judge.")
    return f'<dl class="tiles">{listed}</dl>\n<p class="quiet">{" ".join(notes)}</p>\n'


def _groups(what: str, groups: Mapping[str, Mapping[str, float]]) -> str:
    shown = dict(list(groups.items())[:MAX_GROUPS])
    names = [key for key in ("answered", *COLUMNS) if any(key in values for values in shown.values())]
    cells = [
        (
            name(group) if group else '<span class="quiet">not said</span>',
            count(int(values["rows"])),
            *(_number(key, values[key]) if key in values else "" for key in names),
        )
        for group, values in shown.items()
    ]
    heads = {"source": "source", "kind": "kind of question"}
    hidden = len(groups) - len(shown)
    more = f"<p>and {count(hidden)} more in <code>metrics.json</code></p>\n" if hidden else ""
    head = (heads[what], "questions", *(LABELS[key] for key in names))
    return table(f"Numbers by {heads[what]}", head, cells, numbers=range(1, len(head))) + more


def _answers(rows: Sequence[Row], store: FrameStore, *, seed: int) -> str:
    answered = [place for place, row in enumerate(rows) if row["status"] == "ok"]
    chosen, words = _drawn(rows, answered, seed)
    lines, num_bytes = [], 0
    for row in (rows[place] for place in chosen):
        if num_bytes > MAX_PICTURE_BYTES:
            break
        strips = [
            strip(row["sample_id"], clip["shard"], clip["row"], store, max_frames=MAX_FRAMES)
            for clip in row["clips"][:MAX_CLIPS]
        ]
        num_bytes += sum(len(picture) for one in strips for picture in one.pictures)
        lines.append((_shown(row, strips), _said(row), _numbers(row)))
    note = f"{count(len(lines))} of {count(len(answered))} answers, drawn at random (seed {seed}){words}."
    head = ("clip", "question and answers", "numbers")
    return f'<p class="quiet">{note}</p>\n' + table("Answers", head, lines, kind="answers")


def _drawn(rows: Sequence[Row], places: Sequence[int], seed: int) -> tuple[list[int], str]:
    """Places of rows to look at: as many wrong ones as right ones where it is known, the wrong ones first."""
    order = np.random.default_rng(seed).permutation(places).tolist()
    by = next((key for key in _RIGHT_BY if any(row["status"] == "ok" and row[key] is not None for row in rows)), None)
    if by is None:
        return order[:MAX_ROWS], ""
    rights = [bool(row[by]) for row in rows]
    wrong = [place for place in order if not rights[place]]
    right = [place for place in order if rights[place]]
    num_wrong = min(len(wrong), max(MAX_ROWS // 2, MAX_ROWS - len(right)))
    return [*wrong[:num_wrong], *right[: MAX_ROWS - num_wrong]], ", those that differ from the reference first"


def _shown(row: Row, strips: Sequence[Strip]) -> str:
    images = [
        f'<img src="{picture}" alt="Frame {place} of {len(one.pictures)} shown">'
        for one in strips
        for place, picture in enumerate(one.pictures, 1)
    ]
    problems = [f'<p class="reason">{text(shorten(one.problem, 200))}</p>' for one in strips if one.problem]
    hidden = len(row["clips"]) - len(strips)
    more = f'<p class="quiet">and {count(hidden)} more clips</p>' if hidden > 0 else ""
    frames = f'<div class="frames">{"".join(images)}</div>' if images else ""
    return f"{frames}{''.join(problems)}{more}{name(row['sample_id'])}"


def _said(row: Row) -> str:
    parts = [("Question", row["question"]), ("Reference", row["reference"]), ("Answer", row["prediction"])]
    listed = "".join(
        f'<dt>{label}</dt><dd dir="auto">{text(cut(value, MAX_CHARACTERS)) or _EMPTY}</dd>'
        for label, value in parts
        if value is not None
    )
    return f'<dl class="said">{listed}</dl>'


_EMPTY = '<span class="quiet">(empty)</span>'


def _numbers(row: Row) -> str:
    if not is_measured(row):
        return '<span class="quiet">no reference</span>'
    by = next((key for key in _RIGHT_BY if row[key] is not None), None)
    mark = ""
    if by is not None:
        kind, word = ("ok", "equal") if row[by] else ("failed", "differs")
        mark = f'<p class="mark {kind}">{word}</p>'
    shown = [key for key in COLUMNS if row[key] is not None and key not in ("exact_match", "qa_accuracy")]
    listed = "".join(f"<li>{LABELS[key]} {_number(key, row[key])}</li>" for key in shown)
    error = f'<p class="reason">judge: {text(shorten(row["judge_error"], 200))}</p>' if row["judge_error"] else ""
    return f'{mark}<ul class="numbers">{listed}</ul>{error}'


def _failed(rows: Sequence[Row]) -> str:
    failed = [(str(row["error_class"]), place) for place, row in enumerate(rows) if row["status"] != "ok"]
    if not failed:
        return "<p>None.</p>\n"
    listed = [rows[place] for _, place in sorted(failed)[:MAX_FAILED]]
    hidden = len(failed) - len(listed)
    more = f"<p>and {count(hidden)} more in <code>predictions.parquet</code></p>\n" if hidden else ""
    return table("Questions without an answer", ("question and reason", "class"), _failed_lines(listed)) + more


def _failed_lines(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    for row in rows:
        reason = f'<p class="reason" dir="auto">{text(shorten(row["error"] or "no reason was given", 400))}</p>'
        yield f"{name(row['sample_id'])}{reason}", text(shorten(row["error_class"] or "", 60))


def _number(key: str, value: float) -> str:
    return quantity(value) if key == "judge_score" else f"{value:.1%}"
