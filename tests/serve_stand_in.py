"""What the tests of the HTTP front stand on: a scripted backend, and clients that talk to the app in this process."""

from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
from fastapi import FastAPI

from valley_ray.serve.api import Backend, build_api
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.files import FilesConfig
from valley_ray.serve.keys import Keys
from valley_ray.serve.protocol import AnswerDelta, AnswerRequest

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


class Recorder:
    """Answers with the given deltas, keeps what it was asked, and notes how each answer ended."""

    def __init__(self, *script: AnswerDelta | Exception) -> None:
        self.script = script
        self.requests: list[AnswerRequest] = []
        self.num_closed = 0

    async def answer(self, request: AnswerRequest) -> AsyncGenerator[AnswerDelta, None]:
        self.requests.append(request)
        try:
            for step in self.script:
                if isinstance(step, Exception):
                    raise step
                yield step
        finally:
            self.num_closed += 1


def two_words() -> Recorder:
    return Recorder(AnswerDelta("red", 5, 1), AnswerDelta(" circle", 5, 3, "stop"))


def config(folder: Path | None = None, **fields: Any) -> ServeConfig:
    """A small server; `folder` keeps its uploads."""
    files = fields.pop("files", {})
    if folder is not None:
        files = {"folder": folder / "uploads", **files}
    return ServeConfig(model=Path("models/tiny"), files=FilesConfig(**files), **{"max_media_bytes": 1000, **fields})


def app(
    recorder: Recorder | None = None,
    settings: ServeConfig | None = None,
    *,
    put: Callable[[bytes], Any] = bytes,
    keys: Keys | None = None,
) -> FastAPI:
    recorder = recorder or two_words()
    return build_api(settings or config(), Backend(answer=recorder.answer, put=put), keys=keys)


async def send(api: FastAPI, method: str = "POST", path: str = CHAT, **arguments: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app=api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.request(method, path, **arguments)


def openai_client(api: FastAPI, key: str = "none", *, max_retries: int = 0) -> openai.AsyncOpenAI:
    """The client that people use, unchanged; only its wires lead to `api`."""
    wires = httpx.AsyncClient(transport=httpx.ASGITransport(app=api, raise_app_exceptions=False))
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key=key, http_client=wires, max_retries=max_retries)
