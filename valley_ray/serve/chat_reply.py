"""OpenAI's replies: models of `chat.completion` and `chat.completion.chunk`, and how deltas of answers become them."""

import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from valley_ray.engine.engine import FinishReason
from valley_ray.serve.protocol import AnswerDelta, Timings, TokenChance, TokenLogprob


class Reply(BaseModel):
    """Base of what goes out."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Alternative(Reply):
    """A token that could stand at a position."""

    token: str
    logprob: float
    bytes: list[int] | None
    """UTF-8 of the token; None where the tokenizer has no bytes for it."""


class TokenDetail(Alternative):
    """A token of an answer."""

    top_logprobs: list[Alternative]
    """The likeliest tokens at this position, likeliest first."""


class ChoiceLogprobs(Reply):
    """Log probabilities of an answer's tokens."""

    content: list[TokenDetail]
    refusal: None = None


class PromptDetails(Reply):
    """More about a prompt."""

    cached_tokens: int
    """Tokens that were not computed anew, because an earlier prompt began in the same way."""


class Usage(Reply):
    """Token counts: the prompt once, the new tokens of every choice."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class AnswerMessage(Reply):
    """An answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(Reply):
    """One answer of several."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Reply):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    """Unix time, seconds."""
    model: str
    choices: list[Choice]
    usage: Usage


class ChunkDelta(Reply):
    """What a chunk adds to an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Reply):
    """What a chunk says about one answer."""

    index: int
    delta: ChunkDelta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(Reply):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    """Unix time, seconds."""
    model: str
    choices: list[ChunkChoice]
    """One; none in the chunk with the token counts."""
    usage: Usage | None = None
    """In the last chunk, where `stream_options.include_usage` asked for it."""


class ReplyWriter:
    """Writes the replies to one request with `num_choices` answers.

    Args:
        logprobs: whether the client asked for them.
    """

    def __init__(self, completion_id: str, model: str, *, num_choices: int, logprobs: bool) -> None:
        self._head: dict[str, Any] = {"id": completion_id, "created": int(time.time()), "model": model}
        self._last: list[AnswerDelta | None] = [None] * num_choices
        self._logprobs = logprobs

    def saw(self, index: int, delta: AnswerDelta) -> bool:
        """Keep the counts of a choice's newest delta; True for its first."""
        is_first = self._last[index] is None
        self._last[index] = delta
        return is_first

    def usage(self) -> Usage:
        """Counts of what was seen so far."""
        seen = [last for last in self._last if last is not None]
        num_prompt = max((last.num_prompt_tokens for last in seen), default=0)
        num_new = sum(last.num_tokens for last in seen)
        details = PromptDetails(cached_tokens=min((last.num_cached_tokens for last in seen), default=0))
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_new,
            total_tokens=num_prompt + num_new,
            prompt_tokens_details=details,
        )

    def timings(self) -> Timings | None:
        """Of the answer that took longest, among those that have ended."""
        ended = [last.timings for last in self._last if last is not None and last.timings is not None]
        return max(ended, key=lambda one: (one.first_token or 0.0) + (one.answer or 0.0), default=None)

    def whole(self, answers: Sequence[Sequence[AnswerDelta]]) -> ChatCompletion:
        """The reply that is no stream; `answers` holds the deltas of each choice."""
        return ChatCompletion(
            **self._head, choices=[self._choice(i, deltas) for i, deltas in enumerate(answers)], usage=self.usage()
        )

    def chunk(self, index: int, delta: AnswerDelta, *, is_first: bool) -> ChatCompletionChunk:
        """The event of one delta; the role comes with a choice's first."""
        said = ChunkDelta(role="assistant" if is_first else None, content=delta.text)
        choice = ChunkChoice(index=index, delta=said, logprobs=self._details(delta.logprobs))
        return ChatCompletionChunk(**self._head, choices=[choice])

    def end(self, index: int, delta: AnswerDelta) -> ChatCompletionChunk:
        """The event that says why a choice ended."""
        choice = ChunkChoice(index=index, delta=ChunkDelta(), finish_reason=delta.finish_reason)
        return ChatCompletionChunk(**self._head, choices=[choice])

    def usage_chunk(self) -> ChatCompletionChunk:
        """The event with the token counts."""
        return ChatCompletionChunk(**self._head, choices=[], usage=self.usage())

    def _choice(self, index: int, deltas: Sequence[AnswerDelta]) -> Choice:
        reason = deltas[-1].finish_reason
        assert reason is not None, "the last delta of an answer has a finish reason"
        message = AnswerMessage(content="".join(delta.text for delta in deltas))
        tokens = [token for delta in deltas for token in delta.logprobs]
        return Choice(index=index, message=message, logprobs=self._details(tokens), finish_reason=reason)

    def _details(self, tokens: Sequence[TokenLogprob]) -> ChoiceLogprobs | None:
        return ChoiceLogprobs(content=[_detail(token) for token in tokens]) if self._logprobs else None


def chunk_json(chunk: ChatCompletionChunk, *, with_usage: bool) -> dict[str, Any]:
    """A chunk as OpenAI sends it: a delta has only what it adds; `usage` (null but in the last) only where asked."""
    event = chunk.model_dump(mode="json")
    for choice in event["choices"]:
        choice["delta"] = {name: value for name, value in choice["delta"].items() if value is not None}
    if not with_usage:
        del event["usage"]
    return event


def _detail(token: TokenLogprob) -> TokenDetail:
    top = [Alternative(**_alternative(one)) for one in token.top]
    return TokenDetail(**_alternative(token), top_logprobs=top)


def _alternative(token: TokenChance) -> dict[str, Any]:
    utf8 = None if token.utf8 is None else list(token.utf8)
    return {"token": token.text, "logprob": token.logprob, "bytes": utf8}
