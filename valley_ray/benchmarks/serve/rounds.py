"""Two servers asked the same questions in turns: tokens per second, CPU time, time to the first text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from valley_ray.benchmarks.job import Say
from valley_ray.benchmarks.serve.asking import Answered, Ask, ask_at_once
from valley_ray.benchmarks.serve.child import Child

MOST_UNEQUAL = 1 / 16
"""Of the answers: where two tokens are as likely within rounding, the sides may go on with another one."""


@dataclass(frozen=True)
class Side:
    """A server under test."""

    name: str
    child: Child
    answer: Callable[[Ask], Answered]


@dataclass(frozen=True)
class Measured:
    """One side's round."""

    tokens_per_s: float
    cpu_ms_per_token: float
    """Of all of the side's processes."""
    first_ms: float
    """Until the first text, median over the clients."""
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Compared:
    """All rounds of one case."""

    ratio: float
    """Tokens per second of the first side over those of the second, median over the rounds."""
    medians: dict[str, dict[str, float]]
    """Side → what was measured."""


def compare(case: str, sides: tuple[Side, Side], rounds: Sequence[Sequence[Ask]], say: Say) -> Compared:
    """Every round's questions go to both sides, all at once; who begins changes from round to round.

    Raises AssertionError where more than a few answers differ: then the sides do not do the same work.
    """
    measured: list[dict[str, Measured]] = []
    for number, asks in enumerate(rounds):
        turns = sides if number % 2 else sides[::-1]
        measured.append({side.name: _measure(side, asks) for side in turns})
        rates = ", ".join(f"{side.name} {measured[-1][side.name].tokens_per_s:.0f}" for side in sides)
        say(f"{case}, round {number + 1}, tokens/s: {rates}")
    _check_equal(case, sides, measured)
    first, second = (side.name for side in sides)
    return Compared(
        round(median(one[first].tokens_per_s / one[second].tokens_per_s for one in measured), 2),
        {side.name: _medians([one[side.name] for one in measured]) for side in sides},
    )


def _measure(side: Side, asks: Sequence[Ask]) -> Measured:
    cpu_s = side.child.cpu_s()
    wall_s, answers = ask_at_once(asks, side.answer)
    cpu_s = side.child.cpu_s() - cpu_s
    num_tokens = sum(ask.num_tokens for ask in asks)
    return Measured(
        num_tokens / wall_s,
        1000 * cpu_s / num_tokens,
        1000 * median(one.first_s for one in answers),
        tuple(one.text for one in answers),
    )


def _medians(rounds: Sequence[Measured]) -> dict[str, float]:
    return {
        name: round(median(getattr(one, name) for one in rounds), 2)
        for name in ("tokens_per_s", "cpu_ms_per_token", "first_ms")
    }


def _check_equal(case: str, sides: tuple[Side, Side], rounds: Sequence[Mapping[str, Measured]]) -> None:
    first, second = ([text for one in rounds for text in one[side.name].texts] for side in sides)
    unequal = [pair for pair in zip(first, second, strict=True) if pair[0] != pair[1]]
    assert len(unequal) <= MOST_UNEQUAL * len(first), (
        f"{case}: {len(unequal)} of {len(first)} answers differ, for example {unequal[0]}"
    )
