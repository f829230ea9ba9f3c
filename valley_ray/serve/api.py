"""The HTTP front: OpenAI chat completions in, answers out as JSON or server-sent events; typed JSON errors.

Turns requests into AnswerRequests and deltas into responses. Knows neither models nor Ray: what answers is handed in.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse

from valley_ray.chat.conversation import MediaPart, from_openai
from valley_ray.engine.engine import SamplingParams
from valley_ray.errors import SamplingError, UnknownModelError
from valley_ray.fetch import FetchPolicy, fetch, media_key
from valley_ray.media.sampling import FrameSampling
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.http_errors import add_error_handlers, error_body, refuse_larger_bodies
from valley_ray.serve.protocol import AnswerDelta, AnswerRequest, ChatCompletionRequest, MediaRef

logger = logging.getLogger(__name__)

_ROOM_FOR_TEXT_BYTES = 4 * 2**20
"""What a request's body may hold beside media."""

Answer = Callable[[AnswerRequest], AsyncGenerator[AnswerDelta, None]]


@dataclass(frozen=True)
class Backend:
    """What stands behind the HTTP front."""

    answer: Answer
    """Deltas of one answer; closing the iterator early abandons it."""
    put: Callable[[bytes], Any]
    """Bytes → object reference that a MediaRef carries."""


def build_api(config: ServeConfig, backend: Backend) -> FastAPI:
    """The ASGI app of one served model."""
    api = FastAPI(title="valley_ray", description=f"Questions about videos, answered by {config.served_name}")
    add_error_handlers(api)
    # Base64 makes four bytes of three.
    refuse_larger_bodies(api, max_bytes=config.max_media_bytes * 4 // 3 + _ROOM_FOR_TEXT_BYTES)
    started = int(time.time())
    model = {"id": config.served_name, "object": "model", "created": started, "owned_by": "valley_ray"}
    policy = FetchPolicy(allow_roots=config.allow_roots, allow_data_uri=True, max_bytes=config.max_media_bytes)

    @api.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok", "model": config.served_name}

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @api.get("/v1/models/{name}")
    async def model_named(name: str) -> dict[str, Any]:
        _check_model(config, name)
        return model

    @api.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest) -> Response:
        _check_model(config, body.model)
        request = await _answer_request(config, policy, backend, body)
        reply = _Reply(request.request_id, config.served_name)
        deltas = backend.answer(request)
        try:
            # The first delta before the first byte: what is wrong with the request still has its HTTP status.
            first = await anext(deltas)
        except BaseException:
            await deltas.aclose()
            raise
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            events = _server_sent(reply, first, deltas, include_usage=include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        async with aclosing(deltas) as rest:
            return JSONResponse(reply.whole([first, *[delta async for delta in rest]]))

    return api


def _check_model(config: ServeConfig, name: str) -> None:
    if name != config.served_name:
        raise UnknownModelError(f"no model {name!r} here; this server has {config.served_name!r}")


async def _answer_request(
    config: ServeConfig, policy: FetchPolicy, backend: Backend, body: ChatCompletionRequest
) -> AnswerRequest:
    messages = [message.model_dump(exclude={"name"}, exclude_none=True) for message in body.messages]
    conversation, parts = from_openai(messages)
    params = SamplingParams(
        max_tokens=body.token_limit or config.default_max_tokens,
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        seed=body.seed or 0,
    )
    return AnswerRequest(
        request_id=f"chatcmpl-{uuid4().hex}",
        conversation=conversation,
        media=tuple(await asyncio.gather(*(asyncio.to_thread(_media_ref, part, policy, backend) for part in parts))),
        sampling=_sampling(config, body),
        params=params,
        fit_max_tokens=body.token_limit is None,
        stream=body.stream,
        stop=body.stop_texts,
    )


def _sampling(config: ServeConfig, body: ChatCompletionRequest) -> FrameSampling | None:
    if body.num_frames is not None:
        if body.num_frames > config.max_frames:
            raise SamplingError(
                f"num_frames={body.num_frames} is over this server's {config.max_frames}; ask for fewer"
            )
        return FrameSampling(num_frames=body.num_frames)
    return None if body.fps is None else FrameSampling(num_frames=None, fps=body.fps)


def _media_ref(part: MediaPart, policy: FetchPolicy, backend: Backend) -> MediaRef:
    fetched = fetch(part.url, policy)
    key = media_key(fetched)
    if isinstance(fetched.source, Path):
        return MediaRef(key, part.kind, fetched.name, path=str(fetched.source.absolute()))
    return MediaRef(key, part.kind, fetched.name, data=backend.put(fetched.source))


class _Reply:
    """Writes the JSON of one answer."""

    def __init__(self, request_id: str, model: str) -> None:
        self._head = {"id": request_id, "created": int(time.time()), "model": model}

    def whole(self, deltas: Sequence[AnswerDelta]) -> dict[str, Any]:
        """A `chat.completion`."""
        message = {"role": "assistant", "content": "".join(delta.text for delta in deltas)}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": deltas[-1].finish_reason}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": _usage(deltas[-1])}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        """A `chat.completion.chunk`."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, last: AnswerDelta) -> dict[str, Any]:
        """The chunk after the last, where the client asked for it."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(last)}


def _usage(last: AnswerDelta) -> dict[str, int]:
    return {
        "prompt_tokens": last.num_prompt_tokens,
        "completion_tokens": last.num_tokens,
        "total_tokens": last.num_prompt_tokens + last.num_tokens,
    }


async def _server_sent(
    reply: _Reply, first: AnswerDelta, rest: AsyncGenerator[AnswerDelta, None], *, include_usage: bool
) -> AsyncGenerator[str, None]:
    """The events of a stream. A failure in mid-stream becomes an error event: the status line is long gone."""
    last = first
    yield _event(reply.chunk({"role": "assistant", "content": first.text}))
    async with aclosing(rest) as deltas:
        try:
            async for delta in deltas:
                last = delta
                if delta.text:
                    yield _event(reply.chunk({"content": delta.text}))
        except Exception as error:  # whatever it is: a stream that just ends would look like a whole answer
            logger.exception("a stream broke off")
            yield _event(error_body(error)[1])
            return
    yield _event(reply.chunk({}, last.finish_reason))
    if include_usage:
        yield _event(reply.usage_chunk(last))
    yield "data: [DONE]\n\n"


def _event(payload: dict[str, Any]) -> str:
    return f"data: {json.dumps(payload, ensure_ascii=False)}\n\n"
