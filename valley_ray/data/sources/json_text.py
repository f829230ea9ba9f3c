"""JSON text → records, one at a time: a list of any length is read in a window of a few records. Knows no format.

Stricter than the json module, since a table must not guess: NaN and infinities, keys that repeat and anything between
the records are errors, each with its byte offset.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from valley_ray.data.sources.files import CHUNK_BYTES, decode, read_chunks, read_lines, shown
from valley_ray.errors import DataError

MAX_RECORD_CHARS = 64 << 20
"""Longest record; a longer one is no record of a list, but the whole of another layout."""

_CUT_CHARS = 16
"""An error this close to the end of the window may be a token that goes on: an escaped surrogate pair has 12."""

_ENDS = (",", "]", " ", "\n", "\r", "\t")
"""What may follow a record."""

_SPACE = re.compile(r"[ \t\n\r]*")
_KINDS = {"{": "an object", '"': "a text", "": "an empty file"}


def read_json_list(path: str) -> Iterator[Any]:
    """The records of a JSON list.

    Raises:
        DataError: the file cannot be read, is not UTF-8 or not JSON, or is something else than a list.
    """
    window = _Window(path)
    if window.next_char() != "[":
        kind = _KINDS.get(window.next_char(), "a number or a word")
        if window.next_char():
            window.value()
            kind = "JSON lines, whose files end in .jsonl" if window.next_char() else kind
        raise DataError(f"records {shown(path)} must be a JSON list of records, got {kind}; give a file that is one")
    window.skip()
    if window.next_char() == "]":
        window.skip()
    else:
        while True:
            yield window.value()
            mark = window.next_char()
            if mark not in (",", "]"):
                raise window.invalid("expected ',' or ']' after a record")
            window.skip()
            if mark == "]":
                break
    if window.next_char():
        raise window.invalid("expected nothing after the list")


def read_json_lines(path: str) -> Iterator[Any]:
    """The records of a JSON lines file; empty lines are left out. Raises DataError as `read_json_list` does."""
    for number, line in enumerate(read_lines(path), start=1):
        if not line.isspace():
            try:
                yield _DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                where = f"line {number} of {shown(path)}"
                raise DataError(f"{where} is not valid JSON ({_reason(error)}); give one record per line") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r:.80} repeats")
    return record


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


class _Window:
    """The part of the text that is being read; grows while a record is longer, and forgets what was taken."""

    def __init__(self, path: str) -> None:
        self._name = shown(path)
        self._chunks = read_chunks(path)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._position = 0
        self._num_forgotten = 0
        """Bytes of the text before `_text`."""
        self._num_read = 0
        self._is_at_end = False
        self._grow()
        if self._text.startswith("\ufeff"):
            self._position = 1

    def next_char(self) -> str:
        """The character after any space, where the position then is; empty at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self._position)
            assert match is not None, "a pattern of * matches everywhere"
            self._position = match.end()
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._grow():
                return ""

    def skip(self) -> None:
        """Go past the character that `next_char` gave."""
        self._position += 1

    def value(self) -> Any:
        """The value that begins after any space; the position is then behind it."""
        self.next_char()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or len(self._text) - error.pos <= _CUT_CHARS
                num_good = error.pos - self._position
                if not (is_cut and self._grow()):
                    raise self.invalid(error.msg, self._position + num_good) from error
            except (ValueError, RecursionError) as error:
                raise self.invalid(f"{_reason(error)}, in the record that begins there") from error
            else:
                # Near the end of the window, a number may go on: 1, 1.5 and 1.5e3 are all whole.
                num_taken = end - self._position
                is_whole = self._text[end : end + 1] in _ENDS or len(self._text) - end > _CUT_CHARS
                if (is_whole and end < len(self._text)) or not self._grow():
                    self._position += num_taken
                    return value

    def invalid(self, reason: str, position: int | None = None) -> DataError:
        """The error that says what is wrong at `position` of the window, by default the current one."""
        before = self._text[: self._position if position is None else position]
        at = self._num_forgotten + len(before.encode("utf-8"))
        where = "at the end of the file, " if len(before) == len(self._text) and self._is_at_end else ""
        return DataError(
            f"records {self._name} are not valid JSON ({reason}: {where}byte {at}); give a JSON list of records"
        )

    def _grow(self) -> bool:
        """Read on, at least as much as is still needed from before, so that long records are not parsed too often."""
        kept = self._text[self._position :]
        if len(kept) > MAX_RECORD_CHARS:
            raise DataError(
                f"records {self._name}: the record at byte {self._num_forgotten} is longer than "
                f"{MAX_RECORD_CHARS >> 20} MB; is this a list of records?"
            )
        self._num_forgotten += len(self._text[: self._position].encode("utf-8"))
        parts = [kept]
        wanted = max(CHUNK_BYTES, len(kept))
        # Bytes that are only the beginning of a character give no text yet.
        while (wanted > 0 or not any(parts[1:])) and not self._is_at_end:
            chunk = next(self._chunks, b"")
            self._is_at_end = not chunk
            parts.append(decode(self._decoder, chunk, offset=self._num_read, name=self._name, final=not chunk))
            self._num_read += len(chunk)
            wanted -= len(chunk)
        self._text, self._position = "".join(parts), 0
        return len(self._text) > len(kept)


def _reason(error: BaseException) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
