"""How a request ends, as the access log and the counters tell it; through the whole app."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest
from metric_log import MetricLog
from serve_stand_in import CHAT, HELLO, Recorder, app, config, send, two_words
from starlette.types import Message

from valley_ray.errors import OverloadedError, PromptTooLongError, UnavailableError
from valley_ray.serve import metrics
from valley_ray.serve.api import Backend, build_api
from valley_ray.serve.protocol import AnswerDelta, AnswerRequest, Timings

pytestmark = pytest.mark.anyio

TIMINGS = Timings(
    queue=0.25, media=0.5, decode=0.125, encode=0.0625, prefill=0.5, first_token=1.0, answer=2.0, cache="none"
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> MetricLog:
    return MetricLog(monkeypatch)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "ray.serve.valley_access")
    return caplog


def last(lines: pytest.LogCaptureFixture) -> tuple[str, dict[str, str]]:
    """(what stands before the details, the details) of the newest access-log line."""
    words = [line.getMessage() for line in lines.records if line.name == "ray.serve.valley_access"][-1].split()
    details = dict(word.split("=", 1) for word in words[6:])
    return " ".join(words[1:4]), details


def timed(text: str = "red", timings: Timings = TIMINGS) -> AnswerDelta:
    return AnswerDelta(text, 5, 3, "stop", timings=timings)


async def test_an_answer_is_told_with_its_times(log: MetricLog, lines: pytest.LogCaptureFixture) -> None:
    for stream in (False, True):
        await send(app(Recorder(timed())), json={**HELLO, "stream": stream})
        head, details = last(lines)
        assert head == f"POST {CHAT} 200"
        assert details["outcome"] == "answered"
        assert details["model"] == "tiny"
        assert details["caller"] == "anyone"
        assert (details["prompt_tokens"], details["new_tokens"], details["cache"]) == ("5", "3", "none")
        times = {name.removesuffix("_ms"): float(value) for name, value in details.items() if name.endswith("_ms")}
        first_token_ms = times.pop("ttft")
        assert 1250 <= first_token_ms < 3000, "queue and first token, and what the ingress took"
        assert times == {
            "queue": 250, "media": 500, "decode": 125, "encode": 62.5, "prefill": 500, "answer": 2000
        }  # fmt: skip
        assert "reason" not in details
    assert log.value(metrics.REQUESTS, endpoint="chat", outcome="answered") == 2
    assert len(log.durations(metrics.REQUEST_SECONDS, endpoint="chat", outcome="answered")) == 2
    assert all(1.25 <= one < 3 for one in log.durations(metrics.FIRST_TOKEN_SECONDS, model="tiny"))
    assert log.total(metrics.REFUSALS) == 0


async def test_the_slowest_of_several_choices_is_told(lines: pytest.LogCaptureFixture) -> None:
    slow = iter((TIMINGS, replace(TIMINGS, answer=7.0), TIMINGS))

    class Choices(Recorder):
        async def answer(self, request: AnswerRequest) -> AsyncGenerator[AnswerDelta, None]:
            yield timed(timings=next(slow))

    await send(app(Choices()), json={**HELLO, "n": 3, "temperature": 1.0})
    assert last(lines)[1]["answer_ms"] == "7000.0"


async def test_an_answer_that_another_decoder_began_has_no_first_token(
    log: MetricLog, lines: pytest.LogCaptureFixture
) -> None:
    await send(app(Recorder(timed(timings=replace(TIMINGS, queue=None)))), json=HELLO)
    details = last(lines)[1]
    assert "answer_ms" in details
    assert not {"ttft_ms", "queue_ms"} & details.keys()
    assert not log.durations(metrics.FIRST_TOKEN_SECONDS, model="tiny")


async def test_media_that_was_found_has_its_time(log: MetricLog, lines: pytest.LogCaptureFixture) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    content = [image, {"type": "text", "text": "what?"}]
    await send(app(), json={"model": "tiny", "messages": [{"role": "user", "content": content}]})
    assert float(last(lines)[1]["fetch_ms"]) > 0
    assert len(log.durations(metrics.STAGE_SECONDS, stage="fetch")) == 1
    await send(app(), json=HELLO)
    assert "fetch_ms" not in last(lines)[1], "nothing was fetched"


async def test_every_refusal_is_counted_with_its_reason(log: MetricLog, lines: pytest.LogCaptureFixture) -> None:
    limited = app(settings=config(rate_limit={"requests_per_minute": 1}))
    await send(limited, json=HELLO)
    cases: list[tuple[Any, str, str, dict[str, Any], str]] = [
        (limited, CHAT, "rate_limit_exceeded", HELLO, "refused"),
        (app(), CHAT, "invalid_request", {}, "refused"),
        (app(), CHAT, "model_not_found", {**HELLO, "model": "other"}, "refused"),
        (app(), "/nowhere", "http_404", {}, "refused"),
        (app(), CHAT, "request_too_large", {**HELLO, "user": "x" * 5_000_000}, "refused"),
        (app(Recorder(PromptTooLongError("long"))), CHAT, "prompt_too_long", HELLO, "refused"),
        (app(Recorder(OverloadedError("full"))), CHAT, "overloaded", HELLO, "refused"),
        (app(Recorder(UnavailableError("down"))), CHAT, "unavailable", HELLO, "failed"),
        (app(Recorder(KeyError("bug"))), CHAT, "internal_error", HELLO, "failed"),
    ]
    for front, path, reason, body, outcome in cases:
        response = await send(front, path=path, json=body)
        head, details = last(lines)
        assert head == f"POST {path} {response.status_code}", reason
        assert (details["outcome"], details["reason"]) == (outcome, reason)
        assert log.value(metrics.REFUSALS, reason=reason) == 1
    refused = log.total(metrics.REQUESTS) - log.value(metrics.REQUESTS, endpoint="chat", outcome="answered")
    assert refused == len(cases) == log.total(metrics.REFUSALS)
    assert not log.durations(metrics.FIRST_TOKEN_SECONDS, model="tiny")


async def test_a_stream_that_breaks_off_has_failed(log: MetricLog, lines: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(AnswerDelta("red", 5, 1), UnavailableError("a replica ended"))
    await send(app(recorder), json={**HELLO, "stream": True})
    head, details = last(lines)
    assert head == f"POST {CHAT} 200"
    assert (details["outcome"], details["reason"], details["new_tokens"]) == ("failed", "unavailable", "1")
    assert log.value(metrics.REQUESTS, endpoint="chat", outcome="failed") == 1
    assert log.value(metrics.REFUSALS, reason="unavailable") == 1


async def test_a_client_that_goes_away_has_aborted(log: MetricLog, lines: pytest.LogCaptureFixture) -> None:
    began = asyncio.Event()

    class Slow(Recorder):
        async def answer(self, request: AnswerRequest) -> AsyncGenerator[AnswerDelta, None]:
            yield AnswerDelta("red", 5, 1)
            began.set()
            await asyncio.sleep(60)

    for stream in (True, False):
        front = build_api(config(), Backend(Slow().answer, bytes))
        began.clear()
        body = [{"type": "http.request", "body": _json(stream), "more_body": False}]

        async def receive(body: list[Message] = body) -> Message:
            if body:
                return body.pop()
            await began.wait()
            return {"type": "http.disconnect"}

        async def nowhere(message: Message) -> None:
            pass

        task = asyncio.create_task(front(_scope(), receive, nowhere))
        await began.wait()
        if not stream:
            # As Serve ends the request of a client that is gone.
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        head, details = last(lines)
        assert head == f"POST {CHAT} {200 if stream else 0}"
        assert details["outcome"] == "aborted"
        assert details["new_tokens"] == "1"
    assert log.value(metrics.REQUESTS, endpoint="chat", outcome="aborted") == 2
    assert log.total(metrics.REFUSALS) == 0


async def test_health_checks_are_not_counted(log: MetricLog, lines: pytest.LogCaptureFixture) -> None:
    front = app(two_words())
    for path in ("/health", "/ready", "/openapi.json"):
        await send(front, "GET", path)
    assert log.total(metrics.REQUESTS) == 0
    await send(front, "GET", "/v1/models")
    assert log.value(metrics.REQUESTS, endpoint="models", outcome="answered") == 1
    assert "prompt_tokens" not in last(lines)[1]


def _scope() -> dict[str, Any]:
    headers = [(b"host", b"test"), (b"content-type", b"application/json")]
    return {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "headers": headers,
            "query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1",
            "client": ("127.0.0.1", 1), "server": ("test", 80), "asgi": {"version": "3.0"}}  # fmt: skip


def _json(stream: bool) -> bytes:
    flag = b"true" if stream else b"false"
    return b'{"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "stream": ' + flag + b"}"
