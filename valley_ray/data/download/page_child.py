"""The process in which yt-dlp fetches the video of one page: a PageTask on stdin, one line of JSON on stdout."""

import errno
import io
import json
import os
import re
import sys
import threading
from typing import Any

from valley_ray.errors import (
    FetchError,
    FetchInterruptedError,
    ServerBusyError,
    SourceNotAllowedError,
    SourceNotFoundError,
    SourceRefusedError,
    SourceTooLargeError,
    StorageError,
    ValleyError,
)
from valley_ray.fetch_connection import is_public

_ASKS_FOR_LOGIN = re.compile(r"sign in|log in|login|cookies|members.only|private video|confirm your age", re.IGNORECASE)
_REQUEST_FOR_REPORTS = re.compile(r" \(caused by .*|; please report this issue.*")
_BROKE_OFF = re.compile(r"got error|timed out|connection (reset|aborted|broken|refused)", re.IGNORECASE)
_ASKS_FOR_PATIENCE = re.compile(r"try again later|rate.?limit|too many requests", re.IGNORECASE)


def main() -> None:
    """Answer with {"error": name of an error class or "", "message": text}."""
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    reply = {"error": "", "message": ""}
    refused: list[str] = []
    if not task["allow_private_addresses"]:
        _refuse_private_addresses(refused)
    try:
        _download(task)
    except Exception as error:  # whatever yt-dlp's many extractors raise becomes one line
        named = SourceNotAllowedError(f"leads to {refused[0]}, no public address") if refused else _named(error)
        reply = {"error": type(named).__name__, "message": str(named)}
    print(json.dumps(reply), flush=True)  # noqa: T201  (the reply)


def _end_with_parent() -> None:
    """Nobody waits for the video any more when stdin ends."""
    sys.stdin.read()
    os._exit(1)


def _refuse_private_addresses(refused: list[str]) -> None:
    """An audit hook sees the address of every connection, whichever of yt-dlp's network libraries makes it."""

    def check(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
            address = str(arguments[1][0])
            if not _is_public(address):
                refused.append(address)
                raise PermissionError(errno.EACCES, f"{address} is no public address")

    sys.addaudithook(check)


def _is_public(address: str) -> bool:
    try:
        return is_public(address)
    except ValueError:
        return False


def _download(task: dict[str, Any]) -> None:
    import yt_dlp

    def check_size(progress: dict[str, Any]) -> None:
        num_bytes = max(progress.get("downloaded_bytes") or 0, progress.get("total_bytes") or 0)
        if num_bytes > task["max_bytes"]:
            raise yt_dlp.utils.DownloadCancelled(f"{num_bytes} bytes are more than max_bytes={task['max_bytes']}")

    options = {
        "outtmpl": {"default": task["target"].replace("%", "%%")},
        "format": task["format"],
        "cookiefile": io.StringIO(task["cookies"]) if task["cookies"] else None,
        "socket_timeout": task["stall_timeout_s"],
        "progress_hooks": [check_size],
        "js_runtimes": {"deno": {}, "node": {}},
        "logger": _Silence(),
        "proxy": "",
        # Second attempts are the driver's, which knows the limits of the host.
        "retries": 0,
        "extractor_retries": 0,
        "fragment_retries": 2,
        "skip_unavailable_fragments": False,
        "noplaylist": True,
        "playlist_items": "1",
        "fixup": "never",
        "updatetime": False,
        "quiet": True,
        "noprogress": True,
        "no_warnings": True,
        "check_formats": False,
    }
    with yt_dlp.YoutubeDL(options) as downloader:
        downloader.download([task["url"]])


class _Silence:
    """A logger for yt-dlp: what matters comes as an exception."""

    def debug(self, message: str) -> None:
        """Say nothing."""

    info = warning = error = debug


def _named(error: Exception) -> ValleyError:
    """The error of the house for one of yt-dlp's, by its cause where there is one."""
    from yt_dlp.networking.exceptions import HTTPError, TransportError
    from yt_dlp.utils import ContentTooShortError, DownloadCancelled, DownloadError, ExtractorError

    message = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split()).removeprefix("ERROR: ")
    message = _REQUEST_FOR_REPORTS.sub("", message)[:300]
    causes = _causes(error)
    if isinstance(error, DownloadCancelled):
        return SourceTooLargeError(message)
    for cause in causes:
        if isinstance(cause, HTTPError):
            return _status_error(cause.status, message)
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return StorageError("the disk is full; make room and start again")
    is_transport = any(isinstance(cause, TransportError | ContentTooShortError | TimeoutError) for cause in causes)
    if is_transport or _BROKE_OFF.search(message):
        return FetchInterruptedError(message)
    if _ASKS_FOR_PATIENCE.search(message):
        return ServerBusyError(message)
    if _ASKS_FOR_LOGIN.search(message):
        return SourceRefusedError(f"{message} (give cookies_file)")
    if any(isinstance(cause, ExtractorError) and cause.expected for cause in causes):
        return SourceNotFoundError(message)
    return FetchError(message if isinstance(error, DownloadError) else f"{type(error).__name__}: {message}")


def _status_error(status: int, message: str) -> ValleyError:
    if status in (404, 410):
        return SourceNotFoundError(message)
    if status in (408, 425, 429) or status >= 500:
        return ServerBusyError(message)
    return SourceRefusedError(message)


def _causes(error: BaseException | None) -> list[BaseException]:
    """The error and what led to it; yt-dlp keeps some of that in attributes of its own."""
    found: list[BaseException] = []
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is None or one in found:
            continue
        found.append(one)
        told = getattr(one, "exc_info", None) or (None, None)
        waiting += [one.__cause__, one.__context__, getattr(one, "cause", None), told[1]]
    return found


if __name__ == "__main__":
    main()
