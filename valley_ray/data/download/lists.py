"""Readers of lists: text, CSV, JSON lines, JSON, Parquet → records, a file at a time; each error names its file."""

import csv
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from valley_ray.errors import DataError


def read_list(path: Path, *, url_key: str, limit: int | None) -> Iterator[Mapping[str, Any]]:
    """Records of a .txt (its lines under `url_key`; blank ones and comments left out), .csv, .jsonl, .json or .parquet.

    Raises:
        DataError: no such file, another ending, no column `url_key`, or a file that does not read so.
    """
    readers = {".txt": _lines, ".csv": _csv, ".jsonl": _json_lines, ".json": _json, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: a list must end in {', '.join(readers)}; rename or convert it")
    try:
        yield from itertools.islice(reader(path, url_key), limit)
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as {path.suffix} ({' '.join(str(error).split())[:200]})") from error


def read_json(path: Path, wanted: type[list[Any]] | type[dict[str, Any]], what: str) -> Any:
    """The JSON list or object in a file; raises DataError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(value, wanted):
        name = "list" if wanted is list else "object"
        raise DataError(f"{path}: {what} must be a JSON {name}, got {type(value).__name__}")
    return value


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot read {path} ({error.strerror or error}); give the path of a list")


def _lines(path: Path, url_key: str) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip() and not line.startswith("#"):
                yield {url_key: line.strip()}


def _csv(path: Path, url_key: str) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        _check_column(path, url_key, reader.fieldnames or ())
        yield from reader


def _json_lines(path: Path, url_key: str) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                yield _record(json.loads(line), url_key)


def _json(path: Path, url_key: str) -> Iterator[Mapping[str, Any]]:
    for record in read_json(path, list, "a list"):
        yield _record(record, url_key)


def _parquet(path: Path, url_key: str) -> Iterator[Mapping[str, Any]]:
    with pq.ParquetFile(path) as file:
        _check_column(path, url_key, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=4096):
            yield from batch.to_pylist()


def _record(value: Any, url_key: str) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {url_key: value if isinstance(value, str) else repr(value)}


def _check_column(path: Path, url_key: str, columns: Any) -> None:
    if url_key not in columns:
        raise DataError(f"{path} has no column {url_key!r} (columns: {', '.join(columns)}); set url_key")
