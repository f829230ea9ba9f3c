import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path

import pytest

from valley_ray.answering import load_model
from valley_ray.engine.engine import Prompt, SamplingParams
from valley_ray.engine.slots import SlotEngine
from valley_ray.errors import PromptTooLongError
from valley_ray.serve.engine_thread import EngineThread

PROMPTS = [Prompt((1, 5, 9)), Prompt((1, 7)), Prompt((1, 4, 6, 8))]


@pytest.fixture(scope="module")
def engine(tiny_valley: Path) -> SlotEngine:
    return SlotEngine(load_model(tiny_valley).core, num_slots=2, max_length=256)


def with_thread(engine: SlotEngine, body: Callable[[EngineThread], Awaitable[None]]) -> None:
    thread = EngineThread(engine)
    try:
        asyncio.run(body(thread))
    finally:
        thread.close()


async def tokens(thread: EngineThread, prompt: Prompt, max_tokens: int = 12) -> list[int]:
    return [event.token_id async for event in thread.generate(prompt, SamplingParams(max_tokens=max_tokens))]


def test_concurrent_callers_get_their_own_tokens(engine: SlotEngine) -> None:
    async def body(thread: EngineThread) -> None:
        alone = [await tokens(thread, prompt) for prompt in PROMPTS]
        together = await asyncio.gather(*(tokens(thread, prompt) for prompt in PROMPTS))
        assert together == alone
        assert len(alone[0]) == 12

    with_thread(engine, body)


def test_a_caller_that_leaves_frees_its_slot(engine: SlotEngine) -> None:
    async def body(thread: EngineThread) -> None:
        async with aclosing(thread.generate(PROMPTS[0], SamplingParams(max_tokens=250))) as events:
            await anext(events)
        async with asyncio.timeout(2):
            while thread.num_unfinished:
                await asyncio.sleep(0.01)
        assert thread.num_abandoned == 1
        await tokens(thread, PROMPTS[1])
        assert thread.num_abandoned == 1, "a request that ended was not abandoned"

    with_thread(engine, body)


def test_the_load_is_told_when_it_changes(engine: SlotEngine) -> None:
    loads: list[tuple[int, int]] = []
    thread = EngineThread(engine, lambda running, waiting: loads.append((running, waiting)))

    async def body() -> None:
        await asyncio.gather(*(tokens(thread, prompt, 200) for prompt in PROMPTS))
        async with aclosing(thread.generate(PROMPTS[0], SamplingParams(max_tokens=250))) as events:
            await anext(events)
        async with asyncio.timeout(2):
            while loads[-1] != (0, 0):
                await asyncio.sleep(0.01)

    try:
        asyncio.run(body())
    finally:
        thread.close()
    assert loads[0] == (0, 0), "said before anybody asks"
    assert (2, 1) in loads, "two slots and three prompts"
    assert max(running for running, _ in loads) == 2
    assert all(one != other for one, other in pairwise(loads)), "not at every step"


def test_a_prompt_too_long_costs_its_caller_only(engine: SlotEngine) -> None:
    async def body(thread: EngineThread) -> None:
        good, bad = await asyncio.gather(
            tokens(thread, PROMPTS[0]), tokens(thread, PROMPTS[1], 1000), return_exceptions=True
        )
        assert isinstance(bad, PromptTooLongError)
        assert len(good) == 12

    with_thread(engine, body)


def test_a_broken_engine_fails_everybody_and_says_so(tiny_valley: Path) -> None:
    engine = SlotEngine(load_model(tiny_valley).core, num_slots=2, max_length=256)

    async def body(thread: EngineThread) -> None:
        del engine._model
        with pytest.raises(AttributeError):
            await tokens(thread, PROMPTS[0])
        assert thread.broken is not None
        with pytest.raises(AttributeError):
            await tokens(thread, PROMPTS[1])

    with_thread(engine, body)


def test_a_request_that_cannot_be_added_leaves_the_thread_alive(engine: SlotEngine) -> None:
    async def body(thread: EngineThread) -> None:
        async with asyncio.timeout(10):
            with pytest.raises(AssertionError, match="at least one token"):
                await tokens(thread, Prompt(()))
            assert len(await tokens(thread, PROMPTS[0])) == 12

    with_thread(engine, body)
