import asyncio
import contextvars
import pickle

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from valley_ray import errors
from valley_ray.errors import NotMediaError, OverloadedError, ReplicaDiedError, UnavailableError, ValleyError
from valley_ray.serve.calls import PullCache, unwrapped


def wrapped(error: Exception) -> RayTaskError:
    return RayTaskError("call", "Traceback ...", error).as_instanceof_cause()


def test_errors_of_two_hops_arrive_as_what_they_were() -> None:
    with pytest.raises(NotMediaError) as caught, unwrapped():
        raise wrapped(wrapped(NotMediaError("x.mp4: no video")))
    assert type(caught.value) is NotMediaError
    assert str(caught.value) == "x.mp4: no video"


def test_a_full_queue_is_an_overloaded_error() -> None:
    for error in (BackPressureError(3, 2, 429, 1.0), wrapped(BackPressureError(3, 2, 429, 1.0))):
        with pytest.raises(OverloadedError, match="max_queued_requests=2"), unwrapped():
            raise error


def test_a_missing_deployment_is_unavailable() -> None:
    with pytest.raises(UnavailableError), unwrapped():
        raise DeploymentUnavailableError.__new__(DeploymentUnavailableError)


def test_every_error_of_the_tree_survives_pickling() -> None:
    kinds = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, ValleyError)]
    for kind in kinds:
        copy = pickle.loads(pickle.dumps(kind("why")))
        assert (type(copy), str(copy)) == (kind, "why")


class Source:
    def __init__(self) -> None:
        self.asked: list[str] = []

    async def pull(self, key: str) -> bytes:
        self.asked.append(key)
        await asyncio.sleep(0.01)
        if key == "bad":
            raise NotMediaError(key)
        return key.encode()


def test_callers_of_one_missing_key_share_one_computation() -> None:
    async def body() -> None:
        cache, source = PullCache[bytes](100, len, name="decoder"), Source()
        values = await asyncio.gather(*(cache.get(key, lambda key=key: source.pull(key)) for key in "aabab"))
        assert values == [b"a", b"a", b"b", b"a", b"b"]
        assert source.asked == ["a", "b"]
        assert await cache.get("a", lambda: source.pull("a")) == b"a"
        assert (cache.num_hits, cache.num_misses) == (1, 2)

    asyncio.run(body())


def test_the_least_recently_used_goes_first_when_bytes_run_out() -> None:
    async def body() -> None:
        cache, source = PullCache[bytes](6, len, name="decoder"), Source()
        for key in ("aa", "bb", "cc", "aa", "dd", "aa", "bb"):
            await cache.get(key, lambda key=key: source.pull(key))
        assert source.asked == ["aa", "bb", "cc", "dd", "bb"]
        # Larger than the whole cache: handed out, not kept, and the rest goes too.
        assert await cache.get("too large", lambda: source.pull("too large")) == b"too large"
        await cache.get("too large", lambda: source.pull("too large"))
        assert source.asked[-2:] == ["too large", "too large"]

    asyncio.run(body())


def test_a_failure_reaches_everybody_and_is_not_kept() -> None:
    async def body() -> None:
        cache, source = PullCache[bytes](100, len, name="decoder"), Source()
        both = [cache.get("bad", lambda: source.pull("bad")) for _ in range(2)]
        results = await asyncio.gather(*both, return_exceptions=True)
        assert [type(one) for one in results] == [NotMediaError, NotMediaError]
        assert source.asked == ["bad"]
        with pytest.raises(NotMediaError):
            await cache.get("bad", lambda: source.pull("bad"))
        assert len(source.asked) == 2

    asyncio.run(body())


def test_a_caller_that_gives_up_leaves_the_others_their_value() -> None:
    async def body() -> None:
        cache, source = PullCache[bytes](100, len, name="decoder"), Source()
        first = asyncio.create_task(cache.get("a", lambda: source.pull("a")))
        await asyncio.sleep(0)
        second = asyncio.create_task(cache.get("a", lambda: source.pull("a")))
        await asyncio.sleep(0)
        first.cancel()
        assert await second == b"a"
        assert source.asked == ["a"]

    asyncio.run(body())


def test_what_is_shared_is_not_part_of_the_request_that_asked_first() -> None:
    # Serve cancels the calls that were made in the context of a request whose client went away.
    request = contextvars.ContextVar[str]("request", default="nobody's")

    async def body() -> None:
        request.set("mine")
        cache = PullCache[str](100, len, name="decoder")

        async def compute() -> str:
            return request.get()

        assert await cache.get("a", compute) == "nobody's"

    asyncio.run(body())


def test_a_replica_that_ended_over_a_call_is_told_apart() -> None:
    with pytest.raises(ReplicaDiedError), unwrapped():
        raise ActorDiedError()
    with pytest.raises(ReplicaDiedError), unwrapped():
        raise wrapped(ActorUnavailableError("away", b"0" * 16))
