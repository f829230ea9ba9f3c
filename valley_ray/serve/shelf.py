"""A shelf of a bounded number of things that are opened by name when they are first asked for.

Knows neither Ray nor what is opened.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Shelf(Generic[Value]):
    """At most `max_open` values at once: the least lately used of those that nobody uses makes room for another.

    For one asyncio loop. Where all are in use, who asks for another one waits until one is not, and so does everybody
    who comes later: nobody waits for ever behind callers who take turns.
    """

    def __init__(
        self, open_value: Callable[[str], Value], max_open: int, changed: Callable[[list[str]], None] = lambda _: None
    ) -> None:
        """`open_value` runs in a thread; `changed` hears the names on the shelf whenever they are others."""
        self._open_value, self._max_open, self._changed = open_value, max_open, changed
        self._values: OrderedDict[str, Value] = OrderedDict()
        self._num_users: Counter[str] = Counter()
        self._turn, self._released = asyncio.Lock(), asyncio.Event()
        self._is_waiting_for_room = False
        self.num_opened = 0
        """Values opened since the start."""

    @property
    def names(self) -> list[str]:
        """What is open, the least lately used first."""
        return list(self._values)

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Value]:
        """The value called `name`, which stays open meanwhile; raises what opening it raises."""
        if name not in self._values or self._is_waiting_for_room:
            async with self._turn:
                if name not in self._values:
                    await self._put(name)
                # Still in the turn: nobody may take it away before it is counted.
                self._num_users[name] += 1
        else:
            self._num_users[name] += 1
        self._values.move_to_end(name)
        try:
            yield self._values[name]
        finally:
            self._num_users[name] -= 1
            self._released.set()

    async def _put(self, name: str) -> None:
        self._is_waiting_for_room = True
        try:
            while len(self._values) >= self._max_open:
                await self._drop_one()
        finally:
            self._is_waiting_for_room = False
        try:
            self._values[name] = await asyncio.to_thread(self._open_value, name)
            self.num_opened += 1
        finally:
            self._changed(self.names)

    async def _drop_one(self) -> None:
        idle = next((one for one in self._values if not self._num_users[one]), None)
        if idle is not None:
            del self._values[idle]
            return
        self._released.clear()
        await self._released.wait()
