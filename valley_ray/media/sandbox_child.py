"""The decoding child of `valley_ray.media.sandbox`: requests on stdin, replies on stdout, until stdin ends.

The kernel caps its memory, and an alarm ends it when a request outlives its time even if the parent is gone.
"""

import os
import resource
import select
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from valley_ray.errors import DecodeCrashError, ValleyError
from valley_ray.media import decode
from valley_ray.media.preprocess import Crop
from valley_ray.media.sampling import FrameSampling
from valley_ray.media.sandbox_process import receive_message, send_message
from valley_ray.media.source import DecodeLimits

_ALARM_GRACE_S = 5.0
_PARENT_CHECK_S = 5.0


def main() -> None:
    """Serve requests until the parent closes the pipe or is gone."""
    parent = os.getppid()
    requests, replies = _take_pipes()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Image.init()
    av.logging.set_libav_level(av.logging.PANIC)
    _cap_memory(int(os.environ["VALLEY_SANDBOX_MEMORY_BYTES"]))
    send_message(replies, {"ready": True})
    while _wait_for_request(requests, parent):
        message = receive_message(requests)
        if message is None:
            return
        header, body = message
        # The default action of SIGALRM ends the process even inside a C loop.
        signal.setitimer(signal.ITIMER_REAL, header["timeout_s"] + _ALARM_GRACE_S)
        reply, array = _serve(header, body)
        del message, body
        send_message(replies, reply, array)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _serve(header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], npt.NDArray[np.uint8] | None]:
    """One request -> (reply, frames). Every error becomes a reply: this is the process boundary."""
    name = header["name"]
    try:
        return _answer(header, body)
    except ValleyError as error:
        code, text = error.code, str(error)
    except Exception as error:  # a bug in a decoder's binding must cost this file only, and say what it was
        line = " ".join(str(error).split())
        code, text = DecodeCrashError.code, f"{name}: the decoder failed ({type(error).__name__}: {line})"
    return {"error": {"code": code, "message": text}}, None


def _answer(header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], npt.NDArray[np.uint8] | None]:
    source = body if header["path"] is None else Path(header["path"])
    name, limits = header["name"], DecodeLimits(**header["limits"])
    if header["op"] == "probe":
        return {"info": asdict(decode.probe(source, name=name, limits=limits))}, None
    crop = None if header["crop"] is None else Crop(**header["crop"])
    sampling = FrameSampling(**header["sampling"])
    video = decode.frames(source, sampling, name=name, backend=header["backend"], crop=crop, limits=limits)
    assert video.info is not None, "every decoder says what the container said"
    return {"pts_seconds": video.pts_seconds.tolist(), "info": asdict(video.info)}, video.frames_THWC


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep stdin and stdout for messages; whatever libraries print goes nowhere."""
    # Buffered: the parent sends the next request only after the reply, so nothing is read ahead past `select`.
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    return requests, replies


def _wait_for_request(requests: BinaryIO, parent: int) -> bool:
    """Wait for input; False when the parent is gone, which a forked sibling's copy of the pipe would hide."""
    while not select.select([requests], [], [], _PARENT_CHECK_S)[0]:
        if os.getppid() != parent:
            return False
    return True


def _cap_memory(extra_bytes: int) -> None:
    """Cap private writable memory (Linux RLIMIT_DATA) at what is held now plus `extra_bytes`."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return  # no procfs: not Linux, where RLIMIT_DATA does not count mappings
    held_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:"))
    limit = held_kib * 1024 + extra_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main()
