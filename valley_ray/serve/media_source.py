"""Where the media of a request comes from: content parts → MediaRefs and wishes for frames, inside the server's policy.

Uploaded files are known by their id; everything else goes through `valley_ray.fetch`.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from valley_ray.chat.conversation import MediaKind
from valley_ray.errors import SamplingError
from valley_ray.fetch import FetchPolicy, fetch, locator_kind, media_key, shorten
from valley_ray.serve.chat_request import ChatCompletionRequest, FilePart, ImagePart, MediaContent, VideoPart
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.files import FILE_ID, FileStore
from valley_ray.serve.protocol import FrameWish, MediaRef
from valley_ray.serve.refusals import OverLimitError, RequestTooLargeError

_NUM_THREADS = 8
"""Downloads at once, and as many decodings of base64: nobody waits behind a slow host who names none."""


class MediaSource:
    """Finds the media of requests.

    Args:
        put: bytes → object reference that a MediaRef carries.
    """

    def __init__(self, config: ServeConfig, store: FileStore, put: Callable[[bytes], Any]) -> None:
        self._config, self._store, self._put = config, store, put
        self._policy = FetchPolicy(
            allow_roots=config.allow_roots,
            allow_hosts=config.allow_hosts,
            allow_private_addresses=config.allow_private_addresses,
            max_bytes=config.max_media_bytes,
            timeout_s=config.fetch_timeout_s,
        )
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="media")
        self._downloads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="download")

    def parts_of(self, body: ChatCompletionRequest) -> list[MediaContent]:
        """The media parts of all messages, in order; raises OverLimitError for too many."""
        parts = [
            part
            for message in body.messages
            if not isinstance(message.content, str)
            for part in message.content
            if part.type != "text"
        ]
        if len(parts) > self._config.max_media:
            raise OverLimitError(
                f"{len(parts)} videos and images are over this server's {self._config.max_media}; send fewer",
                param="messages",
            )
        return parts

    def wish(self, part: MediaContent, body: ChatCompletionRequest) -> FrameWish:
        """Which frames of a part: what it says itself, and the request's fields for what it leaves open.

        Raises SamplingError over the server's ceiling.
        """
        own: dict[str, int | float] = {}
        if not isinstance(part, ImagePart):
            own = part.frames
            own |= part.video_url.frames if not isinstance(part, FilePart) else {}
        common = body.frames
        for one, other in (("num_frames", "fps"), ("fps", "num_frames")):
            if one in own:
                common.pop(other, None)
        wish = FrameWish(**{**common, **own})  # type: ignore[arg-type]
        if wish.num_frames is not None and wish.num_frames > self._config.max_frames:
            raise SamplingError(
                f"num_frames={wish.num_frames} is over this server's {self._config.max_frames}; ask for fewer"
            )
        if wish.start_s is not None and wish.end_s is not None and wish.end_s <= wish.start_s:
            raise SamplingError(f"end_s must be after start_s, got start_s={wish.start_s} end_s={wish.end_s}")
        return wish

    async def refs(self, parts: Sequence[MediaContent], owner: str) -> tuple[MediaRef, ...]:
        """The media of all parts; files are those of `owner`. Raises FetchError, UnknownFileError."""
        loop = asyncio.get_running_loop()
        found = [loop.run_in_executor(self._threads_for(part), self._ref, part, owner) for part in parts]
        try:
            return tuple(await asyncio.gather(*found))
        finally:
            for one in found:  # the first that fails refuses the request; what has not begun is not wanted any more
                one.cancel()

    def _threads_for(self, part: MediaContent) -> ThreadPoolExecutor:
        is_download = not isinstance(part, FilePart) and locator_kind(_url_of(part)) == "http"
        return self._downloads if is_download else self._threads

    def _ref(self, part: MediaContent, owner: str) -> MediaRef:
        if isinstance(part, FilePart):
            return self._stored(part.file.file_id, None, owner)
        kind: MediaKind = "image" if isinstance(part, ImagePart) else "video"
        url = _url_of(part)
        if FILE_ID.fullmatch(url):
            return self._stored(url, kind, owner)
        fetched = fetch(url, self._policy)
        key = media_key(fetched)
        if isinstance(fetched.source, Path):
            return MediaRef(key, kind, fetched.name, path=str(fetched.source.absolute()))
        return MediaRef(key, kind, fetched.name, data=self._put(fetched.source))

    def _stored(self, file_id: str, kind: MediaKind | None, owner: str) -> MediaRef:
        record, path = self._store.open(file_id, owner)
        if record.size_bytes > self._config.max_media_bytes:
            raise RequestTooLargeError(
                f"{file_id} has {record.size_bytes} bytes, media may have {self._config.max_media_bytes}"
            )
        name = f"{file_id} ({shorten(record.filename)})"
        return MediaRef(f"bytes-{record.sha256}", kind or _kind_of(path), name, path=str(path.absolute()))


def as_openai(body: ChatCompletionRequest, refs: Sequence[MediaRef]) -> list[dict[str, Any]]:
    """The messages as `from_openai` takes them: files by their kind, without what only this API knows."""
    kinds = iter([ref.kind for ref in refs])

    def content(message_content: Any) -> Any:
        if isinstance(message_content, str):
            return message_content
        return [
            {"type": "text", "text": part.text}
            if part.type == "text"
            # The mark is all that is needed of it: the media has been found already.
            else {"type": f"{(kind := next(kinds))}_url", f"{kind}_url": {"url": "found"}}
            for part in message_content
        ]

    return [
        {"role": "system" if one.role == "developer" else one.role, "content": content(one.content)}
        for one in body.messages
    ]


def _url_of(part: VideoPart | ImagePart) -> str:
    return part.image_url.url if isinstance(part, ImagePart) else part.video_url.url


def _kind_of(path: Path) -> MediaKind:
    """Whether a file is an image or a video, by its first bytes; moving images (GIF) are videos."""
    with path.open("rb") as file:
        head = file.read(12)
    is_image = head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*"))
    return "image" if is_image or (head[:4] == b"RIFF" and head[8:] == b"WEBP") else "video"
