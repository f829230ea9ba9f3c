"""The body of `POST /v1/chat/completions`: OpenAI's schema, with what Valley asks about videos.

The schema is closed and strict: a field that would change the answer and is not supported is refused by name, and
``"5"`` is no number. Fields that OpenAI clients may send and that change nothing about an answer are taken and ignored:
`user`, `metadata`, `store`, `service_tier`, `safety_identifier`, `prompt_cache_key`, `parallel_tool_calls`, a message's
`name`, an image's `detail`, and what the client gets as an assistant's message and sends back. Fields whose "off" value
clients may spell out (empty `tools`, `response_format: text`, ...) are taken at that value alone.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator


class Schema(BaseModel):
    """Base of everything that comes in as JSON: frozen, closed and strict."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class FrameFields(Schema):
    """Which frames of a video are looked at; what is not said stays the server's default."""

    num_frames: int | None = Field(default=None, ge=1)
    """Frames taken from the video. Not in OpenAI's schema."""
    fps: float | None = Field(default=None, gt=0, le=1000, allow_inf_nan=False)
    """Frames per second taken from the video, instead of `num_frames`. Not in OpenAI's schema."""
    start_s: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Where to begin, seconds after the video's first frame. Not in OpenAI's schema."""
    end_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Where to end (exclusive), seconds after the video's first frame. Not in OpenAI's schema."""

    @model_validator(mode="after")
    def _check_frames(self) -> "FrameFields":
        if self.num_frames is not None and self.fps is not None:
            raise ValueError("send num_frames or fps, not both")
        if self.start_s is not None and self.end_s is not None and self.end_s <= self.start_s:
            raise ValueError(f"end_s must be after start_s, got start_s={self.start_s} end_s={self.end_s}")
        return self

    @property
    def frames(self) -> dict[str, int | float]:
        """What is said, by name."""
        return self.model_dump(include=set(FrameFields.model_fields), exclude_none=True)


class MediaUrl(Schema):
    """Where media is: a data: URI, the id of an uploaded file, an http(s) URL of one of the server's `allow_hosts`, or
    a path or file:// URI under one of its `allow_roots`."""

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high", "original"] | None = None
    """Ignored."""


class VideoUrl(MediaUrl, FrameFields):
    """A video, and which of its frames."""


class TextPart(Schema):
    """Text inside a message."""

    type: Literal["text"]
    text: str


class VideoPart(FrameFields):
    """A video inside a message; its frames may be named here or beside the URL."""

    type: Literal["video_url"]
    video_url: VideoUrl

    @model_validator(mode="after")
    def _check_once(self) -> "VideoPart":
        if self.frames and self.video_url.frames:
            raise ValueError("name the frames beside type or beside url, not both")
        return self


class ImagePart(Schema):
    """An image inside a message."""

    type: Literal["image_url"]
    image_url: MediaUrl


class FileId(Schema):
    """An uploaded file."""

    file_id: str = Field(min_length=1)


class FilePart(FrameFields):
    """An uploaded image or video inside a message, told apart by the type of its content."""

    type: Literal["file"]
    file: FileId


ContentPart = Annotated[TextPart | VideoPart | ImagePart | FilePart, Field(discriminator="type")]
MediaContent = VideoPart | ImagePart | FilePart


def _form_of_content(content: object) -> str:
    return "string" if isinstance(content, str) else "parts"


class ChatMessage(Schema):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    """developer: OpenAI's newer name of system."""
    content: Annotated[
        Annotated[str, Tag("string")] | Annotated[list[ContentPart], Tag("parts")], Discriminator(_form_of_content)
    ]
    name: str | None = None
    """Ignored."""

    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


class StreamOptions(Schema):
    """What a stream carries beside text."""

    include_usage: bool = False
    """A last chunk with the token counts."""
    include_obfuscation: bool | None = None
    """Ignored."""


class ResponseFormat(Schema):
    """Plain text is the only form."""

    type: Literal["text"]


MAX_STOPS = 4
"""As OpenAI's API."""
MAX_TOP_LOGPROBS = 20
"""As OpenAI's API."""

MAX_BIASES = 300
"""As OpenAI's API."""
MAX_TOP_K = 2**31 - 1
"""More tokens than any vocabulary has, as a number that tensors hold."""

TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
_Off = Annotated[list[Any], Field(max_length=0)] | None


class ChatCompletionRequest(FrameFields):
    """A question; `num_frames`, `fps`, `start_s` and `end_s` are meant for every video that says nothing itself."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """OpenAI's newer name of `max_tokens`."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    """None and 0: greedy. OpenAI's own default of 1 is for essays; questions about a video have an answer."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=MAX_TOP_K)
    """0: off. Not in OpenAI's schema."""
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = None
    """None: 0. The same request gives the same answer on any replica."""
    n: int | None = Field(default=None, ge=1)
    """Answers to the question. The first is the one that n = 1 gives; greedy ones are all the same."""
    logprobs: bool | None = None
    """The log probability of every token of the answer."""
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    """Likeliest tokens at every position; needs `logprobs`."""
    stop: (
        Annotated[
            Annotated[StopText, Tag("string")] | Annotated[list[StopText], Field(max_length=MAX_STOPS), Tag("list")],
            Discriminator(lambda stop: "string" if isinstance(stop, str) else "list"),
        ]
        | None
    ) = None
    """Texts that end the answer where they begin, beside the model's own."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=MAX_BIASES)] | None = None
    """Token id → what is added to its logit."""

    tools: _Off = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: _Off = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    response_format: ResponseFormat | None = None

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> "ChatCompletionRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("send max_tokens or max_completion_tokens, not both")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def token_limit(self) -> int | None:
        """The most new tokens the client wants."""
        return self.max_tokens or self.max_completion_tokens

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
