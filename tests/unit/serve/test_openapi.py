"""/openapi.json against what the handlers take and return."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from serve_stand_in import CHAT, HELLO, Recorder, app, config, send, two_words

from valley_ray.errors import OverloadedError
from valley_ray.serve.keys import read_keys
from valley_ray.serve.protocol import AnswerDelta, TokenChance, TokenLogprob

pytestmark = pytest.mark.anyio

VALUES: dict[str, Any] = {
    "model": "tiny",
    "messages": HELLO["messages"],
    "temperature": 0.5,
    "top_p": 0.5,
    "frequency_penalty": 1,
    "presence_penalty": 1,
    "fps": 2.5,
    "start_s": 0,
    "end_s": 2,
    "stop": ["END"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "logprobs": True,
    "top_logprobs": 2,
    "logit_bias": {"3": 1.5},
    "metadata": {"a": "b"},
    "tools": [],
    "functions": [],
    "tool_choice": "auto",
    "modalities": ["text"],
    "response_format": {"type": "text"},
    "user": "me",
    "service_tier": "auto",
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "store": False,
    "parallel_tool_calls": True,
}
"""A value that each field takes; whole numbers take 1."""
NEEDS: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True},
    "stream_options": {"stream": True},
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def document() -> dict[str, Any]:
    found: dict[str, Any] = (await send(app(), "GET", "/openapi.json")).json()
    return found


def check(instance: object, schema: dict[str, Any], whole: dict[str, Any]) -> None:
    jsonschema.validate(instance, {**schema, "components": whole["components"]})


def reply_schema(whole: dict[str, Any], method: str, path: str, status: str, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = whole["paths"][path][method]["responses"][status]["content"][kind]["schema"]
    return found


async def test_every_field_of_the_schema_is_taken_and_no_other() -> None:
    whole = await document()
    ref = {"$ref": "#/components/schemas/ChatCompletionRequest"}
    fields = whole["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    api = app()
    for name in fields:
        body = {**HELLO, **NEEDS.get(name, {}), name: VALUES.get(name, 1)}
        check(body, ref, whole)
        assert (await send(api, json=body)).status_code == 200, name
        wrong = {**HELLO, name: [[]]}
        with pytest.raises(jsonschema.ValidationError):
            check(wrong, ref, whole)
        assert (await send(api, json=wrong)).status_code == 400, name
    with pytest.raises(jsonschema.ValidationError):
        check({**HELLO, "unknown": 1}, ref, whole)


async def test_parts_of_messages_are_taken_as_the_schema_says() -> None:
    whole = await document()
    ref = {"$ref": "#/components/schemas/ChatCompletionRequest"}
    media, ask = {"url": "data:video/mp4;base64,AAEC"}, {"type": "text", "text": "what?"}
    parts = [
        ({"type": "video_url", "video_url": media, "num_frames": 2}, 200),
        ({"type": "video_url", "video_url": {**media, "fps": 2}}, 200),
        ({"type": "image_url", "image_url": {**media, "detail": "low"}}, 200),
        ({"type": "image_url", "image_url": media, "num_frames": 2}, 400),
        ({"type": "input_audio", "input_audio": {}}, 400),
    ]
    api = app()
    for part, status in parts:
        body = {"model": "tiny", "messages": [{"role": "user", "content": [part, ask]}]}
        assert (await send(api, json=body)).status_code == status, part
        if status == 200:
            check(body, ref, whole)
        else:
            with pytest.raises(jsonschema.ValidationError):
                check(body, ref, whole)


async def test_replies_streams_and_errors_are_as_the_schema_says(tmp_path: Path) -> None:
    whole, kind = await document(), "application/json"
    red = TokenLogprob("red", b"red", -0.5, (TokenChance("\ufffd", None, -2.0),))
    script = AnswerDelta("red", 5, 1, None, (red,)), AnswerDelta("", 5, 2, "length")
    for fields in ({}, {"logprobs": True, "top_logprobs": 1, "n": 2}):
        reply = await send(app(Recorder(*script)), json={**HELLO, **fields})
        check(reply.json(), reply_schema(whole, "post", CHAT, "200", kind), whole)
        options = {"stream": True, "stream_options": {"include_usage": bool(fields)}}
        events = await send(app(Recorder(*script)), json={**HELLO, **fields, **options})
        lines = [line.removeprefix("data: ") for line in events.text.strip().split("\n\n")]
        assert lines.pop() == "[DONE]"
        for line in lines:
            event = json.loads(line)
            check(event, reply_schema(whole, "post", CHAT, "200", "text/event-stream"), whole)
            assert ("usage" in event) == bool(fields)
    for recorder, body, status in (
        (Recorder(OverloadedError("full")), HELLO, "4XX"),
        (two_words(), {**HELLO, "n": 0}, "4XX"),
        (Recorder(KeyError("bug")), HELLO, "5XX"),
    ):
        check((await send(app(recorder), json=body)).json(), reply_schema(whole, "post", CHAT, status, kind), whole)


async def test_files_models_and_status_are_as_the_schema_says(tmp_path: Path) -> None:
    whole, kind = await document(), "application/json"
    api = app(settings=config(tmp_path))
    form = whole["paths"]["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    data = {"purpose": "vision", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    assert {*data, "file"} == set(form["properties"])
    stored = await send(api, path="/v1/files", data=data, files={"file": ("a.mp4", b"bytes")})
    check(stored.json(), reply_schema(whole, "post", "/v1/files", "200", kind), whole)
    file_id = stored.json()["id"]
    seen = {("post", "/v1/files"), ("post", CHAT), ("get", "/v1/files/{file_id}/content")}
    for path, template in (
        ("/v1/files", "/v1/files"),
        (f"/v1/files/{file_id}", "/v1/files/{file_id}"),
        ("/v1/models", "/v1/models"),
        ("/v1/models/tiny", "/v1/models/{model_id}"),
        ("/health", "/health"),
        ("/ready", "/ready"),
    ):
        reply = await send(api, "GET", path)
        check(reply.json(), reply_schema(whole, "get", template, "200", kind), whole)
        seen.add(("get", template))
    gone = await send(api, "DELETE", f"/v1/files/{file_id}")
    check(gone.json(), reply_schema(whole, "delete", "/v1/files/{file_id}", "200", kind), whole)
    seen.add(("delete", "/v1/files/{file_id}"))
    assert seen == {(method, path) for path, methods in whole["paths"].items() for method in methods}


async def test_no_answer_is_promised_that_is_never_given() -> None:
    whole = await document()
    for methods in whole["paths"].values():
        for operation in methods.values():
            assert set(operation["responses"]) == {"200", "4XX", "5XX"}


async def test_a_server_with_keys_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VALLEY_API_KEYS", "k" * 20)
    whole = (await send(app(keys=read_keys(None)), "GET", "/openapi.json")).json()
    assert whole["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert "security" in whole["paths"][CHAT]["post"]
    assert "security" not in whole["paths"]["/health"]["get"]
