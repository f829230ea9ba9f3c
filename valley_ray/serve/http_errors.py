"""Every error of the HTTP front in OpenAI's shape: ``{"error": {"message", "type", "code", "param"}}``.

A ValleyError brings its code and status; a request that breaks the schema is a 400 that names its fields; what nobody
foresaw is a 500 without details, which stand in the log.
"""

import difflib
import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from valley_ray.errors import (
    ConversationError,
    FetchError,
    MediaError,
    OverloadedError,
    UnavailableError,
    UnknownModelError,
    ValleyError,
)
from valley_ray.serve.chat_request import ChatCompletionRequest
from valley_ray.serve.refusals import (
    RateLimitError,
    RequestTimeoutError,
    RequestTooLargeError,
    UnauthorizedError,
    UnknownFileError,
)
from valley_ray.serve.visit import note_refusal

logger = logging.getLogger(__name__)

_FORMS = (("content", "string"), ("content", "parts"), ("stop", "string"), ("stop", "list"))
"""Names that the schema gives to forms of a field; they follow the field in a problem's place."""
_MOST_SHOWN = 500
"""Characters of a message: what it quotes came from the client, and may be as long as a body."""
_MOST_NAMED = 120
"""Characters of a field's name."""

_PARAMS: tuple[tuple[type[ValleyError], str], ...] = (
    (UnknownModelError, "model"),
    (UnknownFileError, "file_id"),
    (FetchError, "messages"),
    (MediaError, "messages"),
    (ConversationError, "messages"),
)


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    """One line: what was expected, what came, what to do."""
    type: str
    """invalid_request_error, rate_limit_error or server_error."""
    param: str | None
    """The field it is about."""
    code: str | None
    """Stable name of the reason."""


class ErrorReply(BaseModel):
    """Body of every answer with a status of 400 or more."""

    error: ErrorDetail


def error_body(error: BaseException) -> tuple[int, dict[str, Any]]:
    """HTTP status and JSON body of an error."""
    if isinstance(error, ValleyError):
        of_kind = next((name for kind, name in _PARAMS if isinstance(error, kind)), None)
        param: str | None = getattr(error, "param", of_kind)
        return error.http_status, _body(str(error), error.http_status, error.code, param)
    if isinstance(error, RequestValidationError):
        first, *_ = problems = error.errors()
        param = None if first["type"] == "json_invalid" else _path(first) or None
        return 400, _body("; ".join(map(_describe, problems[:5])), 400, "invalid_request", param)
    if isinstance(error, HTTPException):
        return error.status_code, _body(str(error.detail), error.status_code, f"http_{error.status_code}", None)
    return 500, _body("the server failed on this request; its log says why", 500, "internal_error", None)


class _ErrorResponse(JSONResponse):
    """Tells the visit which error it brings."""

    def __init__(self, body: dict[str, Any], *, status_code: int, headers: dict[str, str]) -> None:
        super().__init__(body, status_code=status_code, headers=headers)
        self._code: str = body["error"]["code"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        note_refusal(scope, self._code)
        await super().__call__(scope, receive, send)


def error_response(error: BaseException) -> JSONResponse:
    """The response to an error, with the headers that its status asks for."""
    status, body = error_body(error)
    headers = dict(getattr(error, "headers", None) or {})
    if isinstance(error, RateLimitError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, OverloadedError | UnavailableError):
        headers["Retry-After"] = "1"
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    return _ErrorResponse(body, status_code=status, headers=headers)


def add_error_handlers(api: FastAPI) -> None:
    """Answer every error of `api` with `error_body`."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        response = error_response(error)
        if response.status_code >= 500:
            logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return response

    for kind in (ValleyError, RequestValidationError, HTTPException, Exception):
        api.add_exception_handler(kind, answer)


def _body(message: str, status: int, code: str, param: str | None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    # What reading a body raises is Starlette's own kind, see BodyLimit.
    code = {one.http_status: one.code for one in (RequestTooLargeError, RequestTimeoutError)}.get(status, code)
    if param is not None:
        param = _cut(param, _MOST_NAMED)
    return {"error": {"message": _cut(message, _MOST_SHOWN), "type": kind, "code": code, "param": param}}


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _path(problem: dict[str, Any]) -> str:
    """Where the problem is, as the client wrote it: without the names of the forms that a field can have."""
    parts = [part for part in problem["loc"] if part != "body"]
    kept = []
    for index, part in enumerate(parts):
        is_form = tuple(parts[index - 1 : index + 1]) in _FORMS
        # The type of a content part follows its number.
        is_type = index >= 2 and parts[index - 2] == "parts"
        if not is_form and not is_type:
            kept.append(_cut(str(part), _MOST_NAMED))
    return ".".join(kept)


def _describe(problem: dict[str, Any]) -> str:
    path = _path(problem)
    if problem["type"] == "json_invalid":
        return f"the body is not valid JSON: {problem['ctx']['error']}"
    if problem["type"] == "extra_forbidden":
        known = list(ChatCompletionRequest.model_fields) if "." not in path else []
        nearest = difflib.get_close_matches(path, known, n=1)
        return f"unknown field {path!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else "")
    if problem["type"] == "union_tag_not_found":
        return f"{path}: expected a part with a type, such as {{'type': 'text', 'text': '...'}}"
    if problem["type"] == "union_tag_invalid":
        return f"{path}: expected a part of type {problem['ctx']['expected_tags']}, got {problem['ctx']['tag'][:60]!r}"
    if problem["type"] == "too_long" and not problem["ctx"]["max_length"]:
        return f"{path}: not supported here; leave it out"
    if problem["type"] == "value_error":
        where = f"{path}: " if path else ""
        return f"{where}{problem['ctx']['error']}"
    if not path:
        return "expected a JSON object with the header 'Content-Type: application/json'"
    return f"{path}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"
