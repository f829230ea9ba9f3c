import pytest

from valley_ray.serve.rate_limit import RateLimit, RateLimiter
from valley_ray.serve.refusals import RateLimitError


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_requests_refill_over_a_minute(clock: Clock) -> None:
    allowance = RateLimiter(RateLimit(requests_per_minute=6), clock).of("me")
    for _ in range(6):
        allowance.enter()
    assert allowance.headers()["x-ratelimit-remaining-requests"] == "0"
    with pytest.raises(RateLimitError, match="over 6 requests per minute; try again in 10 s") as refused:
        allowance.enter()
    assert refused.value.retry_after_s == pytest.approx(10)
    assert refused.value.headers["x-ratelimit-limit-requests"] == "6"
    assert refused.value.headers["x-ratelimit-reset-requests"] == "60.000s"
    clock.now += 10
    allowance.enter()
    with pytest.raises(RateLimitError):
        allowance.enter()


def test_an_answer_may_overdraw_the_tokens_and_the_key_then_waits(clock: Clock) -> None:
    allowance = RateLimiter(RateLimit(tokens_per_minute=60), clock).of("me")
    allowance.enter()
    allowance.leave(100)
    assert allowance.headers()["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(RateLimitError, match="over 60 tokens per minute") as refused:
        allowance.enter()
    assert refused.value.retry_after_s == pytest.approx(41)
    clock.now += 41
    allowance.enter()


def test_requests_at_once_are_limited_until_one_ends(clock: Clock) -> None:
    allowance = RateLimiter(RateLimit(concurrent_requests=2), clock).of("me")
    allowance.enter()
    allowance.enter()
    with pytest.raises(RateLimitError, match="2 requests of this key are running"):
        allowance.enter()
    allowance.leave(5)
    allowance.enter()
    assert allowance.headers() == {}


def test_a_refused_request_costs_nothing(clock: Clock) -> None:
    allowance = RateLimiter(RateLimit(requests_per_minute=2, concurrent_requests=1), clock).of("me")
    allowance.enter()
    for _ in range(5):
        with pytest.raises(RateLimitError):
            allowance.enter()
    allowance.leave(0)
    allowance.enter()


def test_keys_have_allowances_of_their_own(clock: Clock) -> None:
    limiter = RateLimiter(RateLimit(requests_per_minute=1), clock)
    limiter.of("me").enter()
    limiter.of("you").enter()
    with pytest.raises(RateLimitError):
        limiter.of("me").enter()


def test_rest_never_grows_over_the_limit(clock: Clock) -> None:
    allowance = RateLimiter(RateLimit(requests_per_minute=3), clock).of("me")
    clock.now += 3600
    assert allowance.headers()["x-ratelimit-remaining-requests"] == "3"
