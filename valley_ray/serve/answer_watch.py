"""AnswerWatch: times and counts one answer while a decoder makes it. Metrics get a value per answer and per second of
it; a token costs a look at the clock. Knows neither tokens nor text."""

import time
from types import TracebackType

from valley_ray.engine.engine import FinishReason
from valley_ray.errors import ValleyError
from valley_ray.serve import metrics
from valley_ray.serve.protocol import MediaCache, Timings

_COUNT_EVERY_S = 1.0
"""New tokens of a long answer are counted this often, so that tokens per second do not come in lumps."""
_COSTS: tuple[MediaCache, ...] = ("decoder", "encoder", "sampler", "none")


class AnswerWatch:
    """A context: begins with the request, ends with it, however that may be.

    Args:
        model: as requests name it.
        sent_at: when the ingress passed the request on, Unix time; None: not known.
    """

    def __init__(self, model: str, sent_at: float | None) -> None:
        self._model, self._began = model, time.monotonic()
        # Clocks of two machines may differ.
        self._queue = None if sent_at is None else max(0.0, time.time() - sent_at)
        self._media: float | None = None
        self._decode: float | None = None
        self._encode: float | None = None
        self._cache: MediaCache | None = None
        self._asked: float | None = None
        self._first: float | None = None
        self._last = self._counted_at = self._began
        self._num_new = self._num_counted = 0
        self._reason: FinishReason | None = None

    def __enter__(self) -> "AnswerWatch":
        metrics.STAGE_SECONDS.observe(self._queue, stage="queue")
        return self

    def pulled(self, decode: float | None, encode: float | None) -> None:
        """The visual tokens of a piece of media were not here; what a sampler and an encoder spent on them, seconds."""
        self._decode = _longer(self._decode, decode)
        self._encode = _longer(self._encode, encode)
        cost: MediaCache = "encoder" if encode is None else "sampler" if decode is None else "none"
        self._cache = max(self._cache or "decoder", cost, key=_COSTS.index)

    def has_media(self) -> None:
        """The visual tokens of all media are here."""
        self._media, self._cache = time.monotonic() - self._began, self._cache or "decoder"
        metrics.STAGE_SECONDS.observe(self._media, stage="media")

    def asks_engine(self) -> None:
        """The prompt is at the engine's door."""
        self._asked = time.monotonic()

    def token(self, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """The engine made a token."""
        self._last = now = time.monotonic()
        self._num_new += 1
        if self._first is None:
            assert self._asked is not None, "an engine that was not asked"
            self._first = now
            metrics.STAGE_SECONDS.observe(now - self._asked, stage="prefill")
            metrics.PROMPT_TOKENS.add(num_prompt_tokens, model=self._model)
            metrics.CACHED_PROMPT_TOKENS.add(num_cached_tokens, model=self._model)
        if now - self._counted_at >= _COUNT_EVERY_S:
            self._count()

    def ends(self, reason: FinishReason) -> Timings:
        """The answer is whole."""
        self._reason = reason
        first = self._last if self._first is None else self._first
        return Timings(
            queue=self._queue,
            media=self._media,
            decode=self._decode,
            encode=self._encode,
            prefill=None if self._asked is None else first - self._asked,
            first_token=first - self._began,
            answer=self._last - first,
            cache=self._cache,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._count()
        if self._asked is None or isinstance(error, ValleyError):
            return
        # GeneratorExit and CancelledError, with which readers leave, are no Exceptions.
        ended = self._reason or ("failed" if isinstance(error, Exception) else "abandoned")
        metrics.ANSWERS.add(model=self._model, ended=ended)
        if self._reason is not None and self._first is not None:
            metrics.STAGE_SECONDS.observe(self._last - self._first, stage="answer")
            if self._num_new > 1:
                gap = (self._last - self._first) / (self._num_new - 1)
                metrics.TOKEN_GAP_SECONDS.observe(gap, model=self._model)

    def _count(self) -> None:
        metrics.NEW_TOKENS.add(self._num_new - self._num_counted, model=self._model)
        self._num_counted, self._counted_at = self._num_new, time.monotonic()


def _longer(one: float | None, other: float | None) -> float | None:
    return max((seconds for seconds in (one, other) if seconds is not None), default=None)
