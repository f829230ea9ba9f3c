"""Answers and references → numbers for each row, and for all of them together. Knows no model of answers and no media.

    exact_match      equal as a whole, case and outer white space aside
    qa_accuracy      equal as open-ended QA counts it: words alone, articles left out, yes and no by the first word
                     (MSVD-QA, MSRVTT-QA, ActivityNet-QA; texts.is_same_answer)
    bleu             of all answers together, where a reference has four words; in a row: of the sentence (sacrebleu)
    rouge_1, _2, _l  F1 of shared words, pairs and the longest common subsequence
    bertscore        F1 of an encoder's token vectors, as they come (not rescaled), bertscore.py
    judge_score      0..5, judge_accuracy: share of answers that a language model calls right, judge.py
All are 0..1 but judge_score, and larger is better. A number of a whole is the mean over its rows that are ok and have a
reference; those that failed are counted beside it (`answered` is the share of the others), never left out in silence.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from valley_ray.data.schema import OK
from valley_ray.evaluate.config import MetricName
from valley_ray.evaluate.overlap import BLEU_ORDER, corpus_bleu, rouge, sentence_bleu
from valley_ray.evaluate.texts import is_same, is_same_answer, words

Row = Mapping[str, Any]
"""One row of the answers; what is measured needs `status`, `reference` and `prediction`."""

COLUMNS = (
    "exact_match",
    "qa_accuracy",
    "bleu",
    "rouge_1",
    "rouge_2",
    "rouge_l",
    "bertscore",
    "judge_score",
    "judge_accuracy",
)
"""Numbers of a row, null where they were not asked for or could not be computed."""

_OF_ROW: Mapping[MetricName, Callable[[str, str], dict[str, float]]] = {
    "exact_match": lambda prediction, reference: {"exact_match": float(is_same(prediction, reference))},
    "qa_accuracy": lambda prediction, reference: {"qa_accuracy": float(is_same_answer(prediction, reference))},
    "bleu": lambda prediction, reference: {"bleu": sentence_bleu(prediction, reference)},
    "rouge": rouge,
}


def is_measured(row: Row) -> bool:
    """Whether there is an answer and something to hold it against."""
    return row["status"] == OK and row["reference"] is not None


def row_metrics(row: Row, names: Iterable[MetricName]) -> dict[str, float | None]:
    """COLUMNS of one row, as far as its texts alone tell them."""
    found: dict[str, float | None] = dict.fromkeys(COLUMNS)
    if is_measured(row):
        for name in names:
            found |= _OF_ROW[name](row["prediction"], row["reference"])
    return found


def summarize(rows: Sequence[Row]) -> dict[str, float]:
    """The numbers of rows that carry COLUMNS, together: those that any of the rows has, and `answered`."""
    measured = [row for row in rows if is_measured(row)]
    found = {"answered": sum(row["status"] == OK for row in rows) / len(rows)} if rows else {}
    for name in COLUMNS:
        values = [row[name] for row in measured if row[name] is not None]
        if values:
            found[name] = sum(values) / len(values)
    if "bleu" in found:
        del found["bleu"]
        if any(len(words(row["reference"])) >= BLEU_ORDER for row in measured):
            found["bleu"] = corpus_bleu([row["prediction"] for row in measured], [row["reference"] for row in measured])
    return found


def summarize_by(rows: Sequence[Row], column: str) -> dict[str, dict[str, float]]:
    """`summarize` of the rows of each value of a column, and their number as `rows`; the most rows first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[column] or "", []).append(row)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return {name: {"rows": float(len(group)), **summarize(group)} for name, group in ordered}
