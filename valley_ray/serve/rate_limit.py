"""Rate limits per API key: requests and tokens per minute as buckets that refill all the time, and requests at once.

Counts of one process: several ingress replicas allow their number times as much.
"""

import math
import time
from collections.abc import Callable

from pydantic import Field

from valley_ray.config import Config
from valley_ray.serve.refusals import RateLimitError


class RateLimit(Config):
    """What each key may ask for (on a server without keys: everybody together); None: no limit."""

    requests_per_minute: int | None = Field(default=None, ge=1)
    """Requests that may come in within a minute; as many may come at once."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Prompt and new tokens per minute. They are known when an answer ends, so the last answer may overdraw; the key
    then waits until the debt is refilled."""
    concurrent_requests: int | None = Field(default=None, ge=1)
    """Requests that may run at once."""

    @property
    def limits(self) -> bool:
        """Whether anything is limited."""
        return any((self.requests_per_minute, self.tokens_per_minute, self.concurrent_requests))


class _Bucket:
    """`capacity` units that refill within a minute."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.level = capacity, float(capacity)
        self._seen: float | None = None

    def refill(self, now: float) -> None:
        if self._seen is not None:
            self.level = min(self.capacity, self.level + (now - self._seen) * self.capacity / 60)
        self._seen = now

    def seconds_until(self, level: float) -> float:
        return max(0.0, (level - self.level) * 60 / self.capacity)


class Allowance:
    """What one key has left."""

    def __init__(self, limit: RateLimit, clock: Callable[[], float]) -> None:
        self._limit, self._clock = limit, clock
        self._num_running = 0
        sizes = {"requests": limit.requests_per_minute, "tokens": limit.tokens_per_minute}
        self._buckets = {name: _Bucket(size) for name, size in sizes.items() if size is not None}

    def enter(self) -> None:
        """Count one request in; raises RateLimitError where there is no room for it. Every `enter` has a `leave`."""
        self._refill()
        waits = {name: bucket.seconds_until(1.0) for name, bucket in self._buckets.items() if bucket.level < 1.0}
        if waits:
            name, wait_s = max(waits.items(), key=lambda item: item[1])
            raise self._refusal(f"over {self._buckets[name].capacity} {name} per minute", wait_s)
        most = self._limit.concurrent_requests
        if most is not None and self._num_running >= most:
            raise self._refusal(f"{most} requests of this key are running already", 1.0)
        self._num_running += 1
        if "requests" in self._buckets:
            self._buckets["requests"].level -= 1

    def leave(self, num_tokens: int) -> None:
        """A request ended that took `num_tokens` tokens."""
        self._num_running -= 1
        self._refill()
        if "tokens" in self._buckets:
            self._buckets["tokens"].level -= num_tokens

    def headers(self) -> dict[str, str]:
        """OpenAI's x-ratelimit headers of what is limited per minute."""
        self._refill()
        headers = {}
        for name, bucket in self._buckets.items():
            headers[f"x-ratelimit-limit-{name}"] = str(bucket.capacity)
            headers[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level)))
            headers[f"x-ratelimit-reset-{name}"] = f"{bucket.seconds_until(bucket.capacity):.3f}s"
        return headers

    def _refill(self) -> None:
        now = self._clock()
        for bucket in self._buckets.values():
            bucket.refill(now)

    def _refusal(self, what: str, wait_s: float) -> RateLimitError:
        return RateLimitError(
            f"{what}; try again in {math.ceil(wait_s)} s", retry_after_s=wait_s, headers=self.headers()
        )


class RateLimiter:
    """The allowances of all callers."""

    def __init__(self, limit: RateLimit, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit, clock
        self._allowances: dict[str, Allowance] = {}

    def of(self, owner: str) -> Allowance:
        """The allowance of one caller."""
        if owner not in self._allowances:
            self._allowances[owner] = Allowance(self._limit, self._clock)
        return self._allowances[owner]
