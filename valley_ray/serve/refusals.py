"""What the HTTP front itself refuses: keys, rates, origins, uploads. Each brings its HTTP status and code."""

from collections.abc import Mapping

from valley_ray.errors import StorageError, ValleyError


class UnauthorizedError(ValleyError):
    """No API key, or one that this server does not know."""

    code = "invalid_api_key"
    http_status = 401


class ForbiddenOriginError(ValleyError):
    """A web page of an origin that is not on the allow list."""

    code = "origin_not_allowed"
    http_status = 403


class RateLimitError(ValleyError):
    """A key that has used up its requests or tokens, or has too many requests running."""

    code = "rate_limit_exceeded"
    http_status = 429

    def __init__(self, message: str, *, retry_after_s: float, headers: Mapping[str, str]) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """When another try can succeed, seconds."""
        self.headers = headers
        """OpenAI's x-ratelimit headers."""


class OverLimitError(ValleyError):
    """A field of a request that asks for more than this server allows."""

    code = "over_limit"

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param
        """The field."""


class RequestTooLargeError(ValleyError):
    """A body, upload or choice of media larger than the server takes."""

    code = "request_too_large"
    http_status = 413


class RequestTimeoutError(ValleyError):
    """A body that stops arriving, or takes too long."""

    code = "request_timeout"
    http_status = 408


class UploadError(ValleyError):
    """A body that is no multipart upload of one file with a purpose."""

    code = "invalid_upload"


class UploadStorageError(StorageError):
    """The disk of the uploads is full or cannot be written."""

    http_status = 507


class UnknownFileError(ValleyError):
    """A file id that does not exist, has expired, or belongs to another key."""

    code = "file_not_found"
    http_status = 404
