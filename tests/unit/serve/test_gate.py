"""Request ids, keys, origins, limits and the access log, through the whole app."""

import logging
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from serve_stand_in import CHAT, HELLO, Recorder, app, config, openai_client, send, two_words

from valley_ray.errors import OverloadedError
from valley_ray.serve.api import Backend, build_api
from valley_ray.serve.keys import Keys, read_keys
from valley_ray.serve.protocol import AnswerDelta

pytestmark = pytest.mark.anyio

ALICE, BOB = "a" * 24, "b" * 24


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Keys:
    monkeypatch.setenv("VALLEY_API_KEYS", f"{ALICE},{BOB}")
    return read_keys(None)


async def test_a_key_is_asked_for_everywhere_but_for_status(keys: Keys) -> None:
    recorder = two_words()
    front = app(recorder, keys=keys)
    for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/v1/files"), ("GET", "/nowhere")):
        refused = await send(front, method, path)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"
    assert not recorder.requests
    for path in ("/health", "/ready", "/openapi.json"):
        assert (await send(front, "GET", path)).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        await openai_client(front, "wrong").models.list()
    assert [model.id async for model in openai_client(front, ALICE).models.list()] == ["tiny"]


async def test_a_body_is_not_read_before_the_key_is_known(keys: Keys) -> None:
    async def endless():  # type: ignore[no-untyped-def]
        yield b"x"
        raise AssertionError("the body was read")

    assert (await send(app(keys=keys), content=endless())).status_code == 401


async def test_callers_see_their_own_files_only(keys: Keys, tmp_path: Path) -> None:
    front = app(settings=config(tmp_path), keys=keys)
    alice, bob = openai_client(front, ALICE), openai_client(front, BOB)
    stored = await alice.files.create(file=("a.mp4", b"bytes"), purpose="vision")
    assert [file.id async for file in bob.files.list()] == []
    for attempt in (bob.files.retrieve, bob.files.content, bob.files.delete):
        with pytest.raises(openai.NotFoundError):
            await attempt(stored.id)
    video = {"type": "video_url", "video_url": {"url": stored.id}}
    with pytest.raises(openai.NotFoundError):
        await bob.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": [video, {"type": "text", "text": "what?"}]}]
        )


async def test_request_ids_go_in_and_out_and_into_the_access_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ray.serve.valley_access")
    mine = await send(app(), json=HELLO, headers={"x-request-id": "job-7.a"})
    assert mine.headers["x-request-id"] == "job-7.a"
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"job-7.a POST {CHAT} 200 ")
    assert "prompt_tokens=5 new_tokens=3" in line
    assert "completion=chatcmpl-" in line
    for bad in ("a b", "x" * 200, "<script>"):
        made = (await send(app(), "GET", "/v1/models", headers={"x-request-id": bad})).headers["x-request-id"]
        assert made.startswith("req_")
    refused = await send(app(), json={})
    assert refused.headers["x-request-id"].startswith("req_")


async def test_what_a_client_writes_breaks_no_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ray.serve.valley_access")
    await send(app(), "GET", "/v1/a%0Ainjected%1b[31m")
    [line] = [record.getMessage() for record in caplog.records]
    assert line.isprintable()


async def test_limits_answer_429_with_the_headers_of_openai(keys: Keys) -> None:
    limited = config(rate_limit={"requests_per_minute": 2, "tokens_per_minute": 1000})
    front = app(settings=limited, keys=keys)
    headers = {"authorization": f"Bearer {ALICE}"}
    replies = [await send(front, json=HELLO, headers=headers) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert replies[0].headers["x-ratelimit-limit-requests"] == "2"
    assert replies[0].headers["x-ratelimit-remaining-requests"] == "1"
    assert int(replies[1].headers["x-ratelimit-remaining-tokens"]) < 1000
    assert 1 <= int(replies[2].headers["retry-after"]) <= 30
    assert replies[2].json()["error"]["code"] == "rate_limit_exceeded"
    with pytest.raises(openai.RateLimitError):
        await openai_client(front, ALICE).chat.completions.create(**HELLO)
    assert (await openai_client(front, BOB).chat.completions.create(**HELLO)).choices
    assert [model.id async for model in openai_client(front, ALICE).models.list()] == ["tiny"]


async def test_a_stream_is_charged_when_it_ends() -> None:
    front = app(settings=config(rate_limit={"tokens_per_minute": 8, "concurrent_requests": 1}))
    assert (await send(front, json={**HELLO, "stream": True})).text.endswith("[DONE]\n\n")
    assert (await send(front, json=HELLO)).status_code == 429


async def test_a_failed_request_leaves_its_place(keys: Keys) -> None:
    front = app(Recorder(OverloadedError("full")), config(rate_limit={"concurrent_requests": 1}))
    for _ in range(3):
        assert (await send(front, json=HELLO)).json()["error"]["code"] == "overloaded"


async def test_web_pages_may_not_ask_a_server_without_keys_unless_listed(keys: Keys, tmp_path: Path) -> None:
    evil = {"origin": "https://evil.example"}
    closed = app(settings=config(tmp_path))
    assert (await send(closed, json=HELLO, headers=evil)).json()["error"]["code"] == "origin_not_allowed"
    upload = {"data": {"purpose": "vision"}, "files": {"file": ("a", b"b")}}
    assert (await send(closed, path="/v1/files", headers=evil, **upload)).status_code == 403
    assert not (tmp_path / "uploads").exists()
    with_keys = await send(app(keys=keys), json=HELLO, headers={**evil, "authorization": f"Bearer {ALICE}"})
    assert with_keys.status_code == 200
    assert "access-control-allow-origin" not in with_keys.headers
    listed = app(settings=config(cors_origins=("https://ours.example",)))
    ours = await send(listed, json=HELLO, headers={"origin": "https://ours.example"})
    assert ours.headers["access-control-allow-origin"] == "https://ours.example"
    preflight = {"origin": "https://ours.example", "access-control-request-method": "POST"}
    assert (await send(listed, "OPTIONS", headers=preflight)).status_code == 200
    assert (await send(listed, json=HELLO, headers=evil)).status_code == 403


async def test_a_host_or_an_origin_that_is_no_name_is_refused_like_another() -> None:
    front = build_api(config(), Backend(answer=two_words().answer, put=bytes), behind_serve=True)
    local = {"host": "localhost:8000"}
    for headers in (
        {"host": "["},
        {"host": "a]b"},
        {**local, "origin": "http://["},
        {**local, "origin": "http://[::1"},
    ):
        refused = await send(front, "GET", "/v1/models", headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "origin_not_allowed")


async def test_a_name_that_points_here_is_no_address_of_a_private_server() -> None:
    def served(**fields: Any) -> FastAPI:
        return build_api(config(**fields), Backend(two_words().answer, bytes), behind_serve=True)

    async def status(front: FastAPI, host: str, **headers: str) -> int:
        return (await send(front, "GET", "/v1/models", headers={"host": host, **headers})).status_code

    for host in ("localhost:8000", "127.0.0.1:8000", "[::1]:8000"):
        assert await status(served(), host) == 200
        assert await status(served(), host, origin=f"http://{host}") == 200
    assert await status(served(), "evil.example:8000") == 403
    assert await status(served(allow_no_keys=True), "valley.example") == 200


async def test_ready_asks_the_model_and_health_does_not() -> None:
    broken = Recorder(KeyError("broken"))
    assert (await send(app(broken), "GET", "/health")).status_code == 200
    assert not broken.requests
    refused = await send(app(broken), "GET", "/ready")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert "KeyError" in refused.text
    busy = Recorder(OverloadedError("full"))
    assert (await send(app(busy), "GET", "/ready")).status_code == 200
    answering = Recorder(AnswerDelta("", 3, 1, "length"))
    front = app(answering)
    for _ in range(3):
        assert (await send(front, "GET", "/ready")).json() == {"status": "ok", "model": "tiny"}
    assert len(answering.requests) == 1
    assert answering.requests[0].params.max_tokens == 1
