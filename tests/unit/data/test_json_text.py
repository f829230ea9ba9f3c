"""JSON text is read a record at a time: the same values as json.loads, and errors that say where."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from valley_ray.data.sources import json_text
from valley_ray.data.sources.json_text import read_json_lines, read_json_list
from valley_ray.errors import DataError


def write(tmp_path: Path, content: str | bytes) -> str:
    path = tmp_path / "records.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return str(path)


def read_in_chunks(monkeypatch: pytest.MonkeyPatch, content: bytes, size: int) -> list[Any]:
    """The records of `content` where it arrives `size` bytes at a time."""

    def chunks(path: str) -> Iterator[bytes]:
        yield from (content[first : first + size] for first in range(0, len(content), size))

    monkeypatch.setattr(json_text, "read_chunks", chunks)
    monkeypatch.setattr(json_text, "CHUNK_BYTES", 1)
    return list(read_json_list("records"))


def random_value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [random_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == 7:
        return {f"k{i}": random_value(draw, depth + 1) for i in range(draw.randrange(4))}
    texts = ["", 'a"b\\', "größe 视频 🎬", "\u2028\n\t", "\\ud83c", "x" * 40]
    return [
        None,
        draw.random() < 0.5,
        draw.randrange(-(10**9), 10**9),
        draw.random() * 1e-9,
        1.5e300,
        draw.choice(texts),
    ][kind]


def test_any_list_is_read_as_json_reads_it_wherever_the_chunks_end(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    for case in range(300):
        records = [random_value(draw) for _ in range(draw.randrange(6))]
        text = json.dumps(records, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 1]))
        content = (" \n" + text + "\r\n").encode()
        assert read_in_chunks(monkeypatch, content, draw.choice([1, 2, 3, 7, 64])) == records, (case, text)


def test_any_damage_that_json_refuses_is_refused_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(1)
    num_refused = 0
    for case in range(600):
        records = [{"id": i, "text": "größe \\ud83c\\udfac", "turns": [1.5, None, {"a": "b"}]} for i in range(3)]
        content = bytearray(json.dumps(records, ensure_ascii=False).encode())
        at = draw.randrange(len(content))
        if draw.random() < 0.3:
            del content[at:]
        else:
            content[at] = draw.choice(b'"{}[],:\\ \x00\xff0a')
        try:
            want = json.loads(content.decode(), object_pairs_hook=json_text._object, parse_constant=json_text._constant)
            assert isinstance(want, list)
        except (ValueError, AssertionError):
            num_refused += 1
            with pytest.raises(DataError):
                read_in_chunks(monkeypatch, bytes(content), draw.choice([1, 5, 4096]))
        else:
            assert read_in_chunks(monkeypatch, bytes(content), draw.choice([1, 5, 4096])) == want, case
    assert num_refused > 300


def test_byte_order_mark_is_left_out(tmp_path: Path) -> None:
    assert list(read_json_list(write(tmp_path, b"\xef\xbb\xbf [1, 2]"))) == [1, 2]
    assert list(read_json_lines(write(tmp_path, b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}'))) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "must be a JSON list of records, got an empty file"),
        ("  \n", "got an empty file"),
        ('{"id": 1}', "must be a JSON list of records, got an object"),
        ('{"id": 1}\n{"id": 2}', r"got JSON lines, whose files end in \.jsonl"),
        ('"text"', "got a text"),
        ("nonsense", "not valid JSON"),
        ('[{"a": 1}] x', "expected nothing after the list: byte 11"),
        ('[{"a": 1} {"a": 2}]', "expected ',' or ']' after a record: byte 10"),
        ('["ü" {"a": 2}]', "expected ',' or ']' after a record: byte 6"),
        ('[{"a": 1},]', "Expecting value: byte 10"),
        ('[{"a": 1}, nonsense, {"a": 2}]', "Expecting value: byte 11"),
        ('[{"a": 1}, {"a": 2', "at the end of the file, byte 18"),
        ('[{"a": 1}, {"a": "never closed', "Unterminated string starting at: byte 17"),
        ('[{"a": 1}', "at the end of the file, byte 9"),
        ("[", "at the end of the file, byte 1"),
        ('[{"a": 1}, {"b": NaN}]', "NaN is no JSON value, in the record that begins there: byte 11"),
        ('[{"b": -Infinity}]', "-Infinity is no JSON value"),
        ('[{"a": 1, "a": 2}]', "key 'a' repeats, in the record that begins there: byte 1"),
        ("[" * 100_000, "nested too deeply"),
        ("[" + "1" * 5000 + "]", "limit"),
        (b'["\xff"]', "not UTF-8 text .* at byte 2"),
        (b'["\xe4\xbd', "not UTF-8 text .* at byte 2"),
    ],
)
def test_what_is_no_list_is_refused_with_its_place(tmp_path: Path, content: str | bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as error:
        list(read_json_list(write(tmp_path, content)))
    assert "\n" not in str(error.value)


def test_a_damaged_record_is_found_without_reading_to_the_end(tmp_path: Path) -> None:
    records = ", ".join('{"id": 1}' for _ in range(200_000))
    path = write(tmp_path, '[{"id": nonsense}, ' + records + "]")
    window = json_text._Window(path)
    window.next_char()
    window.skip()
    with pytest.raises(DataError, match="byte 8"):
        window.value()
    assert window._num_read < 2 * json_text.CHUNK_BYTES


def test_a_record_that_never_ends_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "MAX_RECORD_CHARS", 1 << 20)
    path = write(tmp_path, '[{"id": "' + "x" * (8 << 20) + '"}]')
    with pytest.raises(DataError, match="record at byte 1 is longer than"):
        list(read_json_list(path))


def test_lines_that_are_not_json_are_refused_by_number(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 3 of .* is not valid JSON"):
        list(read_json_lines(write(tmp_path, '{"a": 1}\n\n{"a": }\n')))
    with pytest.raises(DataError, match=r"line 1 of .*NaN is no JSON value"):
        list(read_json_lines(write(tmp_path, '{"a": NaN}\n')))
