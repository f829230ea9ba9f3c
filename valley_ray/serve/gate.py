"""The gate in front of the API: request ids, web origins, keys, rate limits, and one access-log line per request.

Pure ASGI, so that streams pass through as they are. Knows nothing of what the handlers do.
"""

import logging
import re
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from urllib.parse import urlsplit
from uuid import uuid4

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from valley_ray.errors import ValleyError
from valley_ray.serve.http_errors import error_response
from valley_ray.serve.keys import ANYONE, Caller, Keys, is_loopback
from valley_ray.serve.rate_limit import Allowance, RateLimit, RateLimiter
from valley_ray.serve.refusals import ForbiddenOriginError

access_log = logging.getLogger("ray.serve.valley_access")
"""Below Serve's own logger: a replica writes nothing else to its log file."""

REQUEST_ID = "x-request-id"
_OPEN_PATHS = frozenset({"/health", "/ready", "/openapi.json"})
"""What load balancers and clients may ask without a key."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


@dataclass
class Visit:
    """One HTTP request as the gate and the handlers know it."""

    request_id: str
    """The client's x-request-id, or ours."""
    caller: Caller = ANYONE
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    """Tokens of the answers; handlers fill both in, and a rate limit is charged with them when the request ends."""
    notes: dict[str, str] = field(default_factory=dict)
    """What else the access log should show."""


def visit_of(request: Request) -> Visit:
    """The visit that a handler works for."""
    visit: Visit = request.scope["valley_visit"]
    return visit


class Gate:
    """Lets a request through to `app`, or answers with what is missing.

    Args:
        behind_serve: Serve's proxy stands in front, which puts x-request-id on responses by itself.
        is_private: without keys, refuse requests that name this server by anything but a loopback address: a web page
            can point its own host name at this machine and read what it gets (DNS rebinding).
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        rate_limit: RateLimit,
        cors_origins: Collection[str] = (),
        behind_serve: bool = False,
        is_private: bool = False,
    ) -> None:
        self._app, self._keys, self._origins = app, keys, frozenset(cors_origins)
        self._limiter = RateLimiter(rate_limit) if rate_limit.limits else None
        self._behind_serve, self._is_private = behind_serve, is_private and not keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, started, status = Headers(scope=scope), time.monotonic(), 0
        visit = scope["valley_visit"] = Visit(_request_id(headers))
        allowance: Allowance | None = None

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                outgoing = MutableHeaders(scope=message)
                if not self._behind_serve:
                    outgoing[REQUEST_ID] = visit.request_id
                for name, value in (allowance.headers() if allowance is not None else {}).items():
                    outgoing[name] = value
            await send(message)

        try:
            try:
                allowance = self._admit(scope, headers, visit)
            except ValleyError as error:
                await error_response(error)(scope, receive, send_with_headers)
                return
            try:
                await self._app(scope, receive, send_with_headers)
            finally:
                if allowance is not None:
                    allowance.leave(visit.num_prompt_tokens + visit.num_tokens)
        finally:
            _write_line(scope, visit, status, time.monotonic() - started)

    def _admit(self, scope: Scope, headers: Headers, visit: Visit) -> Allowance | None:
        """Check origin and key, count the request in; None: it is not counted."""
        path, method = scope["path"], scope["method"]
        self._check_origin(headers)
        if path in _OPEN_PATHS:
            return None
        visit.caller = self._keys.caller(headers.get("authorization"))
        if self._limiter is None or method != "POST":
            return None
        allowance = self._limiter.of(visit.caller.owner)
        allowance.enter()
        return allowance

    def _check_origin(self, headers: Headers) -> None:
        """A page from elsewhere must not use a server that asks for no key through the browser of whoever runs it."""
        host = headers.get("host", "")
        if self._is_private and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            raise ForbiddenOriginError(f"this server is 127.0.0.1 or localhost, not {host[:100]!r}; set API keys")
        origin = headers.get("origin")
        if origin is None or self._keys or "*" in self._origins or origin in self._origins:
            return
        parts = urlsplit(origin)
        if parts.netloc == host and is_loopback(parts.hostname or ""):
            return
        raise ForbiddenOriginError(f"web pages of origin {origin[:100]!r} may not ask here; add it to cors_origins")


def _request_id(headers: Headers) -> str:
    sent = headers.get(REQUEST_ID, "")
    return sent if _REQUEST_ID.fullmatch(sent) else f"req_{uuid4().hex}"


def _write_line(scope: Scope, visit: Visit, status: int, seconds: float) -> None:
    # status 0: the client went away, or the handler failed before the first byte.
    notes = "".join(f" {name}={value}" for name, value in visit.notes.items())
    access_log.log(
        logging.DEBUG if scope["path"] in _OPEN_PATHS else logging.INFO,
        "%s %s %s %d %.1f ms caller=%s prompt_tokens=%d new_tokens=%d%s",
        visit.request_id,
        scope["method"],
        # A path is what the client sent: no line breaks into the log.
        scope["path"][:200].encode("unicode_escape").decode(),
        status,
        seconds * 1000,
        visit.caller.name,
        visit.num_prompt_tokens,
        visit.num_tokens,
        notes,
    )
