"""Every error of the HTTP front in OpenAI's shape: ``{"error": {"message", "type", "code", "param"}}``.

A ValleyError brings its code and status; a request that breaks the schema is a 400 that names its fields; what nobody
foresaw is a 500 without details, which stand in the log.
"""

import difflib
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from valley_ray.errors import (
    ConversationError,
    FetchError,
    MediaError,
    OverloadedError,
    SamplingError,
    UnavailableError,
    UnknownModelError,
    ValleyError,
)
from valley_ray.serve.protocol import ChatCompletionRequest

logger = logging.getLogger(__name__)

_PARAMS: tuple[tuple[type[ValleyError], str], ...] = (
    (UnknownModelError, "model"),
    (SamplingError, "num_frames"),
    (FetchError, "messages"),
    (MediaError, "messages"),
    (ConversationError, "messages"),
)


def error_body(error: BaseException) -> tuple[int, dict[str, Any]]:
    """HTTP status and JSON body of an error."""
    if isinstance(error, ValleyError):
        param = next((name for kind, name in _PARAMS if isinstance(error, kind)), None)
        return error.http_status, _body(str(error), error.http_status, error.code, param)
    if isinstance(error, RequestValidationError):
        first, *_ = problems = error.errors()
        param = None if first["type"] == "json_invalid" else _path(first) or None
        return 400, _body("; ".join(map(_describe, problems)), 400, "invalid_request", param)
    if isinstance(error, HTTPException):
        return error.status_code, _body(str(error.detail), error.status_code, f"http_{error.status_code}", None)
    return 500, _body("the server failed on this request; its log says why", 500, "internal_error", None)


def add_error_handlers(api: FastAPI) -> None:
    """Answer every error of `api` with `error_body`."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        status, body = error_body(error)
        if status >= 500:
            logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        retry = {"Retry-After": "1"} if isinstance(error, OverloadedError | UnavailableError) else None
        return JSONResponse(body, status_code=status, headers=retry)

    for kind in (ValleyError, RequestValidationError, HTTPException, Exception):
        api.add_exception_handler(kind, answer)


def refuse_larger_bodies(api: FastAPI, *, max_bytes: int) -> None:
    """Answer 413 to a body of more than `max_bytes`, before or while it is read."""
    api.add_middleware(_BodyLimit, max_bytes=max_bytes)


class _BodyLimit:
    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        declared = dict(scope.get("headers", ())).get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self._max_bytes:
            status, body = error_body(self._too_large())
            await JSONResponse(body, status_code=status)(scope, receive, send)
            return
        num_read = 0

        async def counting() -> Message:
            nonlocal num_read
            message = await receive()
            num_read += len(message.get("body", b""))
            if num_read > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, counting, send)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the request is larger than {self._max_bytes} bytes; send a smaller file or a path")


def _body(message: str, status: int, code: str, param: str | None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "code": code, "param": param}}


def _path(problem: dict[str, Any]) -> str:
    return ".".join(str(part) for part in problem["loc"] if part != "body")


def _describe(problem: dict[str, Any]) -> str:
    path = _path(problem)
    if problem["type"] == "json_invalid":
        return f"the body is not valid JSON: {problem['ctx']['error']}"
    if problem["type"] == "extra_forbidden":
        known = list(ChatCompletionRequest.model_fields) if "." not in path else []
        nearest = difflib.get_close_matches(path, known, n=1)
        return f"unknown field {path!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else "")
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if not path:
        return "expected a JSON object with the header 'Content-Type: application/json'"
    return f"{path}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"
