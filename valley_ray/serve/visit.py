"""Visit: what is known about one HTTP request while it is answered; at its end one access-log line and its counts."""

import logging
import time
from dataclasses import dataclass, field
from typing import Literal

from fastapi import Request
from starlette.types import Scope

from valley_ray.serve import metrics
from valley_ray.serve.keys import ANYONE, Caller
from valley_ray.serve.protocol import Timings

access_log = logging.getLogger("ray.serve.valley_access")
"""Below Serve's own logger: a replica writes nothing else to its log file."""

Outcome = Literal["answered", "refused", "failed", "aborted"]

_SCOPE_KEY = "valley_visit"
_ENDPOINTS = (("/v1/chat/completions", "chat"), ("/v1/files", "files"), ("/v1/models", "models"))


@dataclass
class Visit:
    """One HTTP request as the gate and the handlers know it."""

    request_id: str
    """The client's x-request-id, or ours."""
    caller: Caller = ANYONE
    status: int = 0
    """Of the response; 0 until its head is sent."""
    is_complete: bool = False
    """Whether the response was sent to its end."""
    refusal: str = ""
    """The error code that the client got."""
    model: str = ""
    """What is asked, as requests name it, where it exists."""
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    """Tokens of the answers; handlers fill both in, and a rate limit is charged with them when the request ends."""
    fetch_seconds: float | None = None
    """What finding the media took."""
    asked_seconds: float = 0.0
    """When the model was asked, after `started`."""
    timings: Timings | None = None
    """Of the answer; of several the one that took longest."""
    notes: dict[str, str] = field(default_factory=dict)
    """What else the access log should show."""
    started: float = field(default_factory=time.monotonic)

    @property
    def outcome(self) -> Outcome:
        """How the request ended."""
        if self.refusal:
            return "refused" if 400 <= self.status < 500 else "failed"
        return "answered" if self.is_complete else "aborted"

    @property
    def first_token_seconds(self) -> float | None:
        """From the request's head to its first token; None too where the answer was gone on with by another decoder,
        since only the last one tells its times."""
        if self.timings is None or self.timings.queue is None or self.timings.first_token is None:
            return None
        return self.asked_seconds + self.timings.queue + self.timings.first_token

    def now(self) -> float:
        """Seconds since the request began."""
        return time.monotonic() - self.started


def begin_visit(scope: Scope, request_id: str) -> Visit:
    """The visit of a request that has just come in."""
    visit = scope[_SCOPE_KEY] = Visit(request_id)
    return visit


def visit_of(request: Request) -> Visit:
    """The visit that a handler works for."""
    visit: Visit = request.scope[_SCOPE_KEY]
    return visit


def note_refusal(scope: Scope, code: str) -> None:
    """Remember which error the client gets."""
    visit: Visit | None = scope.get(_SCOPE_KEY)
    if visit is not None:
        visit.refusal = code


def end_visit(scope: Scope, visit: Visit, *, is_counted: bool) -> None:
    """Write the request's line and, where it is counted, its metrics; others are logged at DEBUG."""
    seconds, path = visit.now(), scope["path"]
    access_log.log(
        logging.INFO if is_counted else logging.DEBUG,
        "%s %s %s %d %.1f ms caller=%s outcome=%s%s",
        visit.request_id,
        scope["method"],
        # A path is what the client sent: no line breaks into the log.
        path[:200].encode("unicode_escape").decode(),
        visit.status,
        seconds * 1000,
        visit.caller.name,
        visit.outcome,
        "".join(f" {name}={value}" for name, value in _details(visit).items()),
    )
    if not is_counted:
        return
    endpoint = next((name for start, name in _ENDPOINTS if path.startswith(start)), "other")
    metrics.REQUESTS.add(endpoint=endpoint, outcome=visit.outcome)
    metrics.REQUEST_SECONDS.observe(seconds, endpoint=endpoint, outcome=visit.outcome)
    metrics.STAGE_SECONDS.observe(visit.fetch_seconds, stage="fetch")
    if visit.refusal:
        metrics.REFUSALS.add(reason=visit.refusal)
    elif visit.model:
        metrics.FIRST_TOKEN_SECONDS.observe(visit.first_token_seconds, model=visit.model)


def _details(visit: Visit) -> dict[str, str]:
    """What the log line says beside how the request ended; times in milliseconds."""
    details = {"reason": visit.refusal, "model": visit.model}
    if visit.model:
        details |= {"prompt_tokens": str(visit.num_prompt_tokens), "new_tokens": str(visit.num_tokens)}
    times = {"fetch": visit.fetch_seconds, "ttft": visit.first_token_seconds}
    if (timings := visit.timings) is not None:
        details["cache"] = timings.cache or ""
        times |= {
            "queue": timings.queue,
            "media": timings.media,
            "decode": timings.decode,
            "encode": timings.encode,
            "prefill": timings.prefill,
            "answer": timings.answer,
        }
    details |= {f"{name}_ms": f"{seconds * 1000:.1f}" for name, seconds in times.items() if seconds is not None}
    return {name: value for name, value in (details | visit.notes).items() if value}
