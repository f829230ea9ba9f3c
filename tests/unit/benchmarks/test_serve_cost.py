"""The comparison of servers in small: equal work is compared, and a server that fails says why."""

from pathlib import Path
from threading import Barrier

import pytest

from valley_ray.benchmarks.serve.asking import Answered, Ask, ask_at_once
from valley_ray.benchmarks.serve.child import Child
from valley_ray.benchmarks.serve.model import questions
from valley_ray.benchmarks.serve.rounds import Side, compare
from valley_ray.errors import UnavailableError


class IdleChild(Child):
    """A server that takes no CPU time."""

    def __init__(self) -> None:
        pass

    def cpu_s(self) -> float:
        return 0.0


def side(name: str, wrong: int = 0) -> Side:
    """Answers with the question, but `wrong` of all questions with another text."""

    def answer(ask: Ask) -> Answered:
        return Answered("other" if int(ask.question) < wrong else ask.question, 0.1, 0.2)

    return Side(name, IdleChild(), answer)


def rounds(count: int) -> list[list[Ask]]:
    return [[Ask(Path("a.mp4"), str(number), 4) for number in range(count)]]


def test_sides_that_answer_differently_are_not_compared() -> None:
    assert compare("case", (side("ours"), side("worker", wrong=1)), rounds(16), print).ratio > 0
    with pytest.raises(AssertionError, match="2 of 16 answers differ"):
        compare("case", (side("ours"), side("worker", wrong=2)), rounds(16), print)


def test_questions_come_at_once_and_answers_in_their_order() -> None:
    everybody = Barrier(8)

    def answer(ask: Ask) -> Answered:
        everybody.wait(timeout=60)
        return Answered(ask.question, 0.0, 0.0)

    _, answers = ask_at_once(rounds(8)[0], answer)
    assert [one.text for one in answers] == [str(number) for number in range(8)]
    texts = questions(100, seed=1)
    assert len(set(texts)) == 100
    assert {len(text.split()) for text in texts} == {16}


def test_a_server_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    child = Child("json.tool", "/nowhere", log=tmp_path / "log", num_threads=1)
    with pytest.raises(UnavailableError, match=r"json\.tool ended: .*/nowhere"), child:
        pass
