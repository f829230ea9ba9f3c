"""DeltaWriter: tokens of one answer → its deltas, as text becomes certain; also behind tokens that were sent before."""

from valley_ray.answering import open_text_stream
from valley_ray.engine.engine import FinishReason, SamplingParams, TokenEvent
from valley_ray.processor import ValleyProcessor
from valley_ray.serve.answer_watch import AnswerWatch
from valley_ray.serve.protocol import AnswerDelta, AnswerRequest, TokenLogprob
from valley_ray.serve.token_text import token_logprob, token_text

_MOST_UNSENT = 32
"""Tokens that an answer which is not streamed may lose, and make anew, where its replica ends."""


class DeltaWriter:
    """Takes one token after the other.

    Args:
        request: what is answered; the tokens of `answered` are in front of the new ones.
        num_prompt_tokens: of the prompt alone.
        version: of the weights, as deltas tell it.
    """

    def __init__(
        self,
        request: AnswerRequest,
        processor: ValleyProcessor,
        params: SamplingParams,
        *,
        num_prompt_tokens: int,
        version: str,
    ) -> None:
        self._processor, self._params, self._is_stream = processor, params, request.stream
        self._num_prompt_tokens, self._version = num_prompt_tokens, version
        self._stream = open_text_stream(processor, params, request.stop)
        self._text, self._num_tokens = "", len(request.answered)
        self._logprobs, self._token_ids = list[TokenLogprob](), list[int]()
        self._before: int | None = None
        for index, token in enumerate(request.answered):
            self._stream.push(TokenEvent("", token, index))
            if params.logprobs is not None and token_text(processor, token, self._before)[1] is not None:
                self._before = token

    @property
    def stopped(self) -> bool:
        """A stop string came: whatever follows is no part of the answer."""
        return self._stream.stopped

    def push(self, event: TokenEvent, watch: AnswerWatch) -> AnswerDelta | None:
        """What can be told with this token; `watch` learns about the last one."""
        self._num_tokens += 1
        self._token_ids.append(event.token_id)
        self._text += self._stream.push(event)
        if event.logprob is not None and event.token_id not in self._params.stop_token_ids:
            self._logprobs.append(token_logprob(self._processor, event, self._before))
            self._before = event.token_id if self._logprobs[-1].utf8 is not None else self._before
        reason: FinishReason | None = "stop" if self.stopped else event.finish_reason
        # The first token tells the ingress that this request breaks no replica.
        is_due = (self._is_stream and self._text) or self._num_tokens == 1 or len(self._token_ids) >= _MOST_UNSENT
        if reason is None and not is_due:
            return None
        delta = AnswerDelta(
            self._text,
            self._num_prompt_tokens,
            self._num_tokens,
            reason,
            tuple(self._logprobs),
            min(event.num_cached_tokens, self._num_prompt_tokens),
            token_ids=tuple(self._token_ids),
            version=self._version,
            timings=None if reason is None else watch.ends(reason),
        )
        self._text, self._logprobs, self._token_ids = "", [], []
        return delta
