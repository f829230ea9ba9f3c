"""Answers and truths become accuracies per kind of question, and the chance level beside each.

Knows no model and no media. A prediction is right when it equals the truth as a whole, case and outer white space
aside.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Judged:
    """One question, what was answered and what is true."""

    kind: str
    truth: str
    answer: str

    @property
    def is_right(self) -> bool:
        """Whole-answer match."""
        return self.answer.strip().lower() == self.truth.strip().lower()


def accuracy_by_kind(judged: Iterable[Judged]) -> dict[str, float]:
    """Share of right answers per kind, 0..1."""
    right: dict[str, list[bool]] = defaultdict(list)
    for one in judged:
        right[one.kind].append(one.is_right)
    return {kind: sum(marks) / len(marks) for kind, marks in right.items()}


def chance_by_kind(truths: Mapping[str, Sequence[str]], known: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """What somebody reaches who has not seen the videos: always the answer that is most frequent among `known`.

    `truths` and `known` map a kind to its answers, held out and in training; a kind without known answers scores 0.
    """
    chance = {}
    for kind, answers in truths.items():
        favourite = Counter(known.get(kind, ())).most_common(1)
        chance[kind] = sum(answer == favourite[0][0] for answer in answers) / len(answers) if favourite else 0.0
    return chance
