"""FileStore: uploaded files in one bounded folder, named by their content, each belonging to whoever uploaded it.

    FOLDER/content/<sha256>     bytes, once for equal files
    FOLDER/files/<id>.json      an uploaded file: its record
    FOLDER/incoming/<random>    an upload in progress

No name in the folder ever comes from a client. Processes that share the folder (ingress replicas) see the same files:
all state is on disk, changes are made under a lock file. Knows no HTTP.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import Field

from valley_ray.config import Config
from valley_ray.errors import OverloadedError
from valley_ray.serve.refusals import RequestTooLargeError, UnknownFileError, UploadStorageError

FILE_ID = re.compile(r"file-[0-9a-f]{24}")
_ABANDONED_AFTER_S = 3600.0


class FilesConfig(Config):
    """Uploaded files: where they are kept, how much and for how long."""

    folder: Path = Path("runs/files")
    """Folder of the uploads; samplers open them there, so on several machines it must be a shared one."""
    max_file_bytes: int = Field(default=64 * 2**20, ge=1)
    """Largest upload, bytes; media is taken up to the smaller of this and `max_media_bytes`."""
    max_total_bytes: int = Field(default=2 * 2**30, ge=1)
    """All uploads together, bytes; the ones that were unused for longest make room for new ones."""
    max_files: int = Field(default=1000, ge=1)
    """Most uploaded files, all callers together."""
    max_uploads: int = Field(default=8, ge=1)
    """Most uploads in progress at once; they take room beside `max_total_bytes`."""
    expire_after_s: float | None = Field(default=7 * 86400.0, gt=0)
    """Seconds until an upload expires where it does not say itself; None: never."""


@dataclass(frozen=True)
class StoredFile:
    """An uploaded file."""

    file_id: str
    filename: str
    """As the client called it; for show only."""
    purpose: str
    size_bytes: int
    sha256: str
    created_at: int
    """Unix time, seconds."""
    expires_at: int | None
    owner: str
    """`Caller.owner` of whoever uploaded it."""


class Upload:
    """Bytes on their way into the store; `FileStore.keep` or `discard` ends it."""

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        self._max_bytes, self._digest = max_bytes, hashlib.sha256()
        self.path, self.size_bytes = path, 0
        self._file = path.open("xb")

    def write(self, data: bytes) -> None:
        """Add bytes; raises RequestTooLargeError over the limit, UploadStorageError where the disk is full."""
        self.size_bytes += len(data)
        if self.size_bytes > self._max_bytes:
            raise RequestTooLargeError(f"the file is larger than {self._max_bytes} bytes; send a smaller one")
        self._digest.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            raise _cannot_write(error) from error

    def close(self) -> str:
        """All bytes are there; their SHA-256 in hex."""
        try:
            self._file.close()
        except OSError as error:
            raise _cannot_write(error) from error
        return self._digest.hexdigest()

    def discard(self) -> None:
        """Forget the bytes."""
        self._file.close()
        self.path.unlink(missing_ok=True)


class FileStore:
    """Uploads of one server; see the module."""

    def __init__(self, config: FilesConfig, clock: Callable[[], float] = time.time) -> None:
        self._config, self._clock = config, clock
        self._content = config.folder / "content"
        self._records = config.folder / "files"
        self._incoming = config.folder / "incoming"

    def begin(self) -> Upload:
        """Start an upload; raises OverloadedError where too many are in progress, UploadStorageError."""
        try:
            for folder in (self._content, self._records, self._incoming):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._sweep_incoming()
            if sum(1 for _ in self._incoming.iterdir()) >= self._config.max_uploads:
                raise OverloadedError(f"{self._config.max_uploads} uploads are in progress; try again in a second")
            return Upload(self._incoming / secrets.token_hex(16), max_bytes=self._config.max_file_bytes)
        except OSError as error:
            raise _cannot_write(error) from error

    def keep(
        self, upload: Upload, *, owner: str, filename: str, purpose: str, expire_after_s: float | None = None
    ) -> StoredFile:
        """Store a complete upload, making room for it; raises RequestTooLargeError where there cannot be enough."""
        sha256, now = upload.close(), self._clock()
        lifetime = expire_after_s or self._config.expire_after_s
        record = StoredFile(
            file_id=f"file-{secrets.token_hex(12)}",
            filename=filename,
            purpose=purpose,
            size_bytes=upload.size_bytes,
            sha256=sha256,
            created_at=int(now),
            expires_at=None if lifetime is None else int(now + lifetime),
            owner=owner,
        )
        with self._lock():
            self._make_room(record)
            os.replace(upload.path, self._content / sha256)
            scratch = self._incoming / f"{record.file_id}.json"
            scratch.write_text(json.dumps(asdict(record)), "utf-8")
            os.utime(scratch, (now, now))
            os.replace(scratch, self._record_path(record.file_id))
        return record

    def get(self, file_id: str, owner: str) -> StoredFile:
        """A file of `owner`; raises UnknownFileError: no such file, expired, or somebody else's."""
        record = self._read(file_id) if FILE_ID.fullmatch(file_id) else None
        if record is None or record.owner != owner or self._is_expired(record):
            raise UnknownFileError(f"no file {file_id[:60]!r}; it was never here, has expired or was deleted")
        return record

    def open(self, file_id: str, owner: str) -> tuple[StoredFile, Path]:
        """A file of `owner` and where its bytes are, which counts as a use of it; raises UnknownFileError."""
        record = self.get(file_id, owner)
        path, now = self._content / record.sha256, self._clock()
        try:
            path.stat()
            os.utime(self._record_path(file_id), (now, now))
        except OSError as error:  # another replica dropped it just now
            raise UnknownFileError(f"no file {file_id!r}; it was dropped to make room") from error
        return record, path

    def files_of(self, owner: str) -> list[StoredFile]:
        """Files of `owner`, newest first."""
        found = [record for record in self._all() if record.owner == owner and not self._is_expired(record)]
        return sorted(found, key=lambda record: (record.created_at, record.file_id), reverse=True)

    def delete(self, file_id: str, owner: str) -> None:
        """Forget a file of `owner`; raises UnknownFileError."""
        with self._lock():
            record = self.get(file_id, owner)
            others = {other.sha256 for other in self._all() if other.file_id != file_id}
            self._drop([record], still_needed=others)

    def _make_room(self, new: StoredFile) -> None:
        """Drop what expired, then what was unused for longest, until `new` fits."""
        if new.size_bytes > self._config.max_total_bytes:
            raise RequestTooLargeError(f"{new.size_bytes} bytes are more than this server keeps altogether")
        records = sorted(self._all(), key=lambda record: self._last_use(record.file_id))
        kept = [record for record in records if not self._is_expired(record)]
        dropped = [record for record in records if self._is_expired(record)]
        while kept and (len(kept) >= self._config.max_files or not self._fits(kept, new)):
            dropped.append(kept.pop(0))
        self._drop(dropped, still_needed={record.sha256 for record in kept})

    def _fits(self, kept: list[StoredFile], new: StoredFile) -> bool:
        sizes = {record.sha256: record.size_bytes for record in (*kept, new)}
        return sum(sizes.values()) <= self._config.max_total_bytes

    def _drop(self, records: Iterable[StoredFile], *, still_needed: Set[str]) -> None:
        for record in records:
            self._record_path(record.file_id).unlink(missing_ok=True)
            if record.sha256 not in still_needed:
                (self._content / record.sha256).unlink(missing_ok=True)

    def _sweep_incoming(self) -> None:
        """Remove what uploads left behind whose process died."""
        for path in self._incoming.iterdir():
            try:
                if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
                    path.unlink()
            except FileNotFoundError:  # it ended just now
                continue

    def _all(self) -> Iterator[StoredFile]:
        if not self._records.is_dir():
            return
        for path in sorted(self._records.glob("file-*.json")):
            record = self._read(path.stem)
            if record is not None:
                yield record

    def _read(self, file_id: str) -> StoredFile | None:
        try:
            return StoredFile(**json.loads(self._record_path(file_id).read_text("utf-8")))
        except FileNotFoundError:
            return None

    def _record_path(self, file_id: str) -> Path:
        return self._records / f"{file_id}.json"

    def _last_use(self, file_id: str) -> float:
        try:
            return self._record_path(file_id).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _is_expired(self, record: StoredFile) -> bool:
        return record.expires_at is not None and record.expires_at <= self._clock()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            self._config.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with (self._config.folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise _cannot_write(error) from error


def _cannot_write(error: OSError) -> UploadStorageError:
    return UploadStorageError(f"uploads cannot be stored ({error.strerror or error}); tell the operator of this server")
