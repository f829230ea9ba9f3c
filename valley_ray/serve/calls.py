"""Calls between deployments: errors arrive as what they were, equal misses are computed once and kept.

Knows Ray's error types and nothing about what is computed.
"""

import asyncio
import contextvars
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Literal, TypeVar

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from valley_ray.errors import OtherWeightsError, OverloadedError, ReplicaDiedError, UnavailableError, ValleyError
from valley_ray.serve import metrics

Value = TypeVar("Value")


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise what a called deployment raised, without Ray's wrapping.

    A full queue becomes an OverloadedError, a replica that ended over the call a ReplicaDiedError, a missing deployment
    an UnavailableError.
    """
    try:
        yield
    except (RayTaskError, BackPressureError, RayActorError, DeploymentUnavailableError) as error:
        raise _what_was_raised(error) from None


def _what_was_raised(error: BaseException) -> BaseException:
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    if isinstance(error, ValleyError):
        return error
    if isinstance(error, BackPressureError):
        return OverloadedError(f"the server is full ({error.message}); try again in a second")
    if isinstance(error, RayActorError):
        return ReplicaDiedError("the replica that worked on this ended; try again shortly")
    if isinstance(error, DeploymentUnavailableError):
        return UnavailableError("a part of the server does not come up; try again later")
    return error


def check_version(asked: str, own: str) -> None:
    """Raise OtherWeightsError where a caller of another deployment has other weights: while a redeploy replaces one
    replica after the other, what is made for one model must not reach the other."""
    if asked != own:
        raise OtherWeightsError("the server is changing to another model; try again shortly")


class PullCache(Generic[Value]):
    """Least recently used values up to a number of bytes; callers of one missing key wait for one computation.

    For one asyncio loop. A failure is handed to everybody who waited and is not kept. `name` is what metrics call it.
    """

    def __init__(
        self, max_bytes: int, size_of: Callable[[Value], int], *, name: Literal["sampler", "encoder", "decoder"]
    ) -> None:
        self._max_bytes, self._size_of, self._name = max_bytes, size_of, name
        self._values: OrderedDict[str, Value] = OrderedDict()
        self._num_bytes = 0
        self._pending: dict[str, asyncio.Task[Value]] = {}
        self.num_hits = 0
        self.num_misses = 0

    async def get(self, key: str, compute: Callable[[], Awaitable[Value]]) -> Value:
        """The value of `key`, computed where it is not kept."""
        if key in self._values:
            self.num_hits += 1
            metrics.CACHE_LOOKUPS.add(cache=self._name, result="hit")
            self._values.move_to_end(key)
            return self._values[key]
        task = self._pending.get(key)
        metrics.CACHE_LOOKUPS.add(cache=self._name, result="miss" if task is None else "joined")
        if task is None:
            self.num_misses += 1
            # A context of its own: Serve and Ray cancel the calls made for a request whose client went away, and others
            # may wait for these.
            task = asyncio.get_running_loop().create_task(self._compute(key, compute), context=contextvars.Context())
            self._pending[key] = task
        # A caller who gives up must not take the computation from the others who wait for it.
        return await asyncio.shield(task)

    async def _compute(self, key: str, compute: Callable[[], Awaitable[Value]]) -> Value:
        try:
            value = await compute()
        finally:
            del self._pending[key]
        self._values[key] = value
        self._num_bytes += self._size_of(value)
        while self._num_bytes > self._max_bytes:
            _, dropped = self._values.popitem(last=False)
            self._num_bytes -= self._size_of(dropped)
        metrics.CACHE_BYTES.set(self._num_bytes, cache=self._name)
        return value
