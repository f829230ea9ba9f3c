"""What is asked again after a replica ended in mid-work, and what is not: calls between deployments and whole answers.

A request that ends its replica (a bug, too little memory) ends the next one too, and with it what runs beside it: after
two of them it is refused, and so is its content for a while. Knows no Ray: what is asked is handed in.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from valley_ray.errors import OtherWeightsError, OverloadedError, ReplicaCrashError, ReplicaDiedError
from valley_ray.serve.protocol import AnswerDelta, AnswerRequest

Value = TypeVar("Value")

_REMEMBERED_S = 60.0
"""How long content that ended two replicas is refused at once."""
_MOST_REMEMBERED = 1000
_MOST_ENDED = 4
"""Replicas that may end under one answer, although it went on in between."""
_PAUSE_S = 0.25
_PATIENCE_S = 5.0
"""How long whoever was on a replica that ended waits for others who were, seconds."""
_MOST_WAITED_S = 120.0
"""How long an answer that was accepted waits for a place elsewhere, or for a redeploy to get further, seconds."""


class Crashes:
    """Content that ended two replicas lately, by its key; one per caller, nothing is shared."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._suspects = now, asyncio.Lock()
        self._until: OrderedDict[str, float] = OrderedDict()

    def check(self, key: str) -> None:
        """Raise ReplicaCrashError where the content is refused for now."""
        if self._until.get(key, 0.0) > self._now():
            raise _crash()

    def add(self, key: str) -> ReplicaCrashError:
        """Refuse the content from now on, and return what to raise."""
        self._until[key] = self._now() + _REMEMBERED_S
        self._until.move_to_end(key)
        if len(self._until) > _MOST_REMEMBERED:
            self._until.popitem(last=False)
        return _crash()

    @asynccontextmanager
    async def turn(self, *, is_suspect: bool) -> AsyncIterator[ExitStack]:
        """A block for one more try. Until the stack is closed no other suspect has one: what ended a replica must not
        end the next with everybody who was beside it."""
        with ExitStack() as alone:
            if is_suspect:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_PATIENCE_S):
                        await self._suspects.acquire()
                    alone.callback(self._suspects.release)
            yield alone


async def ask_twice(crashes: Crashes, key: str, ask: Callable[[], Awaitable[Value]]) -> Value:
    """What `ask` gives, asked again where a replica ended over it; raises ReplicaCrashError where both did."""
    crashes.check(key)
    try:
        return await ask()
    except ReplicaDiedError:
        pass
    async with crashes.turn(is_suspect=True):
        try:
            return await ask()
        except ReplicaDiedError:
            raise crashes.add(key) from None


class Asker:
    """Asks decoders until an answer is whole: one whose replica ends begins anew on another, or goes on behind what was
    sent already.

    Args:
        ask: deltas of one answer by some decoder.
        most_waited_s: see `_MOST_WAITED_S`.
    """

    def __init__(
        self,
        ask: Callable[[AnswerRequest], AsyncGenerator[AnswerDelta, None]],
        *,
        most_waited_s: float = _MOST_WAITED_S,
    ) -> None:
        self._ask, self._most_waited_s = ask, most_waited_s
        self._crashes = Crashes()

    async def answer(self, request: AnswerRequest) -> AsyncGenerator[AnswerDelta, None]:
        """Deltas of one answer, each once.

        Raises what the decoders raise; ReplicaCrashError where two of them ended over it without a token in between.
        """
        key = content_key(request)
        self._crashes.check(key)
        troubles, is_whole = _Troubles(self._most_waited_s), False
        while True:
            try:
                turn = self._crashes.turn(is_suspect=troubles.num_in_vain > 0)
                async with turn as alone, aclosing(self._ask(request)) as deltas:
                    async for delta in deltas:
                        alone.close()
                        request, is_whole = _behind(request, delta), delta.finish_reason is not None
                        troubles.num_in_vain = 0
                        yield delta
                return
            except ReplicaDiedError:
                if is_whole:
                    return
                if troubles.ended_once_too_often():
                    raise self._crashes.add(key) from None
            except OtherWeightsError:
                # What one model has begun is never gone on with by another.
                if request.answered_with or not troubles.can_wait():
                    raise
                await troubles.wait()
            except OverloadedError:
                # A full server says so at once, but not to an answer that a decoder had taken.
                if not troubles.was_taken or not troubles.can_wait():
                    raise
                await troubles.wait()


@dataclass
class _Troubles:
    """What one answer has been through."""

    most_waited_s: float
    num_ended: int = 0
    num_in_vain: int = 0
    """Replicas that ended since the last delta."""
    waited_s: float = 0.0
    was_taken: bool = False
    """A decoder had a place for it."""

    def ended_once_too_often(self) -> bool:
        """Count the end of a replica."""
        self.was_taken, self.num_ended, self.num_in_vain = True, self.num_ended + 1, self.num_in_vain + 1
        return self.num_in_vain == 2 or self.num_ended == _MOST_ENDED

    def can_wait(self) -> bool:
        """Whether a further pause is worth it."""
        return self.waited_s < self.most_waited_s

    async def wait(self) -> None:
        """A pause before the next try."""
        self.was_taken, self.waited_s = True, self.waited_s + _PAUSE_S
        await asyncio.sleep(_PAUSE_S)


def content_key(request: AnswerRequest) -> str:
    """Digest of what a request asks about, whoever asks."""
    content = (request.adapter, request.conversation, [media.key for media in request.media])
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _behind(request: AnswerRequest, delta: AnswerDelta) -> AnswerRequest:
    """The request for what follows."""
    return replace(request, answered=(*request.answered, *delta.token_ids), answered_with=delta.version)


def _crash() -> ReplicaCrashError:
    return ReplicaCrashError(
        "two replicas ended while they worked on this; it is refused for a minute, try another video or question"
    )
