"""The HTTP schema (OpenAI chat completions) and the dataclasses handed between deployments.

The schema is closed: a field that would change the answer and is not supported is refused by name. Fields that OpenAI
clients may send and that change nothing about an answer are taken and ignored: `user`, `metadata`, `store`,
`service_tier`, `safety_identifier`, `prompt_cache_key`, a message's `name`, an image's `detail`. Fields whose "off"
value clients may spell out (`n: 1`, zero penalties, ...) are taken at that value alone.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import ray
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from valley_ray.chat.conversation import Conversation, MediaKind
from valley_ray.engine.engine import FinishReason, SamplingParams
from valley_ray.media.sampling import FrameSampling


class Schema(BaseModel):
    """Base of everything that comes in over HTTP: frozen and closed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class MediaUrl(Schema):
    """Where media is: a data: URI, or a path or file:// URI under one of the server's `allow_roots`."""

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] | None = None
    """Ignored."""


class TextPart(Schema):
    """Text inside a message."""

    type: Literal["text"]
    text: str


class VideoPart(Schema):
    """A video inside a message."""

    type: Literal["video_url"]
    video_url: MediaUrl


class ImagePart(Schema):
    """An image inside a message."""

    type: Literal["image_url"]
    image_url: MediaUrl


ContentPart = Annotated[TextPart | VideoPart | ImagePart, Field(discriminator="type")]


def _form_of_content(content: object) -> str:
    return "string" if isinstance(content, str) else "parts"


class ChatMessage(Schema):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("string")] | Annotated[list[ContentPart], Tag("parts")], Discriminator(_form_of_content)
    ]
    name: str | None = None
    """Ignored."""


class StreamOptions(Schema):
    """What a stream carries beside text."""

    include_usage: bool = False
    """A last chunk with the token counts."""


class ResponseFormat(Schema):
    """Plain text is the only form."""

    type: Literal["text"]


MAX_STOPS = 4
"""As OpenAI's API."""

StopText = Annotated[str, Field(min_length=1, max_length=1000)]


class ChatCompletionRequest(Schema):
    """Body of `POST /v1/chat/completions`."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """OpenAI's newer name of `max_tokens`."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    """None and 0: greedy. OpenAI's own default of 1 is for essays; questions about a video have an answer."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    """0: off. Not in OpenAI's schema."""
    seed: int | None = None
    """None: 0. The same request gives the same answer on any replica."""
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    """Texts that end the answer where they begin, beside the model's own."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    num_frames: int | None = Field(default=None, ge=1)
    """Frames taken from each video. Not in OpenAI's schema."""
    fps: float | None = Field(default=None, gt=0, le=1000, allow_inf_nan=False)
    """Frames per second taken from each video, instead of `num_frames`. Not in OpenAI's schema."""

    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    response_format: ResponseFormat | None = None

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "ChatCompletionRequest":
        if self.num_frames is not None and self.fps is not None:
            raise ValueError("send num_frames or fps, not both")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("send max_tokens or max_completion_tokens, not both")
        return self

    @property
    def token_limit(self) -> int | None:
        """The most new tokens the client wants."""
        return self.max_tokens or self.max_completion_tokens

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


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
    sampling: FrameSampling | None
    """None: the server's default."""
    params: SamplingParams
    fit_max_tokens: bool
    """The client named no limit: lower `max_tokens` to what fits."""
    stream: bool
    """Deltas as they become certain, or one at the end."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, beside the model's own."""


@dataclass(frozen=True)
class AnswerDelta:
    """A piece of an answer; the last one has a finish reason."""

    text: str
    num_prompt_tokens: int
    num_tokens: int
    """New tokens so far, the stop token included."""
    finish_reason: FinishReason | None = None
