"""What bodies may be, through the whole app: those that stop arriving, and those that are all brackets."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from serve_stand_in import CHAT, HELLO, Recorder, app, config, openai_client, send

from valley_ray.serve.protocol import AnswerDelta, AnswerRequest

pytestmark = pytest.mark.anyio

JSON = {"content-type": "application/json"}
FORM = {"content-type": "multipart/form-data; boundary=B"}
BEGUN = b'--B\r\ncontent-disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def stalled(begun: bytes) -> AsyncGenerator[bytes, None]:
    yield begun
    await asyncio.Event().wait()


async def dribbling(begun: bytes) -> AsyncGenerator[bytes, None]:
    yield begun
    while True:
        await asyncio.sleep(0.01)
        yield b" "


async def test_a_body_that_does_not_arrive_is_a_408_and_frees_its_place(tmp_path: Path) -> None:
    front = app(settings=config(tmp_path, files={"max_uploads": 1}, body_timeout_s=0.5))
    for path, headers, begun in ((CHAT, JSON, b'{"model":'), ("/v1/files", FORM, BEGUN)):
        for body in (stalled, dribbling):
            async with asyncio.timeout(5):
                reply = await send(front, path=path, content=body(begun), headers=headers)
            assert (reply.status_code, reply.json()["error"]["code"]) == (408, "request_timeout")
    patient = app(settings=config(tmp_path, files={"max_uploads": 1}))
    stored = await openai_client(patient).files.create(file=("a.mp4", b"bytes"), purpose="vision")
    assert stored.bytes == 5


async def test_an_answer_may_take_longer_than_a_body() -> None:
    class Slow(Recorder):
        async def answer(self, request: AnswerRequest) -> AsyncGenerator[AnswerDelta, None]:
            await asyncio.sleep(0.3)
            yield AnswerDelta("red", 5, 1, "stop")

    front = app(Slow(), config(body_timeout_s=0.2))
    for stream in (False, True):
        assert (await send(front, json={**HELLO, "stream": stream})).status_code == 200


async def test_a_body_of_too_many_values_is_a_413_before_it_is_read() -> None:
    front = app()
    for values in (b"[" * 200_000, b"0," * 200_000, b'{"a":' * 200_000):
        reply = await send(front, content=b'{"metadata":' + values, headers=JSON)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
        assert "JSON values" in reply.json()["error"]["message"]


async def test_whoever_uploads_too_much_is_not_told_to_upload_it(tmp_path: Path) -> None:
    front = app(settings=config(tmp_path, files={"max_file_bytes": 10}))
    upload = {"data": {"purpose": "vision"}, "files": {"file": ("a", b"b" * 70_000)}}
    reply = await send(front, path="/v1/files", **upload)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
    assert reply.json()["error"]["message"].endswith("send a smaller file")
