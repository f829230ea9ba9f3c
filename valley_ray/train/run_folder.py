"""Where a run leaves its files: a folder on any file system, with a local one that processes write to.

Checkpoints go to the file system directly, through Ray Train; the small files that people look at (metrics, curve) are
written to a local folder, which is the run's own where that is local, and copied from there where it is not.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import posixpath
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, FSSpecHandler, LocalFileSystem, PyFileSystem

from valley_ray.errors import ConfigError

logger = logging.getLogger(__name__)

_ARROW_SCHEMES = ("file", "s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss")
"""File systems that pyarrow brings along; the others are fsspec's."""
_UNFIT_SCHEMES = ("memory", "http", "https", "data")
"""Those that every process has its own of, or that take no files."""
ATTEMPTS_FILE = "attempts.jsonl"
"""A line for every time that workers began: at the start, and after each death."""
SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"
"""Ray Train's list of the checkpoints that count."""
LOCK_FILE = "driver.lock"
"""Held by the process that drives the run."""
_LAST_SNAPSHOT_FILE = f"{SNAPSHOT_FILE}.last"


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    url: str
    """As a person finds it: an absolute path, or a URL."""
    filesystem: FileSystem = field(repr=False)
    path: str
    """On `filesystem`."""
    local: Path
    """Where this machine's processes write small files: the folder itself, or what `push` copies to it."""

    @property
    def is_local(self) -> bool:
        """Whether the folder lies on a local (or mounted) disk."""
        return isinstance(self.filesystem, LocalFileSystem)

    @property
    def storage(self) -> str:
        """The folder above, on `filesystem`, as Ray Train takes it."""
        return posixpath.dirname(self.path)

    @property
    def name(self) -> str:
        """The run's name."""
        return posixpath.basename(self.path)

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return bool(self.filesystem.get_file_info(f"{self.path}/{name}").type != FileType.NotFound)

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        if self.has(name):
            self.filesystem.delete_file(f"{self.path}/{name}")

    def push(self) -> None:
        """Copy the local folder's files to where the run is kept; nothing to do where they are the same."""
        if self.is_local:
            return
        self.local.mkdir(parents=True, exist_ok=True)
        for file in sorted(path for path in self.local.rglob("*") if path.is_file()):
            target = f"{self.path}/{file.relative_to(self.local).as_posix()}"
            self.filesystem.create_dir(posixpath.dirname(target), recursive=True)
            with self.filesystem.open_output_stream(target) as stream:
                stream.write(file.read_bytes())

    def pull(self, *names: str) -> None:
        """Copy files of those names, where they exist, to the local folder; attempts before may have run elsewhere."""
        if self.is_local:
            return
        self.local.mkdir(parents=True, exist_ok=True)
        for name in names:
            if self.has(name):
                with self.filesystem.open_input_stream(f"{self.path}/{name}") as stream:
                    (self.local / name).write_bytes(stream.read())


def run_folder(storage: str, name: str, *, local: Path | None = None) -> RunFolder:
    """The folder `name` below `storage`, which is a path or a URL; nothing is made yet.

    Args:
        local: local folder that stands for a remote one; None: one below the machine's temporary folder.

    Raises:
        ConfigError: no such file system, or one that is not installed or refuses.
    """
    if "://" not in storage:
        path = Path(storage).expanduser().absolute() / name
        return RunFolder(str(path), LocalFileSystem(), path.as_posix(), path)
    filesystem, folder = _filesystem(storage)
    if not folder.strip("/") or storage.partition("://")[0].lower() in _UNFIT_SCHEMES:
        raise ConfigError(f"storage={storage!r} cannot keep a run; name a folder or a URL of a bucket")
    url, path_there = f"{storage.rstrip('/')}/{name}", f"{folder.rstrip('/')}/{name}"
    if isinstance(filesystem, LocalFileSystem):
        return RunFolder(path_there, filesystem, path_there, Path(path_there))
    if local is None:
        local = Path(tempfile.gettempdir()) / f"valley-run-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    return RunFolder(url, filesystem, path_there, local)


@contextlib.contextmanager
def driven(folder: RunFolder) -> Iterator[None]:
    """Drive the run alone for the time of the `with` block, as far as its folder is on a disk that knows locks; the
    lock ends with the process at the latest.

    Raises:
        ConfigError: another process drives it.
    """
    if not folder.is_local:
        yield
        return
    folder.local.mkdir(parents=True, exist_ok=True)
    with (folder.local / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigError(
                f"run_name={folder.name} is being trained already in {folder.url}, by {file.read() or 'a process'}; "
                "wait for its end or take another run_name"
            ) from error
        except OSError:
            logger.warning("%s: this disk knows no locks; start no other training of this name meanwhile", folder.url)
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()
        yield


def remove_uncommitted(folder: RunFolder) -> None:
    """Delete what killed uploads have left, and bring Ray Train's list of checkpoints back where a kill has cut it off.

    For the time when nothing of the run is alive.

    Raises:
        ConfigError: the list names a checkpoint that is gone.
    """
    listed = _read(folder, SNAPSHOT_FILE)
    if listed is not None and not _is_whole(listed):
        listed = _read(folder, _LAST_SNAPSHOT_FILE)
        if listed is None:
            folder.remove(SNAPSHOT_FILE)
        else:
            _write(folder, SNAPSHOT_FILE, listed)
    _check_listed(folder, listed)
    for info in folder.filesystem.get_file_info(FileSelector(folder.path, allow_not_found=True)):
        name = posixpath.basename(info.path)
        if info.type == FileType.Directory and name.startswith("checkpoint_") and name not in (listed or ""):
            folder.filesystem.delete_dir(info.path)


def _check_listed(folder: RunFolder, listed: str | None) -> None:
    """Ray Train's controller would end on a checkpoint that is gone, at every attempt."""
    try:
        known = json.loads(listed or "{}")
    except ValueError:
        return
    for result in known.get("checkpoint_results", ()):
        name = result.get("checkpoint_dir_name") if isinstance(result, dict) else None
        if name is not None and not folder.has(name):
            raise ConfigError(
                f"run_name={folder.name}: its {name} in {folder.url} is gone; bring it back or take a new run_name"
            )


def keep_snapshot(folder: RunFolder) -> None:
    """Keep a copy of Ray Train's list of checkpoints, which it writes in place: a controller that is killed while it
    writes would leave half of it. Called once a checkpoint has been committed."""
    listed = _read(folder, SNAPSHOT_FILE)
    if listed is not None and _is_whole(listed):
        _write(folder, _LAST_SNAPSHOT_FILE, listed)


def record_attempt(folder: RunFolder, *, after_step: int, workers: int) -> None:
    """Add a line to the run's ``attempts.jsonl``: after which step it began, with how many workers, and when."""
    folder.pull(ATTEMPTS_FILE)
    folder.local.mkdir(parents=True, exist_ok=True)
    began = datetime.now(UTC).isoformat(timespec="seconds")
    with (folder.local / ATTEMPTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"after_step": after_step, "workers": workers, "began": began}) + "\n")


def _is_whole(listed: str) -> bool:
    return listed.rstrip().endswith("}")


def _read(folder: RunFolder, name: str) -> str | None:
    if not folder.has(name):
        return None
    with folder.filesystem.open_input_stream(f"{folder.path}/{name}") as stream:
        return str(stream.read().decode("utf-8", errors="replace"))


def _write(folder: RunFolder, name: str, text: str) -> None:
    with folder.filesystem.open_output_stream(f"{folder.path}/{name}") as stream:
        stream.write(text.encode())


def _filesystem(url: str) -> tuple[FileSystem, str]:
    try:
        if url.partition("://")[0].lower() in _ARROW_SCHEMES:
            filesystem, path = FileSystem.from_uri(url)
            return filesystem, path
        import fsspec

        known, path = fsspec.core.url_to_fs(url)
    except (OSError, ValueError, ImportError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"storage={url!r} cannot be used: {reason}; name a folder or a URL of a bucket") from error
    return PyFileSystem(FSSpecHandler(known)), path
