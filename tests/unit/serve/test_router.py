"""Which replica a request goes to: the choice alone, and the router on replicas that are not there."""

import asyncio
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from valley_ray.chat.conversation import Conversation, Message
from valley_ray.engine.engine import SamplingParams
from valley_ray.media.sampling import FrameSampling
from valley_ray.serve.protocol import AnswerRequest, FrameWish, MediaRef
from valley_ray.serve.router import MediaRouter, ranked

KEYS = [f"bytes-{number}" for number in range(600)]
IDLE = dict.fromkeys(("a", "b", "c"), 0)


def first(loads: dict[str, int], **wishes: Any) -> dict[str, str]:
    return {key: ranked(loads, key, slack=4, **wishes)[0] for key in KEYS}


def test_keys_are_spread_evenly() -> None:
    assert min(Counter(first(IDLE).values()).values()) > 150


def test_a_replica_that_goes_or_comes_moves_its_own_keys_alone() -> None:
    before, without_c = first(IDLE), first({"a": 0, "b": 0})
    assert {key for key in KEYS if before[key] != without_c[key]} == {key for key in KEYS if before[key] == "c"}
    assert set(Counter(without_c[key] for key in KEYS if before[key] == "c")) == {"a", "b"}


def test_a_favourite_is_passed_over_only_where_it_is_far_busier_than_the_others() -> None:
    key = next(key for key, name in first(IDLE).items() if name == "a")
    second = ranked(IDLE, key, slack=4)[1]
    best = {loads: ranked(dict(zip("abc", loads, strict=True)), key, slack=4)[0] for loads in (
        (3, 0, 0), (4, 0, 0), (12, 11, 12), (20, 4, 4), (100, 90, 95)
    )}  # fmt: skip
    assert best == {(3, 0, 0): "a", (4, 0, 0): second, (12, 11, 12): "a", (20, 4, 4): second, (100, 90, 95): "a"}
    # All of them remain, for the case that Serve finds the better ones full; the fullest comes last.
    assert ranked({"a": 20, "b": 4, "c": 4}, key, slack=4)[2] == "a"


def test_no_replica_gets_much_more_than_its_share_even_of_a_single_video() -> None:
    loads = dict(IDLE)
    for _ in range(60):
        loads[ranked(loads, "bytes-0", slack=4)[0]] += 1
    assert max(loads.values()) <= 60 / 3 * 1.25 + 1


def test_an_adapter_stays_where_it_is_open_until_those_are_busy() -> None:
    assert set(first(IDLE, adapter="x", opened={"b": {"x"}}).values()) == {"b"}
    assert set(first(IDLE, adapter="x", opened={"a": {"x"}, "b": {"x"}}).values()) == {"a", "b"}
    # Whoever has to open it is the same for every video.
    assert len(set(first(IDLE, adapter="x").values())) == 1
    spilled = first({"a": 0, "b": 9, "c": 0}, adapter="x", opened={"b": {"x"}})
    assert len(set(spilled.values())) == 1
    assert "b" not in spilled.values()


def test_an_adapter_is_opened_where_fewest_are() -> None:
    assert set(first(IDLE, adapter="x", opened={"a": {"y"}, "b": {"y", "z"}}).values()) == {"c"}
    # It stays where it is, however many others are there.
    assert set(first(IDLE, adapter="x", opened={"a": {"x", "y"}, "b": {"y"}}).values()) == {"a"}


class Replica(SimpleNamespace):
    """What the router asks of Serve's RunningReplica."""

    def __init__(self, name: str, version: str = "v") -> None:
        super().__init__(
            replica_id=ReplicaID(name, DeploymentID("d", "app")),
            multiplexed_model_ids=set(),
            replica_metadata={"version": version},
            max_ongoing_requests=2,
            node_id=None,
            availability_zone=None,
            num_ongoing=0,
        )

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.num_ongoing


def router_of(*replicas: Replica) -> MediaRouter:
    router = MediaRouter(DeploymentID("d", "app"), DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
    router.initialize_state(slack=4)
    router.update_replicas(list(replicas))
    return router


def call(*args: Any, adapter: str = "") -> PendingRequest:
    # Calls made for one HTTP request have these ids in common.
    metadata = RequestMetadata(request_id="r", internal_request_id="i", multiplexed_model_id=adapter)
    return PendingRequest(args=list(args), kwargs={}, metadata=metadata)


def clip(key: str) -> MediaRef:
    return MediaRef(key, "video", "clip.mp4", path="clip.mp4")


def question(*keys: str) -> AnswerRequest:
    conversation = Conversation((Message("user", "<video>" * len(keys) + "?"),))
    media = tuple(clip(key) for key in keys)
    return AnswerRequest("r", conversation, media, (FrameWish(),) * len(media), SamplingParams(), True, False)


async def chosen(router: MediaRouter, *args: Any, adapter: str = "") -> str:
    async with asyncio.timeout(10):
        replica = await router._choose_replica_for_request(call(*args, adapter=adapter))
    return replica.replica_id.unique_id


def test_questions_and_frames_of_a_video_have_the_same_favourite_whatever_else_is_asked() -> None:
    async def body() -> None:
        router = router_of(*map(Replica, "abc"))
        sampling = FrameSampling(num_frames=2)
        for key in KEYS[:20]:
            names = [await chosen(router, question(key)), await chosen(router, question(key, "bytes-other"))]
            names.append(await chosen(router, clip(key), sampling, "v"))
            assert set(names) == {ranked(IDLE, key, slack=4)[0]}

    asyncio.run(body())


def test_calls_made_for_one_request_at_once_each_get_their_own_replica() -> None:
    async def body() -> None:
        router = router_of(*map(Replica, "abc"))
        found = await asyncio.gather(*(chosen(router, clip(key)) for key in KEYS[:12]))
        assert found == [ranked(IDLE, key, slack=4)[0] for key in KEYS[:12]]

    asyncio.run(body())


def test_text_alone_goes_to_the_emptier_of_two() -> None:
    async def body() -> None:
        first, second = Replica("a"), Replica("b")
        second.num_ongoing = 1
        router = router_of(first, second)
        await asyncio.sleep(0.01)  # the router asks new replicas how much they have
        assert {await chosen(router, question()) for _ in range(10)} == {"a"}

    asyncio.run(body())


def test_a_full_favourite_is_left_for_the_next_one_and_waited_for_where_all_are_full() -> None:
    async def body() -> None:
        replicas = {name: Replica(name) for name in "ab"}
        router = router_of(*replicas.values())
        favourite, other = ranked({"a": 0, "b": 0}, "k", slack=4)
        replicas[favourite].num_ongoing = 2
        await asyncio.sleep(0.01)
        assert await chosen(router, clip("k")) == other
        replicas[other].num_ongoing = 2
        router.on_new_queue_len_info(replicas[other].replica_id, 2)
        waiting = asyncio.create_task(chosen(router, clip("k")))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        replicas[favourite].num_ongoing = 0
        assert await waiting == favourite

    asyncio.run(body())


@pytest.mark.parametrize("version", ["new", "new+adapter"])
def test_a_call_goes_to_replicas_of_its_version_while_there_are_some(version: str) -> None:
    async def body() -> None:
        router = router_of(Replica("a", "old"), Replica("b", "new"), Replica("c", "old"))
        sampling = FrameSampling(num_frames=2)
        assert {await chosen(router, clip(key), sampling, version) for key in KEYS[:10]} == {"b"}
        begun = [replace(question(key), answered=(1,), answered_with=version) for key in KEYS[:10]]
        assert {await chosen(router, one) for one in begun} == {"b"}
        assert len({await chosen(router, question(key)) for key in KEYS[:10]}) > 1
        assert len({await chosen(router, clip(key), sampling, "newest") for key in KEYS[:10]}) > 1

    asyncio.run(body())


def test_requests_with_adapters_are_forgotten_when_they_are_sent() -> None:
    async def body() -> None:
        router = router_of(*map(Replica, "ab"))
        for key in KEYS[:10]:
            await chosen(router, question(key), adapter="x")
        assert sum(map(len, router._pending_requests_by_model_id.values())) <= 1
        assert not router._pending_requests_by_id

    asyncio.run(body())
