"""AnswerWatch: what a decoder says about an answer, and when it says it."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from metric_log import MetricLog

from valley_ray.errors import PromptTooLongError
from valley_ray.serve import answer_watch, metrics
from valley_ray.serve.answer_watch import AnswerWatch


class Clock:
    """A time that tests set."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + 1e9


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(answer_watch, "time", clock)
    return clock


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> MetricLog:
    return MetricLog(monkeypatch)


def answer(clock: Clock, num_tokens: int, *, raises: BaseException | None = None, ends: bool = True) -> Any:
    """Half a second in the queue, 0.25 s for media, 0.5 s to the first token, 0.125 s between tokens."""
    sent_at = clock.time()
    clock.now += 0.5
    with AnswerWatch("tiny", sent_at) as watch:
        clock.now += 0.25
        watch.pulled(0.125, 0.0625)
        watch.pulled(None, 0.1875)
        watch.has_media()
        watch.asks_engine()
        clock.now += 0.375
        for _ in range(num_tokens):
            clock.now += 0.125
            watch.token(20, 5)
        if raises is not None:
            raise raises
        return watch.ends("stop") if ends else None


def test_an_answers_times_and_tokens(clock: Clock, log: MetricLog) -> None:
    timings = answer(clock, 5)
    assert timings == answer_watch.Timings(
        queue=0.5, media=0.25, decode=0.125, encode=0.1875, prefill=0.5, first_token=0.75, answer=0.5, cache="none"
    )
    stages = {"queue": 0.5, "media": 0.25, "prefill": 0.5, "answer": 0.5}
    assert {stage: log.durations(metrics.STAGE_SECONDS, stage=stage) for stage in stages} == {
        stage: [seconds] for stage, seconds in stages.items()
    }
    assert log.durations(metrics.TOKEN_GAP_SECONDS, model="tiny") == [0.125]
    assert log.value(metrics.PROMPT_TOKENS, model="tiny") == 20
    assert log.value(metrics.CACHED_PROMPT_TOKENS, model="tiny") == 5
    assert log.value(metrics.NEW_TOKENS, model="tiny") == 5
    assert log.value(metrics.ANSWERS, model="tiny", ended="stop") == 1


def test_the_cost_of_media_is_that_of_the_dearest(clock: Clock, log: MetricLog) -> None:
    for pulls, cache in (
        ([], "decoder"),
        ([(None, None)], "encoder"),
        ([(None, 0.5), (None, None)], "sampler"),
        ([(None, None), (0.5, 0.5), (None, 0.5)], "none"),
    ):
        with AnswerWatch("tiny", None) as watch:
            for pull in pulls:
                watch.pulled(*pull)
            watch.has_media()
            timings = watch.ends("stop")
        assert timings.cache == cache
        assert timings.queue is None
    with AnswerWatch("tiny", None) as watch:
        assert watch.ends("stop").cache is None, "an answer without media"


def test_readers_that_leave_and_engines_that_break_are_told_apart(clock: Clock, log: MetricLog) -> None:
    answer(clock, 3, ends=False)
    with pytest.raises(GeneratorExit):
        answer(clock, 2, raises=GeneratorExit(), ends=False)
    with pytest.raises(KeyError):
        answer(clock, 1, raises=KeyError("broke"))
    with pytest.raises(PromptTooLongError):
        answer(clock, 0, raises=PromptTooLongError("long"))
    assert log.value(metrics.ANSWERS, model="tiny", ended="abandoned") == 2
    assert log.value(metrics.ANSWERS, model="tiny", ended="failed") == 1
    assert log.total(metrics.ANSWERS) == 3, "a question that is refused is no answer"
    assert log.value(metrics.NEW_TOKENS, model="tiny") == 6


def test_tokens_are_counted_while_a_long_answer_goes_on(clock: Clock, log: MetricLog) -> None:
    def counts() -> Iterator[float]:
        for _ in range(40):
            clock.now += 0.125
            watch.token(20, 0)
            yield log.value(metrics.NEW_TOKENS, model="tiny")

    with AnswerWatch("tiny", None) as watch:
        watch.asks_engine()
        seen = list(counts())
        calls = log.num_calls
    assert seen[-1] == 40
    assert len(set(seen)) == 6, "once a second, not for every token"
    assert calls < 10


def test_a_token_costs_no_more_than_a_few_microseconds() -> None:
    with AnswerWatch("tiny", None) as watch:
        watch.asks_engine()
        watch.token(20, 0)
        began = time.perf_counter()
        for _ in range(10_000):
            watch.token(20, 0)
        each_us = (time.perf_counter() - began) * 1e6 / 10_000
    # Measured: 0.2 microseconds; a call of Ray's metrics takes several.
    assert each_us < 20
