"""/v1/chat/completions: a request becomes one AnswerRequest per choice, their deltas become a reply or a stream.

Knows neither models nor Ray: what answers is handed in.
"""

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from valley_ray.chat.conversation import from_openai
from valley_ray.engine.engine import SamplingParams
from valley_ray.serve.chat_reply import ReplyWriter, chunk_json
from valley_ray.serve.chat_request import ChatCompletionRequest
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.http_errors import error_body
from valley_ray.serve.media_source import MediaSource, as_openai
from valley_ray.serve.protocol import AnswerDelta, AnswerRequest
from valley_ray.serve.refusals import OverLimitError
from valley_ray.serve.visit import Visit

logger = logging.getLogger(__name__)

Answer = Callable[[AnswerRequest], AsyncGenerator[AnswerDelta, None]]
Indexed = tuple[int, AnswerDelta]
"""A choice's number and a delta of it."""


@dataclass(frozen=True)
class Question:
    """A request, ready to be answered."""

    requests: tuple[AnswerRequest, ...]
    """One per choice; one for all where they would be equal."""
    num_choices: int
    writer: ReplyWriter


async def read_question(
    config: ServeConfig, media: MediaSource, body: ChatCompletionRequest, visit: Visit, *, adapter: str | None = None
) -> Question:
    """Find the media and split the choices; raises what is wrong with the request. `adapter` is of the model asked."""
    num_choices = body.n or 1
    if num_choices > config.max_choices:
        raise OverLimitError(f"n={num_choices} is over this server's {config.max_choices}; ask for fewer", param="n")
    parts = media.parts_of(body)
    wishes = tuple(media.wish(part, body) for part in parts)
    before_fetch = visit.now()
    refs = await media.refs(parts, visit.caller.owner)
    if parts:
        visit.fetch_seconds = visit.now() - before_fetch
    conversation, _ = from_openai(as_openai(body, refs))
    completion_id = f"chatcmpl-{uuid4().hex}"
    visit.notes["completion"] = completion_id
    request = AnswerRequest(
        request_id=completion_id,
        conversation=conversation,
        media=refs,
        frames=wishes,
        params=_params(config, body),
        fit_max_tokens=body.token_limit is None,
        stream=bool(body.stream),
        stop=body.stop_texts,
        adapter=adapter,
        sent_at=time.time(),
    )
    visit.asked_seconds = visit.now()
    writer = ReplyWriter(completion_id, body.model, num_choices=num_choices, logprobs=bool(body.logprobs))
    return Question(tuple(_choices(request, num_choices)), num_choices, writer)


async def answers(answer: Answer, question: Question) -> AsyncGenerator[Indexed, None]:
    """Deltas of all choices as they come; closing the iterator early, or a failure of one, abandons all."""
    if len(question.requests) == 1:
        async with aclosing(answer(question.requests[0])) as deltas:
            async for delta in deltas:
                for index in range(question.num_choices):
                    yield index, delta
        return
    queue: asyncio.Queue[Indexed | BaseException | None] = asyncio.Queue()

    async def read(index: int, request: AnswerRequest) -> None:
        try:
            async with aclosing(answer(request)) as deltas:
                async for delta in deltas:
                    queue.put_nowait((index, delta))
            queue.put_nowait(None)
        except Exception as error:  # whatever it is: the reader of the queue raises it
            queue.put_nowait(error)

    tasks = [asyncio.create_task(read(index, request)) for index, request in enumerate(question.requests)]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def whole_reply(
    question: Question, first: Indexed, rest: AsyncGenerator[Indexed, None], visit: Visit
) -> dict[str, Any]:
    """The JSON of a `chat.completion`."""
    deltas: list[list[AnswerDelta]] = [[] for _ in range(question.num_choices)]
    try:
        async with aclosing(_all_of(first, rest)) as every:
            async for index, delta in every:
                question.writer.saw(index, delta)
                deltas[index].append(delta)
    finally:
        _count(question, visit)
    return question.writer.whole(deltas).model_dump(mode="json")


async def event_stream(
    question: Question, first: Indexed, rest: AsyncGenerator[Indexed, None], visit: Visit, *, include_usage: bool
) -> AsyncGenerator[str, None]:
    """The server-sent events. A failure in mid-stream becomes an error event: the status line is long gone."""
    writer = question.writer
    async with aclosing(_all_of(first, rest)) as deltas:
        try:
            async for index, delta in deltas:
                is_first = writer.saw(index, delta)
                if is_first or delta.text or delta.logprobs:
                    yield _event(chunk_json(writer.chunk(index, delta, is_first=is_first), with_usage=include_usage))
                if delta.finish_reason is not None:
                    yield _event(chunk_json(writer.end(index, delta), with_usage=include_usage))
        except Exception as error:  # whatever it is: a stream that just ends would look like a whole answer
            logger.exception("a stream broke off")
            body = error_body(error)[1]
            visit.refusal = body["error"]["code"]
            yield _event(body)
            return
        finally:
            _count(question, visit)
    if include_usage:
        yield _event(chunk_json(writer.usage_chunk(), with_usage=True))
    yield "data: [DONE]\n\n"


async def _all_of(first: Indexed, rest: AsyncGenerator[Indexed, None]) -> AsyncGenerator[Indexed, None]:
    async with aclosing(rest) as others:
        yield first
        async for one in others:
            yield one


def _count(question: Question, visit: Visit) -> None:
    usage = question.writer.usage()
    visit.num_prompt_tokens, visit.num_tokens = usage.prompt_tokens, usage.completion_tokens
    visit.timings = question.writer.timings()


def _event(payload: dict[str, Any]) -> str:
    return f"data: {json.dumps(payload, ensure_ascii=False)}\n\n"


def _params(config: ServeConfig, body: ChatCompletionRequest) -> SamplingParams:
    return SamplingParams(
        max_tokens=body.token_limit or config.default_max_tokens,
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        seed=body.seed or 0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items()),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def _choices(request: AnswerRequest, num_choices: int) -> list[AnswerRequest]:
    """One request per choice with a seed of its own; greedy choices are all the same and are answered once."""
    if request.params.temperature == 0:
        return [request]
    choices = [request]
    for index in range(1, num_choices):
        digest = hashlib.sha256(f"{request.params.seed}/{index}".encode()).digest()
        params = replace(request.params, seed=int.from_bytes(digest[:8]))
        choices.append(replace(request, request_id=f"{request.request_id}-{index}", params=params))
    return choices
