"""A locator (local path, file: or data: URI, http(s) URL) becomes a file path or bytes, inside a network policy.

Every limit is enforced while bytes arrive. Knows nothing of what the bytes mean.
"""

import base64
import binascii
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from pydantic import Field

from valley_ray.config import Config
from valley_ray.errors import FetchError, SourceNotAllowedError, SourceNotFoundError, SourceTooLargeError


class FetchPolicy(Config):
    """Where bytes may come from and how many."""

    allow_roots: tuple[Path, ...] | None = None
    """Folders under which local paths are taken, symbolic links resolved; None: any path; empty: none."""
    allow_data_uri: bool = True
    """Take `data:` URIs."""
    allow_hosts: tuple[str, ...] = ()
    """Hosts that http(s) URLs, redirects included, may name; empty: no URLs."""
    allow_private_addresses: bool = False
    """Connect to loopback, private and link-local addresses when an allowed host resolves to one."""
    max_bytes: int = Field(default=2 << 30, ge=1)
    """Largest file, download or decoded data: URI, bytes."""
    timeout_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Wall-clock seconds for one download, redirects included."""
    max_redirects: int = Field(default=5, ge=0)
    """Redirects that one download may follow."""


@dataclass(frozen=True)
class Fetched:
    """What a locator led to."""

    name: str
    """Short name for messages."""
    source: Path | bytes
    """A local path (resolved), or the bytes."""
    size_bytes: int
    """Bytes of the file or of all files of the folder."""
    etag: str | None
    """What changes when the content does: modification time of a file, the server's ETag; None for data: URIs."""


LocatorKind = Literal["path", "file", "data", "http", "bucket"]


def fetch(locator: str, policy: FetchPolicy) -> Fetched:
    """Fetch what `locator` names.

    Raises:
        SourceNotAllowedError: the policy forbids the scheme, host, address or folder.
        SourceNotFoundError: there is no such file or object.
        SourceTooLargeError: more than `policy.max_bytes`.
        FetchError: a malformed data: URI, or a download that failed or took too long.
    """
    kind = locator_kind(locator)
    if kind == "data":
        return _fetch_data_uri(locator, policy)
    if kind == "http":
        return _fetch_http(locator, policy)
    if kind == "bucket":
        raise SourceNotAllowedError(
            f"{shorten(locator)}: bucket locators are not taken here; give a path, file:, data: or http(s)"
        )
    return _fetch_path(_file_uri_path(locator) if kind == "file" else Path(locator), policy)


def locator_kind(locator: str) -> LocatorKind:
    """Which kind of locator a text is; anything without a known scheme is a local path."""
    scheme = locator[:8].partition(":")[0].lower()
    if scheme in ("data", "file"):
        return "data" if scheme == "data" else "file"
    if scheme in ("http", "https"):
        return "http"
    return "bucket" if "://" in locator[:32] else "path"


def media_key(fetched: Fetched) -> str:
    """Stable identity of media for caches: content digest of bytes; path, size and modification time of files."""
    if isinstance(fetched.source, bytes):
        return "bytes-" + hashlib.sha256(fetched.source).hexdigest()
    identity = f"{fetched.source}\0{fetched.size_bytes}\0{fetched.etag}"
    return "file-" + hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()


def shorten(locator: str) -> str:
    """A locator as messages show it: printable and at most 120 characters."""
    text = locator if len(locator) <= 120 else locator[:100] + f"... ({len(locator)} characters)"
    return text if text.isprintable() else repr(text)


def _fetch_data_uri(locator: str, policy: FetchPolicy) -> Fetched:
    if not policy.allow_data_uri:
        raise SourceNotAllowedError("data: URIs are not taken here; give a path or a URL of an allowed host")
    comma = locator.find(",", 0, 1024)
    media_type, *parameters = locator[len("data:") : comma].split(";") if comma >= 0 else [""]
    name = shorten(f"data:{media_type}")
    if "base64" not in (parameter.strip().lower() for parameter in parameters):
        raise FetchError(f"{name}: a data: URI must read data:<type>;base64,<bytes>")
    num_characters = len(locator) - comma - 1
    if num_characters * 3 // 4 - 2 > policy.max_bytes:
        raise SourceTooLargeError(f"{name}: about {num_characters * 3 // 4} bytes are more than {policy.max_bytes=}")
    try:
        content = base64.b64decode(locator[comma + 1 :].encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise FetchError(f"{name}: not valid base64 ({' '.join(str(error).split())[:120]})") from error
    if len(content) > policy.max_bytes:
        raise SourceTooLargeError(f"{name}: {len(content)} bytes are more than {policy.max_bytes=}")
    return Fetched(name, content, len(content), None)


def _fetch_http(locator: str, policy: FetchPolicy) -> Fetched:
    # Imported here: most runs never download, and `valley-ray --help` should not wait for TLS.
    from valley_ray.fetch_http import download

    content, etag = download(
        locator,
        allow_hosts=policy.allow_hosts,
        allow_private_addresses=policy.allow_private_addresses,
        max_bytes=policy.max_bytes,
        timeout_s=policy.timeout_s,
        max_redirects=policy.max_redirects,
    )
    # The query often is a signature, which neither tables nor messages should carry.
    return Fetched(shorten(locator.partition("?")[0]), content, len(content), etag)


def _file_uri_path(locator: str) -> Path:
    try:
        parts = urlsplit(locator)
    except ValueError as error:
        raise SourceNotFoundError(f"{shorten(locator)}: not a valid file: URI ({error})") from error
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise SourceNotAllowedError(f"{shorten(locator)}: a file: URI must read file:///absolute/path")
    return Path(unquote(parts.path))


def _fetch_path(path: Path, policy: FetchPolicy) -> Fetched:
    name = shorten(str(path))
    if policy.allow_roots is not None and not policy.allow_roots:
        raise SourceNotAllowedError(f"{name}: local paths are not taken here; send a data: URI or an allowed URL")
    try:
        resolved = path.resolve(strict=True)
        status = resolved.stat()
    except (OSError, RuntimeError, ValueError) as error:
        # The same words for what is missing and what lies outside, so that a caller cannot feel out the disk.
        if policy.allow_roots is not None and not _is_lexically_under(path, policy.allow_roots):
            raise _outside(name) from None
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise SourceNotFoundError(f"{name}: cannot be read ({why}); check the path") from error
    if not _is_under(resolved, policy.allow_roots):
        raise _outside(name)
    if stat.S_ISDIR(status.st_mode):
        size_bytes = _folder_size(resolved, policy, name=name)
    elif stat.S_ISREG(status.st_mode):
        size_bytes = status.st_size
    else:
        raise SourceNotAllowedError(f"{name}: neither a file nor a folder; devices and pipes are not read")
    if size_bytes > policy.max_bytes:
        raise SourceTooLargeError(f"{name}: {size_bytes} bytes are more than {policy.max_bytes=}")
    return Fetched(name, resolved, size_bytes, str(status.st_mtime_ns))


def _folder_size(folder: Path, policy: FetchPolicy, *, name: str) -> int:
    """Bytes of its files; a link among them may lead out of the roots, which the folder itself does not show."""
    try:
        files = [child for child in folder.iterdir() if child.is_file()]
        if not all(_is_under(file.resolve(), policy.allow_roots) for file in files):
            raise _outside(name)
        return sum(file.stat().st_size for file in files)
    except OSError as error:
        raise SourceNotFoundError(f"{name}: cannot be read ({error.strerror}); check the path") from error


def _is_under(resolved: Path, roots: tuple[Path, ...] | None) -> bool:
    return roots is None or any(resolved.is_relative_to(root.resolve()) for root in roots)


def _is_lexically_under(path: Path, roots: tuple[Path, ...]) -> bool:
    target = Path(os.path.abspath(path))
    return any(target.is_relative_to(os.path.abspath(root)) or target.is_relative_to(root.resolve()) for root in roots)


def _outside(name: str) -> SourceNotAllowedError:
    return SourceNotAllowedError(
        f"{name}: outside the folders that may be read; move the file there or ask the operator"
    )
