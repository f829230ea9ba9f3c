"""A page that yt-dlp knows → the bytes of a partial file, in a process of its own that can be stopped.

yt-dlp runs its own requests, scripts and parsers on whatever a site sends: none of that can hang, grow or crash more
than its process, and that process connects to no address that the policy forbids.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from valley_ray.data.download.config import DownloadConfig
from valley_ray.data.download.credentials import Credentials
from valley_ray.data.download.partial import disk_errors
from valley_ray.errors import (
    ConfigError,
    FetchError,
    FetchInterruptedError,
    FetchTimeoutError,
    ServerBusyError,
    SourceNotAllowedError,
    SourceNotFoundError,
    SourceRefusedError,
    SourceTooLargeError,
    StorageError,
)

_COMMAND = (sys.executable, "-P", "-m", "valley_ray.data.download.page_child")
_ERRORS: dict[str, type[FetchError | StorageError]] = {
    known.__name__: known
    for known in (
        FetchError,
        FetchInterruptedError,
        FetchTimeoutError,
        ServerBusyError,
        SourceNotAllowedError,
        SourceNotFoundError,
        SourceRefusedError,
        SourceTooLargeError,
        StorageError,
    )
}


@dataclasses.dataclass(frozen=True)
class PageTask:
    """What the process is told, as JSON on its stdin."""

    url: str
    target: str
    """File to write; it gets this name when its last byte has arrived, and has `.part` behind it before."""
    format: str
    max_bytes: int
    stall_timeout_s: float
    allow_private_addresses: bool
    cookies: str
    """Text of a cookies.txt; empty: none."""


def require_yt_dlp() -> None:
    """Raise ConfigError where yt-dlp is not installed."""
    if importlib.util.find_spec("yt_dlp") is None:
        raise ConfigError("videos on pages need yt-dlp; pip install 'valley-ray[download]'")


def receive_page(url: str, target: Path, *, config: DownloadConfig, credentials: Credentials, timeout_s: float) -> None:
    """Fetch the video of a page into `target`; yt-dlp resumes by itself what an earlier try left beside it.

    Raises:
        FetchError: the video is gone or refused, the network failed, or the time is over.
        StorageError: the disk is full or not writable.
    """
    host = urlsplit(url).hostname or ""
    if config.allow_hosts is not None and host not in config.allow_hosts:
        raise SourceNotAllowedError(f"host {host!r} is not one of allow_hosts; add it there")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    task = PageTask(
        url=url,
        target=str(target),
        format=config.page_format,
        max_bytes=config.max_bytes,
        stall_timeout_s=config.stall_timeout_s,
        allow_private_addresses=config.allow_private_addresses,
        cookies=credentials.cookies,
    )
    reply = _exchange(json.dumps(dataclasses.asdict(task)), host=host, timeout_s=timeout_s)
    if reply["error"]:
        raise _ERRORS[reply["error"]](f"{host}: {reply['message']}")


def _exchange(request: str, *, host: str, timeout_s: float) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    with (
        tempfile.TemporaryFile() as messages,
        subprocess.Popen(
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, text=True, env=environment
        ) as process,
    ):
        assert process.stdin is not None, "a pipe was asked for"
        assert process.stdout is not None, "a pipe was asked for"
        try:
            # Left open: its end tells the process that this one is gone.
            process.stdin.write(request + "\n")
            process.stdin.flush()
            process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise FetchTimeoutError(
                f"{host}: the download took longer than {timeout_s:g} s; try again later"
            ) from error
        except BrokenPipeError:
            process.wait()
        finally:
            process.kill()
        lines = process.stdout.read().splitlines()
        messages.seek(0)
        last = (messages.read().decode(errors="replace").strip().splitlines() or ["no message"])[-1][:200]
        if process.returncode or not lines:
            raise FetchError(f"{host}: yt-dlp's process ended with status {process.returncode} ({last})")
    reply: dict[str, str] = json.loads(lines[-1])
    return reply
