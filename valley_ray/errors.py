"""The ValleyError tree: one class per kind of user mistake.

Every error a user can cause is raised as one of these. The message is one line that says what was expected, what came
and what to do; `code` is the stable machine-readable name that tables and HTTP replies carry.
"""

from typing import ClassVar


class ValleyError(Exception):
    """A user's mistake; the root of the tree. CLI exit code 2, HTTP status `http_status`."""

    code: ClassVar[str] = "valley_error"
    http_status: ClassVar[int] = 400


class ConfigError(ValleyError):
    """A configuration file, override or option that cannot be used."""

    code = "invalid_config"


class PortInUseError(ConfigError):
    """A server was asked to listen on a port that somebody else has."""

    code = "port_in_use"


class FetchError(ValleyError):
    """Bytes could not be fetched from a locator."""

    code = "fetch_failed"


class SourceNotFoundError(FetchError):
    """The file or object named by a locator does not exist."""

    code = "source_not_found"


class SourceNotAllowedError(FetchError):
    """The fetch policy forbids this locator (scheme, host or folder)."""

    code = "source_not_allowed"


class SourceTooLargeError(FetchError):
    """More bytes than the fetch policy takes."""

    code = "source_too_large"


class SourceRefusedError(FetchError):
    """A server that will not hand the object out (401, 403, another 4xx); asking again changes nothing."""

    code = "source_refused"


class ContentMismatchError(FetchError):
    """Bytes whose number or digest is not the one that was asked for."""

    code = "content_mismatch"


class TransientFetchError(FetchError):
    """A failure that may pass: worth another try after a pause. Subclasses name the reason."""

    code = "fetch_interrupted"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """The pause that the server asks for, seconds."""


class FetchInterruptedError(TransientFetchError):
    """No connection, or one that ended before the last byte."""

    code = "fetch_interrupted"


class FetchTimeoutError(TransientFetchError):
    """A server that went silent, or a download that took longer than it may."""

    code = "fetch_timeout"


class ServerBusyError(TransientFetchError):
    """Status 408, 425, 429 or 5xx."""

    code = "server_busy"


class StorageError(ValleyError):
    """The disk that results go to is full or cannot be written."""

    code = "storage_failed"


class MediaError(ValleyError):
    """A media file that yields no frames; subclasses name the reason."""

    code = "media_error"


class EmptyMediaError(MediaError):
    """A file of zero bytes."""

    code = "media_empty"


class NotMediaError(MediaError):
    """Bytes that no decoder recognises as video or image."""

    code = "media_not_recognised"


class NoVideoStreamError(MediaError):
    """A container without a video stream (audio only, data only)."""

    code = "media_no_video_stream"


class TruncatedMediaError(MediaError):
    """A file that shows less than its container promises."""

    code = "media_truncated"


class CorruptMediaError(MediaError):
    """A recognised file whose frames do not decode."""

    code = "media_corrupt"


class MediaLimitError(MediaError):
    """A file whose header asks for more pixels, streams or seconds than the limits allow."""

    code = "media_over_limit"


class DecodeTimeoutError(MediaError):
    """Decoding took longer than the sandbox allows; the child was killed."""

    code = "decode_timeout"


class DecodeMemoryError(MediaError):
    """Decoding needed more memory than the sandbox allows."""

    code = "decode_memory"


class DecodeCrashError(MediaError):
    """The decoder crashed its process."""

    code = "decode_crash"


class DecodeWorkerError(MediaError):
    """The worker process itself died each time the file was decoded."""

    code = "decode_worker_died"


class SamplingError(ValleyError):
    """A frame-sampling request that cannot be met (window outside the clip, frame count out of range)."""

    code = "invalid_sampling"


class ConversationError(ValleyError):
    """Messages that do not form a conversation (unknown role, visual token without media, empty content)."""

    code = "invalid_conversation"


class PromptTooLongError(ConversationError):
    """A prompt that does not fit the context length of the model."""

    code = "prompt_too_long"


class CheckpointError(ValleyError):
    """A model folder that cannot be opened; the message names file and key."""

    code = "invalid_checkpoint"


class DataError(ValleyError):
    """A table, record or shard that breaks its schema."""

    code = "invalid_data"


class FeatureRangeError(DataError):
    """Features that the number format they are stored in cannot hold."""

    code = "features_out_of_range"


class TrainingError(ValleyError):
    """A training run that cannot start or go on (too little data, non-finite loss)."""

    code = "training_failed"


class PreemptedError(TrainingError):
    """A node is about to be taken away: this attempt of a training has ended behind a committed checkpoint."""

    code = "training_preempted"


class AnswerWorkerError(ValleyError):
    """The worker process died each time the question was answered."""

    code = "answer_worker_died"


class OverloadedError(ValleyError):
    """No capacity right now; try again after a pause."""

    code = "overloaded"
    http_status = 429


class UnavailableError(ValleyError):
    """A part of the server is down or starting; try again after a pause."""

    code = "unavailable"
    http_status = 503


class ReplicaDiedError(UnavailableError):
    """The replica that worked on a call ended before it was done; another one can be asked."""


class OtherWeightsError(UnavailableError):
    """A replica of other weights than the caller's was asked, while a redeploy replaces one after the other."""


class ReplicaCrashError(UnavailableError):
    """What was asked ended two replicas that worked on it; it is not given to a third one."""

    code = "replica_crashed"


class UnknownModelError(ValleyError):
    """A request names a model that this server does not serve."""

    code = "model_not_found"
    http_status = 404
