"""One media file in a bucket → its bytes, for whoever decodes it. The fetch policy knows paths, data: and http(s)."""

from valley_ray.data.sources.files import BUCKET_SCHEMES, filesystem_of, scheme_of, shown
from valley_ray.errors import (
    DataError,
    FetchError,
    FetchInterruptedError,
    SourceNotAllowedError,
    SourceNotFoundError,
    SourceTooLargeError,
)


def is_object(uri: str) -> bool:
    """Whether `uri` names a file in a bucket that `read_object` reads."""
    return scheme_of(uri) in BUCKET_SCHEMES


def read_object(uri: str, *, max_bytes: int) -> bytes:
    """The bytes of a file in a bucket, with the credentials of this process's environment.

    Raises:
        SourceNotFoundError: there is no such object.
        SourceTooLargeError: it has more than `max_bytes`.
        SourceNotAllowedError: another scheme, or a chain of them: a record could reach any host by that.
        FetchError: a folder, or a store that refuses or breaks off.
    """
    if not is_object(uri) or "::" in uri:
        raise SourceNotAllowedError(f"{shown(uri)}: media are read from {', '.join(BUCKET_SCHEMES)}, paths and http(s)")
    try:
        filesystem, path = filesystem_of(uri)
        entry = filesystem.info(path)
        if entry["type"] == "directory":
            raise FetchError(f"{shown(uri)}: a folder in a bucket cannot be decoded; copy it, or name its files")
        if (entry["size"] or 0) > max_bytes:
            raise SourceTooLargeError(f"{shown(uri)}: {entry['size']} bytes are more than {max_bytes=}")
        with filesystem.open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SourceNotFoundError(f"{shown(uri)}: there is no such object") from error
    except (OSError, DataError) as error:
        raise FetchInterruptedError(f"{shown(uri)}: {' '.join(str(error).split())[:200]}") from error
    if len(content) > max_bytes:
        raise SourceTooLargeError(f"{shown(uri)}: more than {max_bytes=}")
    return bytes(content)
