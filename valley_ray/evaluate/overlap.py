"""How many words two texts share: ROUGE (Lin 2004) and BLEU (Papineni et al. 2002, as sacrebleu computes it).

ROUGE is written here because the `rouge-score` package knows the letters a to z alone, so that every Chinese answer
scores 0 there; on English texts the numbers are its own (without stemming).
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from valley_ray.evaluate.texts import has_chinese, words

if TYPE_CHECKING:
    from sacrebleu.metrics import BLEU


BLEU_ORDER = 4
"""Longest n-grams of BLEU."""


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """F1 of shared words (`rouge_1`), pairs of words (`rouge_2`) and the longest common subsequence (`rouge_l`), 0..1.

    0 where one of the texts has none of them.
    """
    ours, theirs = words(prediction), words(reference)
    return {
        "rouge_1": _shared(ours, theirs, 1),
        "rouge_2": _shared(ours, theirs, 2),
        "rouge_l": _f1(_longest_common(ours, theirs), len(ours), len(theirs)),
    }


def sentence_bleu(prediction: str, reference: str) -> float:
    """BLEU of one answer, 0..1: n-grams up to 4 or as many words as it has, exponential smoothing (sacrebleu)."""
    scorer = _bleu(has_chinese(reference), of_sentences=True)
    return _share(scorer.sentence_score(prediction, [reference]).score)


def corpus_bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of all answers together, 0..1; no mean of sentences. 0 where nothing is long enough to hold four words.

    Words are sacrebleu's 13a ones, or its Chinese ones (letter by letter) where a reference has a Chinese character.
    """
    scorer = _bleu(any(map(has_chinese, references)), of_sentences=False)
    return _share(scorer.corpus_score(list(predictions), [list(references)]).score)


@cache
def _bleu(is_chinese: bool, *, of_sentences: bool) -> "BLEU":
    from sacrebleu.metrics import BLEU

    return BLEU(max_ngram_order=BLEU_ORDER, tokenize="zh" if is_chinese else "13a", effective_order=of_sentences)


def _share(percent: float) -> float:
    """Sums of logarithms come out a little above 100."""
    return min(1.0, percent / 100)


def _shared(ours: Sequence[str], theirs: Sequence[str], order: int) -> float:
    grams = [Counter(zip(*(text[shift:] for shift in range(order)), strict=False)) for text in (ours, theirs)]
    return _f1((grams[0] & grams[1]).total(), grams[0].total(), grams[1].total())


def _f1(num_shared: int, num_ours: int, num_theirs: int) -> float:
    return 2 * num_shared / (num_ours + num_theirs) if num_shared else 0.0


def _longest_common(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Length of the longest common subsequence; time is the product of the lengths, memory one of them."""
    row = [0] * (len(theirs) + 1)
    for word in ours:
        diagonal = 0
        for place, other in enumerate(theirs, start=1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]
