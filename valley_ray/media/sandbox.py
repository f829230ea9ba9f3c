"""Decoding in a killable child process: a file that crashes, hangs or bombs the decoder costs itself only.

One child (`valley_ray.media.sandbox_child`) serves request after request. This side imports no decoder.
"""

import logging
import os
import sys
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field

from valley_ray.config import Config
from valley_ray.errors import DecodeCrashError, DecodeMemoryError, DecodeTimeoutError, MediaError, ValleyError
from valley_ray.media.decode import Backend
from valley_ray.media.frames import VideoFrames
from valley_ray.media.preprocess import Crop
from valley_ray.media.sampling import FrameSampling
from valley_ray.media.sandbox_process import ChildGoneError, ChildProcess
from valley_ray.media.source import DecodeLimits, MediaInfo, MediaSource, parse_media_info, source_name

logger = logging.getLogger(__name__)

CHILD_COMMAND = (sys.executable, "-P", "-m", "valley_ray.media.sandbox_child")
"""Starts the decoding child; `-P` keeps the current folder off its import path."""


class SandboxLimits(Config):
    """What one file may cost."""

    timeout_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Wall-clock seconds per request; then the child is killed."""
    memory_bytes: int = Field(default=1 << 30, ge=1 << 20)
    """Private memory that the child may hold above what it holds when idle; enforced on Linux."""
    start_timeout_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Seconds that a new child may take to import its libraries."""
    decode: DecodeLimits = DecodeLimits()
    """Limits on what a file's header may ask for."""


class Sandbox:
    """Decodes media in a child process; thread-safe, one request at a time. Use as a context manager, or `close()`.

    The child starts with the first request, survives good and bad files alike, and is replaced where it did not.
    """

    def __init__(
        self,
        *,
        limits: SandboxLimits | None = None,
        backend: Backend = "pyav",
        command: Sequence[str] = CHILD_COMMAND,
    ) -> None:
        self._limits = limits or SandboxLimits()
        self._backend = backend
        self._command = tuple(command)
        self._lock = threading.Lock()
        self._child: ChildProcess | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child; a request in flight ends first."""
        with self._lock:
            self._closed = True
            self._drop_child()

    @property
    def child_pid(self) -> int | None:
        """Process id of the running child, for memory accounting; None before the first request."""
        child = self._child
        return child.pid if child is not None else None

    def probe(self, source: MediaSource, *, name: str | None = None) -> MediaInfo:
        """As `valley_ray.media.decode.probe`; raises also as `frames` here."""
        shown = source_name(source, name)
        reply, _ = self._request({"op": "probe"}, source, name=shown)
        try:
            return parse_media_info(reply["info"])
        except (KeyError, ValueError) as error:
            raise DecodeCrashError(f"{shown}: the decoding process sent an unusable reply") from error

    def frames(
        self, source: MediaSource, sampling: FrameSampling, *, crop: Crop | None = None, name: str | None = None
    ) -> VideoFrames:
        """As `valley_ray.media.decode.frames`; the crop is cut in the child, so that only small arrays travel.

        Raises:
            DecodeTimeoutError, DecodeMemoryError, DecodeCrashError: the file cost its child; the next one gets a new
                child.
            MediaError, SamplingError, SourceNotFoundError: as in process.
        """
        shown = source_name(source, name)
        fields = {
            "op": "frames",
            "backend": self._backend,
            "sampling": sampling.model_dump(),
            "crop": None if crop is None else crop.model_dump(),
        }
        reply, frames_THWC = self._request(fields, source, name=shown)
        try:
            info = parse_media_info(reply["info"])
            pts_seconds = np.asarray(reply["pts_seconds"], np.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise DecodeCrashError(f"{shown}: the decoding process sent an unusable reply") from error
        if frames_THWC is None or pts_seconds.shape != frames_THWC.shape[:1]:
            raise DecodeCrashError(f"{shown}: the decoding process sent an unusable reply")
        return VideoFrames(frames_THWC, pts_seconds, info)

    def _request(
        self, fields: dict[str, Any], source: MediaSource, *, name: str
    ) -> tuple[dict[str, Any], npt.NDArray[np.uint8] | None]:
        body = source if isinstance(source, bytes) else b""
        header = {
            **fields,
            "name": name,
            "path": None if isinstance(source, bytes) else os.fspath(source.absolute()),
            "num_bytes": len(body),
            "timeout_s": self._limits.timeout_s,
            "limits": self._limits.decode.model_dump(),
        }
        with self._lock:
            reply, array = self._exchange(header, body, name=name)
            if "error" not in reply:
                return reply, array
            error = _rebuild(reply["error"]["code"], reply["error"]["message"])
            if isinstance(error, (DecodeMemoryError, DecodeCrashError)):
                self._drop_child()  # whatever was half done may still hold memory
            raise error

    def _exchange(
        self, header: dict[str, Any], body: bytes, *, name: str
    ) -> tuple[dict[str, Any], npt.NDArray[np.uint8] | None]:
        child = self._usable_child()
        finished = False
        try:
            reply = child.exchange(
                header, body, timeout_s=self._limits.timeout_s, max_array_bytes=self._limits.decode.max_output_bytes
            )
            finished = True
            return reply
        except TimeoutError:
            limit_s = self._limits.timeout_s
            raise DecodeTimeoutError(f"{name}: decoding took longer than {limit_s:g} s and was stopped") from None
        except ChildGoneError as error:
            raise _death_error(name, error.exit_code) from None
        finally:
            if not finished:
                self._drop_child()  # a late or half-read reply would be taken for the next one

    def _usable_child(self) -> ChildProcess:
        if self._closed:
            raise ValueError("this Sandbox is closed; make a new one")
        if self._child is not None and self._child.is_usable():
            return self._child
        self._drop_child()
        environment = {
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            # glibc hands frames of 1080p back to the kernel one by one: 5 to 10 % of the decoding time is page faults.
            "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
            "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
            "VALLEY_SANDBOX_MEMORY_BYTES": str(self._limits.memory_bytes),
        }
        try:
            self._child = ChildProcess(
                self._command, environment=environment, start_timeout_s=self._limits.start_timeout_s
            )
        except (ChildGoneError, TimeoutError) as error:
            raise DecodeCrashError(
                f"the decoding process did not start ({error}); its messages are on stderr"
            ) from error
        logger.debug("decoding child %d started", self._child.pid)
        return self._child

    def _drop_child(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None


def _death_error(name: str, exit_code: int | None) -> MediaError:
    if exit_code == -9:
        # Nobody here killed it, so the kernel did: out of memory.
        return DecodeMemoryError(f"{name}: the decoding process was killed from outside, most likely for its memory")
    if exit_code is None:
        return DecodeCrashError(f"{name}: the decoding process sent an unusable reply")
    ended = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    return DecodeCrashError(f"{name}: the file crashed the decoder ({ended}); re-encode it")


def _rebuild(code: str, message: str) -> ValleyError:
    """The error of the tree that carries `code`."""
    known: list[type[ValleyError]] = [ValleyError]
    for error_class in known:
        if error_class.code == code:
            return error_class(message)
        known.extend(error_class.__subclasses__())
    return DecodeCrashError(message)
