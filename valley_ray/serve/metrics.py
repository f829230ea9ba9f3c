"""Every metric of the server, declared once: name, what it counts, labels. Values go to Ray, which Prometheus scrapes.

A scrape shows each with Ray's `ray_` in front, and with the labels application, deployment and replica. Label values
come from the configuration and the code, never from a client, so that their number is bounded. In a process that is no
replica nothing is recorded. One value costs microseconds: per request or step, never per token.
"""

import functools
import threading
import time
from typing import Any, ClassVar

from ray import serve
from ray.serve import metrics as of_ray
from ray.serve.exceptions import RayServeException

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds of buckets, from a cache hit to a long answer on a CPU."""
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


_REPEAT_S = 5.0
"""Ray reports a gauge once after it was set, and drops it when two report intervals (20 s) pass without news."""


class Metric:
    """A name that scrapes show; Ray's own object is made with the first value, inside the replica."""

    def __init__(self, name: str, description: str, *labels: str) -> None:
        self.name, self.description, self.labels = name, description, labels
        self._of_ray: Any = None

    def _opened(self) -> Any:
        """Ray's metric; None where this process is no replica."""
        if self._of_ray is None:
            try:
                serve.get_replica_context()
            except RayServeException:
                return None
            self._of_ray = self._open()
        return self._of_ray

    def _open(self) -> Any:
        raise NotImplementedError


class Counter(Metric):
    """Something that only grows."""

    def add(self, amount: float = 1, **labels: str) -> None:
        """Count `amount` more; 0 changes nothing."""
        if amount and (metric := self._opened()) is not None:
            metric.inc(amount, labels)

    def _open(self) -> Any:
        return of_ray.Counter(self.name, self.description, self.labels)


class Gauge(Metric):
    """Something that goes up and down. A thread of the process repeats what was last said, so that what stays as it is
    does not vanish from scrapes."""

    def __init__(self, name: str, description: str, *labels: str) -> None:
        super().__init__(name, description, *labels)
        self._lock = threading.Lock()
        self._values: dict[tuple[tuple[str, str], ...], float] = {}

    def set(self, value: float, **labels: str) -> None:
        """What it is now."""
        with self._lock:
            if (metric := self._opened()) is not None:
                self._values[tuple(labels.items())] = value
                metric.set(value, labels)

    def repeat(self) -> None:
        """Say again what was last said."""
        with self._lock:
            for labels, value in self._values.items():
                self._of_ray.set(value, dict(labels))

    def _open(self) -> Any:
        _repeat_gauges()
        return of_ray.Gauge(self.name, self.description, self.labels)


@functools.cache
def _repeat_gauges() -> None:
    """Start the thread, once per process."""

    def repeat() -> None:
        while True:
            time.sleep(_REPEAT_S)
            for metric in ALL:
                if isinstance(metric, Gauge):
                    metric.repeat()

    threading.Thread(target=repeat, name="gauges", daemon=True).start()


class Histogram(Metric):
    """Durations in buckets. Ray keeps the counts per bucket and no exact sum: ask for quantiles, not for means."""

    buckets: ClassVar[tuple[float, ...]] = SECONDS

    def observe(self, seconds: float | None, **labels: str) -> None:
        """Count one duration; None: there was none."""
        if seconds is not None and (metric := self._opened()) is not None:
            metric.observe(seconds, labels)

    def _open(self) -> Any:
        return of_ray.Histogram(self.name, self.description, list(self.buckets), self.labels)


class TokenHistogram(Histogram):
    """Durations of single tokens."""

    buckets = TOKEN_SECONDS


REQUESTS = Counter(
    "valley_requests_total",
    "HTTP requests that ended, /health, /ready and /openapi.json aside. endpoint: chat, files, models, other; outcome: "
    "answered, refused (4xx), failed (5xx, or a stream that broke off), aborted (the client went away).",
    "endpoint",
    "outcome",
)
REFUSALS = Counter(
    "valley_refusals_total",
    "Requests that were refused or failed. reason: the error code that the client got.",
    "reason",
)
REQUEST_SECONDS = Histogram(
    "valley_request_seconds", "From the request's head to the end of its answer.", "endpoint", "outcome"
)
FIRST_TOKEN_SECONDS = Histogram(
    "valley_first_token_seconds",
    "From a chat request's head to its first token, of answered requests. model: as requests name it.",
    "model",
)
STAGE_SECONDS = Histogram(
    "valley_stage_seconds",
    "Where time goes. stage: fetch (the ingress finds all media of a request), queue (from the ingress to a decoder), "
    "media (a decoder finds or pulls all visual tokens), decode (a sampler decodes one clip), encode (an encoder "
    "encodes one clip, waiting for its batch included), prefill (from the engine's door to the first token, waiting "
    "for a slot included), answer (first to last token). Stages that a cache saves are not counted.",
    "stage",
)
TOKEN_GAP_SECONDS = TokenHistogram(
    "valley_token_gap_seconds", "Mean time between two tokens of an answer, once per answer.", "model"
)
PROMPT_TOKENS = Counter("valley_prompt_tokens_total", "Prompt tokens, visual ones included.", "model")
CACHED_PROMPT_TOKENS = Counter(
    "valley_cached_prompt_tokens_total", "Prompt tokens whose keys and values were in a decoder's cache.", "model"
)
NEW_TOKENS = Counter("valley_new_tokens_total", "Tokens of answers, counted while they are made.", "model")
ANSWERS = Counter(
    "valley_answers_total",
    "Answers of the engine (a request with n > 1 may have several). ended: stop, length, abandoned (nobody read on), "
    "failed.",
    "model",
    "ended",
)
RUNNING_REQUESTS = Gauge("valley_running_requests", "Answers that hold a place in an engine.")
WAITING_REQUESTS = Gauge("valley_waiting_requests", "Answers that wait for a place in an engine.")
CACHE_LOOKUPS = Counter(
    "valley_cache_lookups_total",
    "Looks into the caches of media. cache: sampler, encoder, decoder; result: hit, miss, joined (the same was being "
    "computed for somebody else).",
    "cache",
    "result",
)
CACHE_BYTES = Gauge("valley_cache_bytes", "What a cache of media holds.", "cache")

ALL: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
"""In the order in which they stand here."""
