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

from collections.abc import Callable, Iterable, Mapping
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


class _Sums:
    """Rows that carry COLUMNS, added up one by one; of their texts, those that BLEU is told of are kept."""

    def __init__(self) -> None:
        self.num_rows = self.num_ok = 0
        self._sums = dict.fromkeys(COLUMNS, 0.0)
        self._counts = dict.fromkeys(COLUMNS, 0)
        self._texts: tuple[list[str], list[str]] = ([], [])
        self._has_long_reference = False

    def add(self, row: Row) -> None:
        self.num_rows += 1
        self.num_ok += row["status"] == OK
        if not is_measured(row):
            return
        for name in COLUMNS:
            if row[name] is not None:
                self._sums[name] += row[name]
                self._counts[name] += 1
        if row["bleu"] is not None:
            self._texts[0].append(row["prediction"])
            self._texts[1].append(row["reference"])
            self._has_long_reference |= len(words(row["reference"])) >= BLEU_ORDER

    def numbers(self) -> dict[str, float]:
        if not self.num_rows:
            return {}
        means = {name: self._sums[name] / count for name, count in self._counts.items() if count and name != "bleu"}
        found = {"answered": self.num_ok / self.num_rows} | means
        if self._has_long_reference:
            found["bleu"] = corpus_bleu(*self._texts)
        return found


def summarize(rows: Iterable[Row]) -> dict[str, float]:
    """The numbers of rows that carry COLUMNS, together: those that any of the rows has, and `answered`."""
    sums = _Sums()
    for row in rows:
        sums.add(row)
    return sums.numbers()


def summarize_by(rows: Iterable[Row], column: str) -> dict[str, dict[str, float]]:
    """`summarize` of the rows of each value of a column, and their number as `rows`; the most rows first."""
    groups: dict[str, _Sums] = {}
    for row in rows:
        groups.setdefault(row[column] or "", _Sums()).add(row)
    ordered = sorted(groups.items(), key=lambda item: -item[1].num_rows)
    return {name: {"rows": float(sums.num_rows), **sums.numbers()} for name, sums in ordered}
