"""The shelf of opened adapters: bounded, least lately used first, and nobody starves."""

import asyncio

import pytest

from valley_ray.serve.shelf import Shelf


def run(scenario: object) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await scenario()  # type: ignore[operator]

    asyncio.run(limited())


def test_the_least_lately_used_makes_room_and_serve_hears_of_it() -> None:
    told: list[list[str]] = []
    shelf = Shelf(str.upper, 2, told.append)

    async def scenario() -> None:
        for name in ("a", "b", "a", "c", "a"):
            async with shelf.use(name) as value:
                assert value == name.upper()
        assert shelf.names == ["c", "a"]

    run(scenario)
    assert told == [["a"], ["a", "b"], ["a", "c"]]
    assert shelf.num_opened == 3


def test_a_value_in_use_stays_open_and_the_bound_is_kept() -> None:
    shelf = Shelf(str.upper, 1)

    async def scenario() -> None:
        order = []

        async def use(name: str) -> None:
            async with shelf.use(name):
                order.append(name)
                assert shelf.names == [name]
                await asyncio.sleep(0)

        async with shelf.use("a"):
            waiting = asyncio.create_task(use("b"))
            await asyncio.sleep(0.01)
            assert not waiting.done()
            assert shelf.names == ["a"]
            # Whoever comes later for what is open waits behind: "b" would never have its turn otherwise.
            late = asyncio.create_task(use("a"))
            await asyncio.sleep(0.01)
            assert not late.done()
        await asyncio.gather(waiting, late)
        assert order == ["b", "a"]

    run(scenario)


def test_many_callers_at_once_open_a_value_once() -> None:
    shelf = Shelf(str.upper, 3)

    async def scenario() -> None:
        async def use(name: str) -> str:
            async with shelf.use(name) as value:
                await asyncio.sleep(0)
                assert len(shelf.names) <= 3
                return value

        names = ["a", "b", "c"] * 20
        assert await asyncio.gather(*map(use, names)) == [name.upper() for name in names]
        assert shelf.num_opened == 3
        names = ["a", "b", "c", "d", "e"] * 20
        assert await asyncio.gather(*map(use, names)) == [name.upper() for name in names]

    run(scenario)


def test_a_failure_and_a_caller_who_gives_up_leave_the_shelf_usable() -> None:
    def open_value(name: str) -> str:
        if name == "bad":
            raise ValueError("no such thing")
        return name

    shelf = Shelf(open_value, 1)

    async def scenario() -> None:
        with pytest.raises(ValueError, match="no such thing"):
            async with shelf.use("bad"):
                pass
        async with shelf.use("a"):
            gives_up = asyncio.create_task(shelf.use("b").__aenter__())
            await asyncio.sleep(0.01)
            gives_up.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gives_up
            async with shelf.use("a") as value:
                assert value == "a"
        async with shelf.use("b") as value:
            assert value == "b"

    run(scenario)
