"""The HTTP front without Ray: the backend is an assistant's engine in this process, or a plain generator."""

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from serve_stand_in import CHAT, HELLO, Recorder, app, config, send, two_words

from valley_ray.errors import NotMediaError, OverloadedError
from valley_ray.serve.protocol import AnswerDelta


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


pytestmark = pytest.mark.anyio


async def test_a_whole_answer_has_openais_shape() -> None:
    reply = (await send(app(two_words()), json=HELLO)).json()
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "red circle", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert reply["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert reply["object"] == "chat.completion"
    assert reply["model"] == "tiny"


async def test_fields_of_the_request_become_sampling_parameters() -> None:
    recorder = two_words()
    body = {**HELLO, "max_completion_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": -4}
    await send(app(recorder), json={**body, "stop": None, "n": 1, "user": "me", "presence_penalty": 0})
    [request] = recorder.requests
    params = request.params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.seed) == (7, 0.5, 0.9, 3, -4)
    assert not request.fit_max_tokens


async def test_stop_is_one_text_or_up_to_four() -> None:
    for sent, expected in (("END", ("END",)), (["a", "b"], ("a", "b")), ([], ()), (None, ())):
        recorder = two_words()
        assert (await send(app(recorder), json={**HELLO, "stop": sent})).status_code == 200
        assert recorder.requests[0].stop == expected
    for wrong in ("", [""], ["a"] * 5, 3):
        reply = await send(app(two_words()), json={**HELLO, "stop": wrong})
        assert reply.status_code == 400
        assert "stop" in reply.json()["error"]["message"]


async def test_without_fields_the_answer_is_greedy_and_its_length_is_fitted() -> None:
    recorder = two_words()
    await send(app(recorder), json=HELLO)
    [request] = recorder.requests
    assert request.params.temperature == 0
    assert request.fit_max_tokens
    assert request.frames == ()


async def test_data_uris_become_references_and_base64_stays_behind(tmp_path: Path) -> None:
    recorder, stored = two_words(), []
    video = tmp_path / "clip.mp4"
    video.write_bytes(b"path")
    content = [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAEC", "detail": "low"}},
        {"type": "video_url", "video_url": {"url": video.as_uri()}},
        {"type": "text", "text": "what?"},
    ]
    front = app(recorder, put=lambda data: stored.append(data) or "ref", settings=config(allow_roots=(tmp_path,)))
    response = await send(front, json={"model": "tiny", "messages": [{"role": "user", "content": content}]})
    assert response.status_code == 200, response.text
    image, clip = recorder.requests[0].media
    assert stored == [b"\x00\x01\x02"]
    assert (image.kind, image.data, image.path) == ("image", "ref", None)
    assert (clip.kind, clip.data, clip.path) == ("video", None, str(video.resolve()))
    assert recorder.requests[0].conversation.messages[0].content == "<image>\n<video>\nwhat?"


@pytest.mark.parametrize(
    ("change", "message", "param"),
    [
        ({"temprature": 1}, "unknown field 'temprature'; did you mean 'temperature'?", "temprature"),
        ({"n": 9}, "n=9 is over this server's 8", None),
        ({"max_tokens": "5"}, "max_tokens: input should be a valid integer", "max_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", None),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs: true", None),
        ({"start_s": 2, "end_s": 1}, "end_s must be after start_s", None),
        ({"temperature": 3}, "temperature: input should be less than or equal to 2", "temperature"),
        ({"tools": [{}]}, "tools: not supported here; leave it out", "tools"),
        ({"messages": []}, "messages: ", "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role: ", "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages.0.content.0: ", None),
        ({"messages": [{"role": "user", "content": [{}]}]}, "0.content.0: expected a part with a type", None),
        (
            {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": 1}, "fps": None}]}]},
            "messages.0.content.0.file.file_id: input should be a valid string",
            "messages.0.content.0.file.file_id",
        ),
        ({"top_k": 10**400, "temperature": 1}, "top_k: input should be less than or equal to 2147483647", "top_k"),
        ({"messages": [{"role": "user", "content": "a <video>"}]}, "the text contains <video>", "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "the question is empty", "messages"),
        ({"num_frames": 4, "fps": 1}, "send num_frames or fps, not both", None),
    ],
)
async def test_bad_fields_are_named(change: dict[str, Any], message: str, param: str | None) -> None:
    recorder = two_words()
    response = await send(app(recorder), json={**HELLO, **change})
    error = response.json()["error"]
    assert response.status_code == 400
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    assert not recorder.requests


async def test_a_message_quotes_no_more_than_a_line_of_the_request() -> None:
    long = "k" * 100_000
    for change in ({long: 1}, {"logit_bias": {long: 1}}, {"n": 10**4000}, {"model": long}, {"metadata": {long: 1}}):
        reply = await send(app(two_words()), json={**HELLO, **change})
        error = reply.json()["error"]
        assert reply.status_code in (400, 404)
        assert len(error["message"]) <= 500
        assert len(error["param"] or "") <= 120


async def test_half_characters_are_refused_like_anything_else() -> None:
    for body in (
        {**HELLO, "\ud800": 1},
        {**HELLO, "model": "\ud800"},
        {"model": "tiny", "messages": [{"role": "user", "content": "a \ud800"}]},
        {"model": "tiny", "messages": [{"role": "\udfff", "content": "a"}]},
    ):
        content = json.dumps(body).encode()
        reply = await send(app(), content=content, headers={"content-type": "application/json"})
        assert reply.status_code in (400, 404), reply.text
        assert reply.json()["error"]["message"]


async def test_broken_json_and_missing_content_type_are_said_plainly() -> None:
    front = app(two_words())
    broken = await send(front, content=b'{"model"', headers={"content-type": "application/json"})
    assert broken.json()["error"]["message"].startswith("the body is not valid JSON")
    plain = await send(front, content=json.dumps(HELLO), headers={"content-type": "text/plain"})
    assert "Content-Type: application/json" in plain.json()["error"]["message"]
    assert plain.status_code == broken.status_code == 400


async def test_a_body_over_the_limit_is_a_413_declared_or_not() -> None:
    front = app(two_words())
    large = json.dumps({**HELLO, "metadata": {"x": "y" * (5 * 2**20)}}).encode()
    headers = {"content-type": "application/json"}

    async def chunks() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(large), 2**20):
            yield large[start : start + 2**20]

    for content in (large, chunks()):
        response = await send(front, content=content, headers=headers)
        assert response.status_code == 413, response.text
        assert response.json()["error"]["code"] == "request_too_large"


async def test_errors_of_the_backend_keep_their_status() -> None:
    bad = await send(app(Recorder(NotMediaError("x.mp4: no video"))), json={**HELLO, "stream": True})
    assert (bad.status_code, bad.json()["error"]["code"]) == (400, "media_not_recognised")
    full = await send(app(Recorder(OverloadedError("full"))), json=HELLO)
    assert (full.status_code, full.headers["retry-after"]) == (429, "1")
    assert full.json()["error"]["type"] == "rate_limit_error"
    bug = await send(app(Recorder(KeyError("secret"))), json=HELLO)
    assert bug.status_code == 500
    assert "secret" not in bug.text
    assert bug.json()["error"]["type"] == "server_error"


async def test_a_failure_in_mid_stream_is_an_event_and_no_done() -> None:
    recorder = Recorder(AnswerDelta("red", 5, 1), OverloadedError("gone"))
    response = await send(app(recorder), json={**HELLO, "stream": True})
    first, error = [json.loads(line[6:]) for line in response.text.strip().split("\n\n")]
    assert first["choices"][0]["delta"]["content"] == "red"
    assert error["error"]["code"] == "overloaded"
    assert recorder.num_closed == 1


async def test_unknown_models_and_paths_are_404() -> None:
    front = app(two_words())
    assert (await send(front, json={**HELLO, "model": "gpt"})).json()["error"]["code"] == "model_not_found"
    assert (await send(front, "GET", "/v1/models/gpt")).status_code == 404
    assert (await send(front, "GET", "/v1/nowhere")).json()["error"]["type"] == "invalid_request_error"
    assert (await send(front, "GET", CHAT)).status_code == 405
