"""The gate in front of the API: request ids, web origins, keys, rate limits, and one access-log line per request.

Pure ASGI, so that streams pass through as they are. Knows nothing of what the handlers do.
"""

import re
from collections.abc import Collection
from urllib.parse import urlsplit
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from valley_ray.errors import ValleyError
from valley_ray.serve.http_errors import error_response
from valley_ray.serve.keys import Keys, is_loopback
from valley_ray.serve.rate_limit import Allowance, RateLimit, RateLimiter
from valley_ray.serve.refusals import ForbiddenOriginError
from valley_ray.serve.visit import Visit, begin_visit, end_visit

REQUEST_ID = "x-request-id"
_OPEN_PATHS = frozenset({"/health", "/ready", "/openapi.json"})
"""What load balancers and clients may ask without a key."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


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
        headers = Headers(scope=scope)
        visit = begin_visit(scope, _request_id(headers))
        try:
            await self._serve(scope, receive, send, headers, visit)
        except ClientDisconnect:
            raise
        except Exception:
            # What answers it stands in front of the gate.
            visit.status, visit.refusal = visit.status or 500, "internal_error"
            raise
        finally:
            end_visit(scope, visit, is_counted=scope["path"] not in _OPEN_PATHS)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, headers: Headers, visit: Visit) -> None:
        allowance: Allowance | None = None

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                outgoing = MutableHeaders(scope=message)
                if not self._behind_serve:
                    outgoing[REQUEST_ID] = visit.request_id
                for name, value in (allowance.headers() if allowance is not None else {}).items():
                    outgoing[name] = value
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                visit.is_complete = True

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
        if self._is_private and not is_loopback(_host_name(f"//{host}")):
            raise ForbiddenOriginError(f"this server is 127.0.0.1 or localhost, not {host[:100]!r}; set API keys")
        origin = headers.get("origin")
        if origin is None or self._keys or "*" in self._origins or origin in self._origins:
            return
        if origin.partition("://")[2] == host and is_loopback(_host_name(origin)):
            return
        raise ForbiddenOriginError(f"web pages of origin {origin[:100]!r} may not ask here; add it to cors_origins")


def _host_name(url: str) -> str:
    """The host that a URL names; "" where it is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # half a bracket
        return ""


def _request_id(headers: Headers) -> str:
    sent = headers.get(REQUEST_ID, "")
    return sent if _REQUEST_ID.fullmatch(sent) else f"req_{uuid4().hex}"
