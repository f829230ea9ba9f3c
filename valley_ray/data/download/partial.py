"""Partial files: bytes that have arrived and what is known of the rest, until a file is put in place.

`<file>.part` holds the bytes, `<file>.part.json` how to ask for more of the same; neither has the name of a media file.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from valley_ray.errors import FetchInterruptedError, StorageError


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the bytes of a partial file come from."""

    download_id: str
    validator: str
    """Strong ETag or Last-Modified: what If-Range takes; empty where the server gives none, so nothing is resumed."""


def part_of(path: Path) -> Path:
    """The partial file of `path`."""
    return path.with_name(f"{path.name}.part")


@contextlib.contextmanager
def open_partial(part: Path) -> Iterator[BinaryIO]:
    """Open a partial file for appending, as the only one who does; it is created with its folder.

    Raises:
        FetchInterruptedError: a worker of an earlier run, about to end, still writes it.
        StorageError: the disk is full or not writable.
    """
    with disk_errors(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise FetchInterruptedError(f"{part.name}: another process still writes it; try again") from error
            yield file


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise StorageError, one line, for what the file system refuses inside the block."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"the disk of {path.parent} is full; make room and start again") from error
        raise StorageError(f"{path} cannot be written ({error.strerror or error}); check the folder") from error


def read_origin(part: Path, download_id: str) -> Origin | None:
    """Where the bytes of `part` come from; None where that is another URL or not known."""
    try:
        origin = Origin(**json.loads(_notes(part).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return origin if origin.download_id == download_id else None


def write_origin(part: Path, origin: Origin) -> None:
    """Note where the bytes come from; while the note is missing, bytes are never resumed."""
    _notes(part).write_text(json.dumps(dataclasses.asdict(origin)), encoding="utf-8")


def promote(part: Path, path: Path) -> None:
    """Put a complete file in place, on disk before it has its name."""
    with disk_errors(path):
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        _notes(part).unlink(missing_ok=True)


def discard(part: Path) -> None:
    """Remove a partial file."""
    with disk_errors(part):
        _notes(part).unlink(missing_ok=True)
        part.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _notes(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")
