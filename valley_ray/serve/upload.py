"""A multipart body → an upload on disk and its form fields, piece by piece, never whole in memory."""

import asyncio
from collections.abc import AsyncIterable
from dataclasses import dataclass

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect

from valley_ray.serve.files import FileStore, Upload
from valley_ray.serve.refusals import UploadError

_WRITE_BYTES = 1 << 20
_MAX_FIELD_BYTES = 4096
_MAX_FIELDS = 16


@dataclass(frozen=True)
class ReceivedUpload:
    """What a multipart body held."""

    upload: Upload
    filename: str
    fields: dict[str, str]
    """The other fields, by name."""


async def receive_upload(content_type: str, body: AsyncIterable[bytes], store: FileStore) -> ReceivedUpload:
    """Read a multipart body with one file in the field `file`; on any error nothing stays on disk.

    Raises UploadError for another body, RequestTooLargeError, UploadStorageError, OverloadedError.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 1 <= len(boundary) <= 200:
        raise UploadError("expected a multipart/form-data body with the fields file and purpose")
    upload = await asyncio.to_thread(store.begin)
    try:
        form = _Form(boundary)
        try:
            async for chunk in body:
                form.feed(chunk)
                if len(form.pending) >= _WRITE_BYTES:
                    await asyncio.to_thread(upload.write, form.take())
        except ClientDisconnect as error:
            raise UploadError("the client went away before the end of the upload") from error
        form.finish()
        await asyncio.to_thread(upload.write, form.take())
    except BaseException:
        upload.discard()
        raise
    return ReceivedUpload(upload, form.filename or "", form.fields)


class _Form:
    """The state of the parser: the part being read, the file's bytes that wait to be written, the other fields."""

    def __init__(self, boundary: bytes) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.pending = bytearray()
        self._header_name = self._header_value = self._disposition = b""
        self._field, self._value, self._is_file, self._ended = "", bytearray(), False, False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_header_name,
                "on_header_value": self._on_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_end": self._end_all,
            },
        )

    def feed(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise UploadError(f"not a valid multipart body ({error})") from error

    def finish(self) -> None:
        if not self._ended:
            raise UploadError("the multipart body breaks off before its end")
        if self.filename is None:
            raise UploadError("the multipart body has no field file with a file name")

    def take(self) -> bytes:
        taken, self.pending = bytes(self.pending), bytearray()
        return taken

    def _begin(self) -> None:
        self._disposition, self._value = b"", bytearray()

    def _on_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _end_headers(self) -> None:
        options = parse_options_header(self._disposition)[1]
        self._field = _text(options.get(b"name", b""))
        self._is_file = self._field == "file"
        if self._is_file:
            if self.filename is not None:
                raise UploadError("the multipart body has two fields file; send one file at a time")
            if b"filename" not in options:
                raise UploadError("the field file is no file: it has no file name")
            self.filename = _text(options[b"filename"])[:255]
        elif not self._field or self._field in self.fields or len(self.fields) >= _MAX_FIELDS:
            raise UploadError(f"the multipart body has a field too many: {self._field[:60]!r}")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.pending += data[start:end]
            return
        self._value += data[start:end]
        if len(self._value) > _MAX_FIELD_BYTES:
            raise UploadError(f"the field {self._field[:60]!r} is longer than {_MAX_FIELD_BYTES} bytes")

    def _end(self) -> None:
        if not self._is_file:
            self.fields[self._field] = _text(bytes(self._value))

    def _end_all(self) -> None:
        self._ended = True


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")
