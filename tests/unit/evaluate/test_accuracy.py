"""Accuracy and chance per kind of question."""

from valley_ray.evaluate.accuracy import Judged, accuracy_by_kind, chance_by_kind


def test_only_whole_answers_count() -> None:
    judged = [
        Judged("color", "red", "Red "),
        Judged("color", "red", "red ring"),
        Judged("color", "red", ""),
        Judged("shape", "bar", "bar"),
    ]
    assert accuracy_by_kind(judged) == {"color": 1 / 3, "shape": 1.0}


def test_chance_answers_with_what_was_most_frequent_in_training() -> None:
    truths = {"color": ["red", "blue", "blue", "green"], "count": ["two"]}
    known = {"color": ["blue", "blue", "red"], "shape": ["bar"]}
    assert chance_by_kind(truths, known) == {"color": 0.5, "count": 0.0}
