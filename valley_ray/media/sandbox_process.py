"""A child process behind two pipes: starts it, exchanges one message with a deadline, kills it. Knows no media.

A message is a 4-byte little-endian length, that many bytes of JSON, then raw bytes: the body of a request
(`num_bytes`), or the uint8 array of a reply (`shape`). Nothing is ever unpickled.
"""

import contextlib
import fcntl
import json
import os
import select
import struct
import subprocess
import time
import weakref
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

import valley_ray

_LENGTH = struct.Struct("<I")
_MAX_HEADER_BYTES = 1 << 20
_PIPE_BYTES = 1 << 20
"""What Linux allows everybody by default; a clip of eight frames at 224 is 1.2 MB."""


class ChildGoneError(Exception):
    """The child ended (`exit_code` negative for a signal) or sent what is no message (`exit_code` None)."""

    def __init__(self, exit_code: int | None) -> None:
        super().__init__(f"exit code {exit_code}")
        self.exit_code = exit_code


class ChildProcess:
    """One running child. Not thread-safe."""

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str], start_timeout_s: float) -> None:
        """Start `command` and wait for its first message; raises ChildGoneError or TimeoutError where none comes."""
        root = str(Path(valley_ray.__file__).parents[1])
        paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": paths, **environment},
            start_new_session=True,  # Ctrl-C in a terminal is the parent's to handle
        )
        assert self._process.stdin is not None, "a pipe was asked for"
        assert self._process.stdout is not None, "a pipe was asked for"
        self._to_child = self._process.stdin.fileno()
        self._from_child = self._process.stdout.fileno()
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _end, self._process)
        os.set_blocking(self._to_child, False)
        os.set_blocking(self._from_child, False)
        _widen(self._from_child)
        try:
            self._read_header(time.monotonic() + start_timeout_s)
        except (ChildGoneError, TimeoutError):
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def is_usable(self) -> bool:
        """Alive, and started by this process rather than inherited over a fork."""
        return os.getpid() == self._owner and self._process.poll() is None

    def exchange(
        self, header: Mapping[str, Any], body: bytes, *, timeout_s: float, max_array_bytes: int
    ) -> tuple[dict[str, Any], npt.NDArray[np.uint8] | None]:
        """Send a message and wait for the reply: its header, and its array [T, H, W, 3] where it announces one.

        Raises:
            TimeoutError: no complete reply in time.
            ChildGoneError: the child ended, or its reply is no message.
        """
        deadline = time.monotonic() + timeout_s
        self._write(_encode_header(header), deadline)
        self._write(body, deadline)
        reply = self._read_header(deadline)
        shape = reply.get("shape")
        if shape is None:
            return reply, None
        if not _is_frames_shape(shape) or prod(shape) > max_array_bytes:
            raise ChildGoneError(None)
        array = np.empty(shape, np.uint8)
        self._read_into(array.reshape(-1).data, deadline)
        return reply, array

    def kill(self) -> None:
        """End the process and reap it; leaves the child of another process alone."""
        if os.getpid() == self._owner:
            self._finalizer()

    def _read_header(self, deadline: float) -> dict[str, Any]:
        prefix = bytearray(_LENGTH.size)
        self._read_into(memoryview(prefix), deadline)
        (length,) = _LENGTH.unpack(prefix)
        if length > _MAX_HEADER_BYTES:
            raise ChildGoneError(None)
        text = bytearray(length)
        self._read_into(memoryview(text), deadline)
        try:
            header = json.loads(text)
        except ValueError:
            raise ChildGoneError(None) from None
        if not isinstance(header, dict):
            raise ChildGoneError(None)
        return header

    def _read_into(self, view: memoryview, deadline: float) -> None:
        while view:
            _wait(self._from_child, select.POLLIN, deadline)
            try:
                count = os.readv(self._from_child, [view])
            except BlockingIOError:
                continue
            if not count:
                raise ChildGoneError(self._exit_code())
            view = view[count:]

    def _write(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            _wait(self._to_child, select.POLLOUT, deadline)
            try:
                view = view[os.write(self._to_child, view) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise ChildGoneError(self._exit_code()) from None

    def _exit_code(self) -> int | None:
        try:
            return self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return None


def send_message(pipe: BinaryIO, header: Mapping[str, Any], array: npt.NDArray[np.uint8] | None = None) -> None:
    """The child's side: write one message, `array` (if any) behind its shape."""
    pipe.write(_encode_header({**header, "shape": array.shape} if array is not None else header))
    if array is not None:
        pipe.write(np.ascontiguousarray(array).reshape(-1).data)
    pipe.flush()


def receive_message(pipe: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The child's side: read one message and its body; None at the end of the pipe."""
    prefix = pipe.read(_LENGTH.size)
    if len(prefix) < _LENGTH.size:
        return None
    header = json.loads(pipe.read(_LENGTH.unpack(prefix)[0]))
    return header, pipe.read(header["num_bytes"])


def _encode_header(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return _LENGTH.pack(len(text)) + text


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _widen(pipe: int) -> None:
    """Let a whole clip into the pipe where the system allows it: 64 KiB at a time cost ten switches between the two
    processes for each that this takes."""
    with contextlib.suppress(AttributeError, OSError):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _wait(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    remaining = deadline - time.monotonic()
    if remaining <= 0 or not poll.poll(remaining * 1000):
        raise TimeoutError("timed out")


def _is_frames_shape(shape: object) -> bool:
    return (
        isinstance(shape, list) and len(shape) == 4 and all(type(n) is int and n > 0 for n in shape) and shape[3] == 3
    )
