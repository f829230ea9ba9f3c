"""BodyLimit: what a request's body may be before anything reads it: how large, how slow, of how many JSON values."""

import asyncio
import time

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from valley_ray.errors import ValleyError
from valley_ray.serve.http_errors import error_response
from valley_ray.serve.refusals import RequestTimeoutError, RequestTooLargeError

_FILES_PATH = "/v1/files"
_MOST_VALUES = 100_000
"""JSON values in a body; Python takes seconds and gigabytes for ten millions, and nobody is answered meanwhile."""
_VALUE_MARKS = (b",", b"[", b"{")
"""One stands before every value but those of fields that come first; base64 has none of them."""


class BodyLimit:
    """Answers 413 to a body that is too large, before or while it is read, and 408 to one that does not arrive.

    Args:
        chat_bytes: most bytes of a question, and of anything else that is no upload.
        file_bytes: most bytes of an upload.
        timeout_s: longest that a body may take; a tenth of it may pass without a byte.
    """

    def __init__(self, app: ASGIApp, *, chat_bytes: int, file_bytes: int, timeout_s: float) -> None:
        self._app, self._chat_bytes, self._file_bytes = app, chat_bytes, file_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = scope["path"] == _FILES_PATH
        limit = self._file_bytes if is_upload else self._chat_bytes
        declared = dict(scope.get("headers", ())).get(b"content-length", b"")
        if declared.isdigit() and int(declared) > limit:
            await error_response(_too_large(limit, is_upload=is_upload))(scope, receive, send)
            return
        body = _Body(
            receive, max_bytes=limit, max_values=None if is_upload else _MOST_VALUES, timeout_s=self._timeout_s
        )
        await self._app(scope, body.receive, send)


class _Body:
    """The body of one request on its way in; `max_values` None: it is no JSON."""

    def __init__(self, receive: Receive, *, max_bytes: int, max_values: int | None, timeout_s: float) -> None:
        self._receive, self._max_bytes, self._max_values = receive, max_bytes, max_values
        self._silence_s, self._ends = timeout_s / 10, time.monotonic() + timeout_s
        self._num_bytes = self._num_values = 0
        self._is_whole = False

    async def receive(self) -> Message:
        """The next piece; what comes behind the last one is waited for without a limit."""
        if self._is_whole:
            return await self._receive()
        try:
            async with asyncio.timeout(min(self._silence_s, self._ends - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            raise _as_http(
                RequestTimeoutError("the body of the request did not arrive in time; send it again")
            ) from None
        self._is_whole = not message.get("more_body", False)
        self._count(message.get("body", b""))
        return message

    def _count(self, data: bytes) -> None:
        self._num_bytes += len(data)
        if self._num_bytes > self._max_bytes:
            raise _as_http(_too_large(self._max_bytes, is_upload=self._max_values is None))
        if self._max_values is None:
            return
        self._num_values += sum(data.count(mark) for mark in _VALUE_MARKS)
        if self._num_values > self._max_values:
            raise _as_http(RequestTooLargeError(f"more than {self._max_values} JSON values or commas; send fewer"))


def _too_large(limit: int, *, is_upload: bool) -> RequestTooLargeError:
    advice = "send a smaller file" if is_upload else "upload the file, or send a smaller one"
    return RequestTooLargeError(f"the request is larger than {limit} bytes; {advice}")


def _as_http(error: ValleyError) -> HTTPException:
    """Starlette's own kind: FastAPI turns anything else that reading a body raises into a 400."""
    return HTTPException(error.http_status, str(error))
