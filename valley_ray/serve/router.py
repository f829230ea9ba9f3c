"""Which replica a request goes to: the one that knows its video, and its adapter, unless that one is too busy.

`ranked` is the choice; MediaRouter asks it with what Serve knows. Serve hands this module to callers as a pickle of its
source objects: it keeps no state of its own.
"""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from uuid import uuid4

from ray.serve.request_router import MultiplexMixin, PendingRequest, RequestRouter, RunningReplica

from valley_ray.serve.protocol import AnswerRequest, MediaRef

_FAIR_SHARE = 1.25
"""A replica with more than this many times the average load is passed over ("consistent hashing with bounded loads",
Mirrokni, Thorup and Zadimoghaddam 2018)."""


def ranked(
    loads: Mapping[str, int],
    key: str,
    *,
    slack: int,
    adapter: str = "",
    opened: Mapping[str, Collection[str]] | None = None,
) -> list[str]:
    """Replica names, best first, by rendezvous hashing: where one comes or goes, only its own keys move.

    Args:
        loads: replica → requests that it has.
        key: what its caches know, such as the key of a video.
        slack: a replica with fewer requests than this is not too busy, whatever the others have.
        adapter: what it has to have opened; "": nothing.
        opened: replica → adapters that it has open.
    """
    bound = max(slack, math.ceil(_FAIR_SHARE * (sum(loads.values()) + 1) / max(len(loads), 1)))

    def place(replica: str) -> tuple[bool, int, bool, int, str]:
        others = (opened or {}).get(replica, ())
        is_busy, is_holder = loads[replica] >= bound, not adapter or adapter in others
        # Who has to open the adapter is chosen by the room for it and the adapter alone, so that few replicas have to.
        text, num_others = (f"{adapter}|{key}", 0) if is_holder else (adapter, len(others))
        weight = hashlib.sha256(f"{text}|{replica}".encode()).hexdigest()
        return is_busy, loads[replica] if is_busy else 0, not is_holder, num_others, weight

    return sorted(loads, key=place)


class MediaRouter(MultiplexMixin, RequestRouter):
    """Routes answers by their first video or image, other calls by the media that they name; what names none (text
    alone) goes to the emptier of two replicas."""

    def initialize_state(self, *, slack: int = 4) -> None:
        """Serve calls it with `request_router_kwargs`."""
        self._slack = slack

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas, best first; Serve takes the emptiest of the first group that has room."""
        if pending_request is None:
            return [candidate_replicas]
        # Where all of them are full, look again after a pause.
        pending_request.routing_context.should_backoff = True
        replicas = {one.replica_id.unique_id: one for one in _of_version(candidate_replicas, pending_request.args)}
        known = {name: self.replica_queue_len_cache.get(one.replica_id) for name, one in replicas.items()}
        adapter = pending_request.metadata.multiplexed_model_id
        key = _key_of(pending_request.args)
        order = ranked(
            {name: load or 0 for name, load in known.items()},
            key or uuid4().hex,
            slack=self._slack,
            adapter=adapter,
            opened={name: one.multiplexed_model_ids for name, one in replicas.items()},
        )
        names = [[name] for name in order] if key or adapter else [order[:2], order[2:]]
        return [[replicas[name] for name in group] for group in names]

    def _get_pending_request_matching_internal_request_id(self, request_metadata: Any = None) -> PendingRequest | None:
        """The request that a replica was chosen for.

        Serve's own looks by an id that all calls made for one HTTP request share: two videos of one question would
        take each other's replica, and one of them wait for ever.
        """
        # Serve forgets the requests of an adapter only when asked for one.
        self._get_pending_request_matching_multiplexed_model_id(request_metadata)
        waiting = (one for one in self._pending_requests_to_fulfill if one.metadata is request_metadata)
        return next((one for one in waiting if not one.future.done()), None)


def _key_of(args: Sequence[Any]) -> str:
    first = args[0] if args else None
    if isinstance(first, MediaRef):
        return first.key
    # The first one alone: the next question of a conversation may bring more, and begins with the same.
    return first.media[0].key if isinstance(first, AnswerRequest) and first.media else ""


def _of_version(replicas: list[RunningReplica], args: Sequence[Any]) -> list[RunningReplica]:
    """Those that have the weights that a call is about; all where there are none, to be told so."""
    first = args[0] if args else None
    asked = first.answered_with if isinstance(first, AnswerRequest) else str(args[2]) if len(args) > 2 else ""
    version = asked.partition("+")[0]
    if not version:
        return replicas
    return [one for one in replicas if one.replica_metadata.get("version", version) == version] or replicas
