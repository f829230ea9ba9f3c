"""Metrics against values worked out by hand, and inputs with nothing in them."""

import math
from typing import Any

import pytest

from valley_ray.evaluate.metrics import COLUMNS, row_metrics, summarize, summarize_by
from valley_ray.evaluate.overlap import corpus_bleu, rouge, sentence_bleu
from valley_ray.evaluate.texts import is_same, is_same_answer, words

ALL = ("exact_match", "qa_accuracy", "bleu", "rouge")


def row(prediction: str | None, reference: str | None, **changes: Any) -> dict[str, Any]:
    given = {"prediction": prediction, "reference": reference, "status": "ok", "kind": "k", "source": "s"} | changes
    return given | row_metrics(given, ALL)


def test_rouge_counts_shared_words_pairs_and_the_longest_common_subsequence() -> None:
    # 6 words each. Shared words 6; pairs "the cat", "cat sat", "on the", "the mat" of 5; subsequence "the cat sat".
    assert rouge("on the mat the cat sat", "the cat sat on the mat") == {"rouge_1": 1.0, "rouge_2": 0.8, "rouge_l": 0.5}
    # Words: 3 shared of 3 and 4. Pairs: 1 of 2 and 3. Subsequence: 2 of 3 and 4.
    assert rouge("moves red circle", "a red circle moves") == pytest.approx(
        {"rouge_1": 6 / 7, "rouge_2": 2 / 5, "rouge_l": 4 / 7}
    )
    assert rouge("the the the", "the")["rouge_1"] == 0.5, "a word counts as often as the other text has it"


@pytest.mark.parametrize(("prediction", "reference"), [("", "a b"), ("a b", ""), ("", ""), ("?!", "..."), ("x", "y")])
def test_texts_that_share_nothing_score_zero_and_break_nothing(prediction: str, reference: str) -> None:
    assert set(rouge(prediction, reference).values()) == {0.0}
    assert sentence_bleu(prediction, reference) == 0.0
    assert corpus_bleu([prediction], [reference]) == 0.0


def test_bleu_is_the_papers_with_exponential_smoothing() -> None:
    # n-grams shared: 5 of 6, 3 of 5, 1 of 4, 0 of 3; the first count of zero becomes 1/2.
    by_hand = (5 / 6 * 3 / 5 * 1 / 4 * (1 / 2) / 3) ** 0.25
    assert sentence_bleu("the cat is on the mat", "the cat sat on the mat") == pytest.approx(by_hand)
    # All n-grams are shared; the answer is shorter than the reference.
    assert sentence_bleu("a b c d e", "a b c d e f") == pytest.approx(math.exp(1 - 6 / 5))
    # Of all answers together: 8 of 9 words, 6 of 7 pairs, 4 of 5, 2 of 3. No mean of the two sentences.
    whole = corpus_bleu(["a b c d e", "f g h x"], ["a b c d e", "f g h i"])
    assert whole == pytest.approx((8 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** 0.25)
    assert sentence_bleu("a cat", "a cat") == 1.0, "a sentence of two words is held to pairs"
    assert corpus_bleu(["the cat sat on the mat"], ["the cat sat on the mat"]) == 1.0


def test_chinese_is_compared_letter_by_letter() -> None:
    assert words("一只猫, on 2 mats。") == ["一", "只", "猫", "on", "2", "mats"]
    assert rouge("一只狗坐着", "一只猫坐着") == {"rouge_1": 0.8, "rouge_2": 0.5, "rouge_l": 0.8}
    assert sentence_bleu("一只狗坐着", "一只猫坐着") == pytest.approx(
        (4 / 5 * 2 / 4 * (1 / 2) / 3 * (1 / 4) / 2) ** 0.25
    )
    assert corpus_bleu(["一只猫坐着"], ["一只猫坐着"]) == 1.0
    assert is_same_answer("是一只猫。", "是 一只猫")


def test_an_exact_match_takes_no_other_words() -> None:
    assert is_same(" Red\n", "red")
    assert not is_same("red.", "red")
    assert not is_same("a red one", "red")
    assert is_same("", "")


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The dog.", "dog", True),
        ("dogs", "dog", False),
        ("Yes, he does.", "yes", True),
        ("no", "yes", False),
        ("He says yes", "yes", False),
        ("not at all", "no", False),
        ("A", "a", True),
        ("", "dog", False),
        ("", "", True),
        ("dog", "", False),
        ("living-room", "living room", True),
        ("don't", "do not", False),
    ],
)
def test_open_ended_answers_are_equal_up_to_articles_and_punctuation(
    prediction: str, reference: str, expected: bool
) -> None:
    assert is_same_answer(prediction, reference) is expected


def test_a_whole_is_the_mean_over_answered_rows_with_a_reference_and_says_how_many_answered() -> None:
    rows = [
        row("red", "red"),
        row("blue", "red"),
        row("anything", None),
        row(None, "red", status="failed"),
    ]
    assert summarize(rows) == {
        "answered": 0.75,
        "exact_match": 0.5,
        "qa_accuracy": 0.5,
        "rouge_1": 0.5,
        "rouge_2": 0.0,
        "rouge_l": 0.5,
    }, "BLEU is not told where no reference has four words"
    assert all(rows[place][name] is None for place in (2, 3) for name in COLUMNS)
    assert summarize([]) == {}


def test_only_what_was_asked_for_is_computed() -> None:
    found = row_metrics({"prediction": "a", "reference": "a", "status": "ok"}, ["rouge"])
    assert {name for name, value in found.items() if value is not None} == {"rouge_1", "rouge_2", "rouge_l"}


def test_parts_come_by_size() -> None:
    rows = [row("a", "a", kind="few"), *[row("a", "b", kind="many")] * 2, row("a", "a", kind=None)]
    found = summarize_by(rows, "kind")
    assert [(name, values["rows"], values["exact_match"]) for name, values in found.items()] == [
        ("many", 2, 0.0),
        ("few", 1, 1.0),
        ("", 1, 1.0),
    ]
