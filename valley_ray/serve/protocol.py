"""The dataclasses handed between deployments. What comes in and goes out over HTTP: chat_request.py, chat_reply.py."""

from dataclasses import dataclass
from typing import Any, Literal

import ray
from pydantic import ValidationError

from valley_ray.chat.conversation import Conversation, MediaKind
from valley_ray.engine.engine import FinishReason, SamplingParams
from valley_ray.errors import SamplingError
from valley_ray.media.sampling import FrameSampling


@dataclass(frozen=True)
class FrameWish:
    """What a request says about the frames of a video; None: the server's default."""

    num_frames: int | None = None
    fps: float | None = None
    start_s: float | None = None
    end_s: float | None = None

    def over(self, default: FrameSampling) -> FrameSampling:
        """`default` with what is wished; raises SamplingError where the two form no window."""
        values: dict[str, Any] = default.model_dump()
        if self.num_frames is not None or self.fps is not None:
            values |= {"num_frames": self.num_frames, "fps": self.fps}
        if self.start_s is not None or self.end_s is not None:
            values |= {"start_s": self.start_s, "end_s": self.end_s}
        try:
            return FrameSampling(**values)
        except ValidationError as error:
            raise SamplingError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from error


@dataclass(frozen=True)
class MediaRef:
    """Which media, and where its bytes are: exactly one of `path` and `data`."""

    key: str
    """Stable identity of the content (`valley_ray.fetch.media_key`)."""
    kind: MediaKind
    name: str
    """How errors call it."""
    path: str | None = None
    """A file that the samplers can open."""
    data: "ray.ObjectRef[bytes] | None" = None
    """The file's bytes in the object store; they cross once, straight to the sampler that decodes them."""


@dataclass(frozen=True)
class AnswerRequest:
    """What the ingress hands to a decoder."""

    request_id: str
    conversation: Conversation
    media: tuple[MediaRef, ...]
    """One per mark of the conversation, in order."""
    frames: tuple[FrameWish, ...]
    """One per piece of media: which frames of it."""
    params: SamplingParams
    fit_max_tokens: bool
    """The client named no limit: lower `max_tokens` to what fits."""
    stream: bool
    """Deltas as they become certain, or few; the last one is the answer's end in any case."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, beside the model's own."""
    adapter: str | None = None
    """By its name in the configuration; None: the model alone."""
    answered: tuple[int, ...] = ()
    """Tokens of the answer that the client has, from a decoder that ended: the next one goes on behind them."""
    answered_with: str = ""
    """The weights version that made them; "": there are none."""
    sent_at: float | None = None
    """When the ingress passed it on, Unix time in seconds by the ingress's clock."""


@dataclass(frozen=True)
class TokenChance:
    """A token that may stand at a position, and how likely it is."""

    text: str
    utf8: bytes | None
    """The token's own bytes, perhaps a part of a character; None where the tokenizer does not tell."""
    logprob: float


@dataclass(frozen=True)
class TokenLogprob(TokenChance):
    """A token of an answer."""

    top: tuple[TokenChance, ...] = ()
    """The likeliest tokens at its position, likeliest first."""


MediaCache = Literal["decoder", "encoder", "sampler", "none"]
"""Whose cache had what was needed of some media, or was just getting it; none: it was decoded and encoded anew."""


@dataclass(frozen=True)
class Timings:
    """Where the time of an answer went, seconds; None: the stage did not run for it."""

    queue: float | None = None
    """From the ingress to a decoder; None where it went on with what another one had begun."""
    media: float | None = None
    """Until the decoder had the visual tokens of all media; decoding and encoding are parts of it."""
    decode: float | None = None
    """A sampler decoded; of several media the longest."""
    encode: float | None = None
    """An encoder encoded, waiting for its batch included; of several media the longest."""
    prefill: float | None = None
    """From the engine's door to the first token, waiting for a place included."""
    first_token: float | None = None
    """From the decoder's beginning to the first token."""
    answer: float | None = None
    """From the first token to the last."""
    cache: MediaCache | None = None
    """Of several media the one that cost most; None without media."""


@dataclass(frozen=True)
class AnswerDelta:
    """A piece of an answer; the last one has a finish reason."""

    text: str
    num_prompt_tokens: int
    num_tokens: int
    """New tokens so far, the stop token included."""
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """The tokens since the last delta (without the stop token), where the request asked for them. Text may come a
    delta later than its tokens do."""
    num_cached_tokens: int = 0
    """Prompt tokens that were not computed anew."""
    token_ids: tuple[int, ...] = ()
    """The tokens since the last delta."""
    version: str = ""
    """Of the weights that made them."""
    timings: Timings | None = None
    """Of the whole answer, with its last delta."""
