"""Answers on disk as they come, a JSON line each, so that no answer is asked for twice. Knows no model and no Ray.

A block of questions has one file, to which whoever works on the block appends; a line that a death cut short counts
for nothing. Files of one folder belong to one model with one set of settings.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from valley_ray.data.schema import OK
from valley_ray.errors import StorageError

CLIPS_TYPE = pa.list_(pa.struct([("shard", pa.string()), ("row", pa.int32())]))
"""Where the frames lie that were shown."""

LEDGER_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("prediction", pa.string()),
        ("finish_reason", pa.string()),
        ("num_prompt_tokens", pa.int32()),
        ("num_new_tokens", pa.int32()),
        ("clips", CLIPS_TYPE),
        ("status", pa.string()),
        ("error_class", pa.string()),
        ("error", pa.string()),
    ]
)

Answer = dict[str, Any]
"""One line: a row of LEDGER_SCHEMA, or another thing with a `key` that its reader knows."""


class LedgerWriter:
    """Appends answers to one file, each on disk when `append` returns; a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Self:
        self._file = self._path.open("ab", buffering=0)
        if self._file.tell() and not _ends_with_a_line(self._path):
            self._file.write(b"\n")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, answer: Mapping[str, Any]) -> None:
        """Write one answer; raises StorageError where the disk is full."""
        line = json.dumps(answer, ensure_ascii=True).encode() + b"\n"
        try:
            num_written = self._file.write(line)
        except OSError as error:
            raise StorageError(f"cannot write {self._path} ({error.strerror}); make room and run again") from error
        if num_written != len(line):
            raise StorageError(f"cannot write {self._path}: the disk is full; make room and run again")


def read_answers(path: Path) -> dict[str, Answer]:
    """The whole lines of one file by their key, the first of each; none where there is no file."""
    answers: dict[str, Answer] = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    for line in lines[:-1]:
        try:
            answer = json.loads(line)
        except ValueError:
            continue
        if isinstance(answer, dict) and isinstance(answer.get("key"), str):
            answers.setdefault(answer["key"], answer)
    return answers


def read_status(directory: Path) -> dict[str, str]:
    """Status by key over all files of a folder; ok where any of them says so."""
    found: dict[str, str] = {}
    for path in sorted(directory.glob("*.jsonl")):
        for key, answer in read_answers(path).items():
            if found.get(key) != OK:
                found[key] = answer["status"]
    return found


def read_batches(directory: Path) -> Iterator[pa.RecordBatch]:
    """The answers of all files of a folder (LEDGER_SCHEMA), a batch per file, each key once: one that is ok, else the
    first."""
    wanted, seen = read_status(directory), set()
    for path in sorted(directory.glob("*.jsonl")):
        rows = []
        for key, answer in read_answers(path).items():
            if key not in seen and answer["status"] == wanted[key]:
                seen.add(key)
                rows.append(answer)
        yield pa.RecordBatch.from_pylist(rows, schema=LEDGER_SCHEMA)


def _ends_with_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
