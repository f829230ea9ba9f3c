"""The HTTP front: OpenAI's chat, models and files over whatever answers; typed JSON errors, keys, limits.

Puts the rooms of the API together. Knows neither models nor Ray: what answers is handed in.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse

from valley_ray.chat.conversation import Conversation, Message
from valley_ray.engine.engine import SamplingParams
from valley_ray.errors import OverloadedError, UnavailableError
from valley_ray.serve.body_limit import BodyLimit
from valley_ray.serve.chat import Answer, answers, event_stream, read_question, whole_reply
from valley_ray.serve.chat_reply import ChatCompletion, Reply
from valley_ray.serve.chat_request import ChatCompletionRequest
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.files import FileStore
from valley_ray.serve.files_api import files_router
from valley_ray.serve.gate import REQUEST_ID, Gate
from valley_ray.serve.http_errors import ErrorReply, add_error_handlers
from valley_ray.serve.keys import Keys
from valley_ray.serve.media_source import MediaSource
from valley_ray.serve.models_api import ServedModels
from valley_ray.serve.openapi import describe
from valley_ray.serve.protocol import AnswerRequest
from valley_ray.serve.visit import visit_of

_ROOM_FOR_TEXT_BYTES = 4 * 2**20
"""What a request's body may hold beside media."""
_ROOM_FOR_FORM_BYTES = 2**16
_READY_FOR_S = 2.0
"""How long one look at the model counts."""
_READY_TIMEOUT_S = 10.0

_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}}


@dataclass(frozen=True)
class Backend:
    """What stands behind the HTTP front."""

    answer: Answer
    """Deltas of one answer; closing the iterator early abandons it."""
    put: Callable[[bytes], Any]
    """Bytes → object reference that a MediaRef carries."""


class Health(Reply):
    """A server that runs."""

    status: Literal["ok"] = "ok"
    model: str


def build_api(
    config: ServeConfig, backend: Backend, *, keys: Keys | None = None, behind_serve: bool = False
) -> FastAPI:
    """The ASGI app of one served model.

    Args:
        keys: who may ask; none: everybody.
        behind_serve: Serve's proxy stands in front.
    """
    keys, name = keys or Keys(), config.served_name
    about = f"Questions about videos, answered by {name}"
    # No pages with forms: they load their scripts from elsewhere.
    api = FastAPI(title="valley_ray", description=about, responses=_ERRORS, docs_url=None, redoc_url=None)
    add_error_handlers(api)
    store = FileStore(config.files)
    _add_status(api, config, backend)
    models = ServedModels(config)
    api.include_router(models.router())
    _add_chat(api, config, backend, models, MediaSource(config, store, backend.put))
    api.include_router(files_router(store))
    describe(api, needs_key=bool(keys))
    # Base64 makes four bytes of three.
    chat_bytes = config.max_media_bytes * 4 // 3 + _ROOM_FOR_TEXT_BYTES
    file_bytes = config.files.max_file_bytes + _ROOM_FOR_FORM_BYTES
    api.add_middleware(BodyLimit, chat_bytes=chat_bytes, file_bytes=file_bytes, timeout_s=config.body_timeout_s)
    api.add_middleware(
        Gate,
        keys=keys,
        rate_limit=config.rate_limit,
        cors_origins=config.cors_origins,
        behind_serve=behind_serve,
        is_private=behind_serve and not config.allow_no_keys,
    )
    if config.cors_origins:
        # In front of the gate: a page can read its refusals too.
        limits = [
            f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")
        ]
        api.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, "Retry-After", *limits],
        )
    return api


def _add_status(api: FastAPI, config: ServeConfig, backend: Backend) -> None:
    probe = _Probe(backend.answer)

    @api.get("/health", response_model=Health, tags=["status"])
    async def health() -> Health:
        """Whether the HTTP front runs; asks no model."""
        return Health(model=config.served_name)

    @api.get("/ready", response_model=Health, tags=["status"])
    async def ready() -> Health:
        """Whether the model answers: it is asked for one token."""
        await probe.check()
        return Health(model=config.served_name)


def _add_chat(api: FastAPI, config: ServeConfig, backend: Backend, models: ServedModels, media: MediaSource) -> None:
    @api.post("/v1/chat/completions", response_model=ChatCompletion, tags=["chat"])
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """Ask about videos and images, or go on with a conversation."""
        adapter = models.adapter_of(body.model)
        visit = visit_of(request)
        visit.model = body.model
        question = await read_question(config, media, body, visit, adapter=adapter)
        deltas = answers(backend.answer, question)
        try:
            # The first delta before the first byte: what is wrong with the request still has its HTTP status.
            first = await anext(deltas)
        except BaseException:
            await deltas.aclose()
            raise
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            events = event_stream(question, first, deltas, visit, include_usage=include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return JSONResponse(await whole_reply(question, first, deltas, visit))


class _Probe:
    """Asks the model for one token, at most once in a while and never twice at the same time."""

    def __init__(self, answer: Answer) -> None:
        self._answer, self._lock = answer, asyncio.Lock()
        self._looked_at, self._problem = -_READY_FOR_S, ""

    async def check(self) -> None:
        """Raise UnavailableError where the model does not answer."""
        async with self._lock:
            if time.monotonic() - self._looked_at >= _READY_FOR_S:
                self._problem = await self._look()
                self._looked_at = time.monotonic()
        if self._problem:
            raise UnavailableError(f"the model does not answer ({self._problem}); try again shortly")

    async def _look(self) -> str:
        request = AnswerRequest(
            request_id="ready",
            conversation=Conversation((Message("user", "ready?"),)),
            media=(),
            frames=(),
            params=SamplingParams(max_tokens=1),
            fit_max_tokens=True,
            stream=False,
        )
        try:
            async with asyncio.timeout(_READY_TIMEOUT_S), aclosing(self._answer(request)) as deltas:
                async for _ in deltas:
                    pass
        except OverloadedError:
            return ""  # it is busy with other questions
        except TimeoutError:
            return f"nothing within {_READY_TIMEOUT_S:g} s"
        except Exception as error:  # whatever it is: this is the place that tells
            return type(error).__name__
        return ""
