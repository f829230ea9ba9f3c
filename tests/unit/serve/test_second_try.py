"""What is asked again after a replica ended, and what is refused."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

import pytest

from valley_ray.chat import Conversation, Message
from valley_ray.engine.engine import SamplingParams
from valley_ray.errors import (
    NotMediaError,
    OtherWeightsError,
    OverloadedError,
    ReplicaCrashError,
    ReplicaDiedError,
    ValleyError,
)
from valley_ray.serve.protocol import AnswerDelta, AnswerRequest
from valley_ray.serve.second_try import Asker, Crashes, ask_twice

REQUEST = AnswerRequest(
    "r", Conversation((Message("user", "What is moving?"),)), (), (), SamplingParams(), False, stream=True
)
WORDS = ["a ", "red ", "circle ", "moves."]
Script = Sequence[tuple[int, ValleyError | None]]
"""Per decoder that is asked: how many words it sends, and how it ends."""


class Decoders:
    """Answer by script; a request with words already goes on behind them."""

    def __init__(self, script: Script) -> None:
        self._script = list(script)
        self.asked: list[AnswerRequest] = []

    async def answer(self, request: AnswerRequest) -> AsyncGenerator[AnswerDelta, None]:
        self.asked.append(request)
        num_words, error = self._script.pop(0)
        for place in range(len(request.answered), len(WORDS))[:num_words]:
            reason = "stop" if place == len(WORDS) - 1 else None
            yield AnswerDelta(WORDS[place], 3, place + 1, reason, token_ids=(place,), version="one")
        if error is not None:
            raise error


def read(asker: Asker, request: AnswerRequest = REQUEST) -> str:
    async def texts() -> list[str]:
        return [delta.text async for delta in asker.answer(request)]

    return "".join(asyncio.run(texts()))


DIED = ReplicaDiedError("ended")


def test_an_answer_whose_replica_ended_is_asked_for_again_or_goes_on() -> None:
    for script, answered in (
        ([(0, DIED), (4, None)], [(), ()]),
        ([(2, DIED), (4, None)], [(), (0, 1)]),
        # A replica that sent something is not held against the request.
        ([(0, DIED), (1, DIED), (1, DIED), (4, None)], [(), (), (0,), (0, 1)]),
        # Behind the last word nothing is missing.
        ([(4, DIED)], [()]),
    ):
        decoders = Decoders(script)
        assert read(Asker(decoders.answer)) == "".join(WORDS)
        assert [one.answered for one in decoders.asked] == answered
        assert {one.answered_with for one in decoders.asked if one.answered} <= {"one"}


def test_what_ended_two_replicas_is_refused_and_remembered() -> None:
    decoders = Decoders([(0, DIED), (0, DIED), (4, None)])
    asker = Asker(decoders.answer)
    with pytest.raises(ReplicaCrashError, match="two replicas") as caught:
        read(asker)
    assert (caught.value.code, caught.value.http_status) == ("replica_crashed", 503)
    with pytest.raises(ReplicaCrashError):
        read(asker, replace(REQUEST, request_id="another", params=SamplingParams(seed=1)))
    assert len(decoders.asked) == 2
    assert read(asker, replace(REQUEST, conversation=Conversation((Message("user", "Else?"),)))) == "".join(WORDS)


def test_what_ends_its_replica_takes_nobody_along_twice() -> None:
    ended = asyncio.Event()

    async def answer(request: AnswerRequest) -> AsyncGenerator[AnswerDelta, None]:
        """One replica at a time: it ends under everybody as soon as the bad request has been with it for a moment."""
        nonlocal ended
        replica = ended
        for place in range(len(request.answered), len(WORDS)):
            try:
                async with asyncio.timeout(0.005 if request.request_id == "bad" else 0.02):
                    await replica.wait()
                raise DIED
            except TimeoutError:
                pass
            if request.request_id == "bad":
                replica.set()
                ended = asyncio.Event()
                raise DIED
            reason = "stop" if place == len(WORDS) - 1 else None
            yield AnswerDelta(WORDS[place], 3, place + 1, reason, token_ids=(place,), version="one")

    async def body() -> list[str | BaseException]:
        asker = Asker(answer)

        async def text(name: str) -> str:
            asked = replace(REQUEST, request_id=name, conversation=Conversation((Message("user", name),)))
            return "".join([delta.text async for delta in asker.answer(asked)])

        names = ["a", "b", "c", "bad", "d", "e"]
        return await asyncio.gather(*map(text, names), return_exceptions=True)

    results = asyncio.run(body())
    assert isinstance(results.pop(3), ReplicaCrashError)
    assert results == ["".join(WORDS)] * 5


def test_replicas_that_end_again_and_again_are_too_many_at_last() -> None:
    decoders = Decoders([(1, DIED), (1, DIED), (1, DIED), (0, DIED), (4, None)])
    with pytest.raises(ReplicaCrashError):
        read(Asker(decoders.answer))
    assert len(decoders.asked) == 4


def test_a_redeploy_is_waited_for_unless_the_answer_has_begun() -> None:
    changing = OtherWeightsError("changing")
    assert read(Asker(Decoders([(0, changing), (0, changing), (4, None)]).answer)) == "".join(WORDS)
    with pytest.raises(OtherWeightsError):
        read(Asker(Decoders([(1, DIED), (0, changing), (4, None)]).answer))
    with pytest.raises(OtherWeightsError):
        read(Asker(Decoders([(0, changing)] * 9).answer, most_waited_s=0.5))


def test_a_full_server_says_so_at_once_but_not_to_an_answer_that_was_taken() -> None:
    full = OverloadedError("full")
    decoders = Decoders([(0, full), (4, None)])
    with pytest.raises(OverloadedError):
        read(Asker(decoders.answer))
    assert len(decoders.asked) == 1
    assert read(Asker(Decoders([(2, DIED), (0, full), (4, None)]).answer)) == "".join(WORDS)


def test_other_errors_are_not_asked_about_again() -> None:
    decoders = Decoders([(0, NotMediaError("x.mp4")), (4, None)])
    with pytest.raises(NotMediaError):
        read(Asker(decoders.answer))
    assert len(decoders.asked) == 1


def test_a_call_is_made_twice_and_its_content_is_forgiven_after_a_while() -> None:
    clock = [0.0]
    crashes, num_asked = Crashes(lambda: clock[0]), 0

    async def ask() -> str:
        nonlocal num_asked
        num_asked += 1
        if num_asked in (1, 3, 4):
            raise DIED
        return "frames"

    async def body() -> None:
        assert await ask_twice(crashes, "video", ask) == "frames"
        with pytest.raises(ReplicaCrashError):
            await ask_twice(crashes, "video", ask)
        with pytest.raises(ReplicaCrashError):
            await ask_twice(crashes, "video", ask)
        assert num_asked == 4
        assert await ask_twice(crashes, "other", ask) == "frames"
        clock[0] = 61.0
        assert await ask_twice(crashes, "video", ask) == "frames"

    asyncio.run(body())


def test_second_calls_are_made_one_at_a_time() -> None:
    num_running = 0

    async def ask(is_second: list[bool]) -> int:
        nonlocal num_running
        if not is_second:
            is_second.append(True)
            raise DIED
        num_running += 1
        beside = num_running
        await asyncio.sleep(0.005)
        num_running -= 1
        return beside

    async def body() -> list[int]:
        crashes, calls = Crashes(), [list[bool]() for _ in range(4)]
        return await asyncio.gather(
            *(ask_twice(crashes, str(i), lambda one=one: ask(one)) for i, one in enumerate(calls))
        )

    assert asyncio.run(body()) == [1, 1, 1, 1]
