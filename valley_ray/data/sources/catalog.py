"""Sources → one catalog on disk: tables of clips and samples in Parquet, streamed, each clip once.

    clips-00000.parquet    CLIPS_SCHEMA, in the order in which clips are first shown
    samples-00000.parquet  SAMPLES_SCHEMA, source after source, in the order of their files
    catalog.json           CatalogSummary; the commit marker, written last: a catalog without it does not exist

Memory holds 12 bytes and a set's overhead per clip and per sample, and a few thousand rows; no file is held whole.
"""

import dataclasses
import hashlib
import itertools
import json
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from valley_ray.data.commit import write_json
from valley_ray.data.mapped import MAPPED_PATTERN, mapped
from valley_ray.data.schema import CLIPS_SCHEMA, FAILED, SAMPLES_SCHEMA
from valley_ray.data.sources.config import SourceConfig, distinct_name
from valley_ray.data.sources.files import last_part, normalized, shown
from valley_ray.data.sources.media import printable
from valley_ray.data.sources.registry import open_source
from valley_ray.data.sources.rows import CatalogRow
from valley_ray.errors import DataError, StorageError

CATALOG_FILE = "catalog.json"
BATCH_ROWS = 4096
"""Rows that are held before they are written, which makes them a row group."""
FILE_ROWS = 1 << 18
"""Rows per Parquet file."""


@dataclasses.dataclass(frozen=True)
class SourceSummary:
    """What one source gave."""

    name: str
    path: str
    """Without user and query of a URL."""
    format: str
    weight: float
    num_samples: int
    num_failed: int
    """Samples that cannot be used."""
    num_clips: int
    """Clips that no earlier source shows."""


@dataclasses.dataclass(frozen=True)
class CatalogSummary:
    """What a catalog holds; samples of source k are `sources[k].num_samples` rows after those of the sources before."""

    num_samples: int
    num_failed: int
    """Samples that cannot be used, each with its reason."""
    num_clips: int
    num_missing: int
    """Clips whose file was looked for in vain; decoding fails them, if they are still missing then."""
    num_renamed: int
    """Samples whose id was there already and has a number behind it now."""
    by_error_class: dict[str, int]
    sources: tuple[SourceSummary, ...]


def write_catalog(sources: Sequence[SourceConfig], directory: Path) -> CatalogSummary:
    """Read all sources and put the catalog into `directory`, in place of one that is there.

    Ids of samples are made distinct, not refused: public sets repeat their own (LLaVA-instruct names an image once for
    each kind of question). The first keeps its id, later ones get `#2`, `#3` and so on, so that sources which are added
    at the end change no id before them.

    Raises:
        DataError: a source cannot be read, or there is nothing in any of them; nothing is changed then.
        StorageError: the disk is full or cannot be written.
    """
    if not sources:
        raise DataError("no source to read; give at least one")
    temporary = directory / f".catalog-{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.mkdir(parents=True)
        summary = _write(sources, temporary)
        _put_in_place(temporary, directory, summary)
    except OSError as error:
        raise StorageError(f"cannot write the catalog in {directory}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary


def read_catalog(directory: Path) -> tuple[pa.Table, pa.Table]:
    """The (clips, samples) of a catalog, mapped; raises DataError where there is none or a file of it is damaged."""
    read_summary(directory)
    clips = mapped(_batches(directory, "clips", CLIPS_SCHEMA), CLIPS_SCHEMA, directory)
    return clips, mapped(_batches(directory, "samples", SAMPLES_SCHEMA), SAMPLES_SCHEMA, directory)


def read_summary(directory: Path) -> CatalogSummary:
    """The summary of a catalog; raises DataError where there is no catalog."""
    path = directory / CATALOG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        sources = tuple(SourceSummary(**source) for source in values.pop("sources"))
        return CatalogSummary(**values, sources=sources)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{directory} holds no catalog ({CATALOG_FILE}: {error}); write one with write_catalog"
        ) from error


class _Tables:
    """The two tables while they are being written, and what must not repeat in them."""

    def __init__(self, directory: Path) -> None:
        self.clips = _TableWriter(directory, "clips", CLIPS_SCHEMA)
        self.samples = _TableWriter(directory, "samples", SAMPLES_SCHEMA)
        self.num_failed = self.num_missing = self.num_renamed = 0
        self.by_error_class: Counter[str] = Counter()
        self._clips: set[bytes] = set()
        self._ids: set[bytes] = set()
        self._numbers: dict[bytes, int] = {}

    def add(self, row: CatalogRow) -> None:
        for clip in row.clips:
            key = bytes.fromhex(clip["clip_id"])
            if key not in self._clips:
                self._clips.add(key)
                self.num_missing += bool(clip["error"])
                self.clips.add(clip)
        if row.sample is not None:
            if row.sample["status"] == FAILED:
                self.num_failed += 1
                self.by_error_class[row.sample["error_class"]] += 1
            self.samples.add(row.sample | {"sample_id": self._distinct(row.sample["sample_id"])})

    def close(self) -> None:
        self.clips.close()
        self.samples.close()

    def _distinct(self, sample_id: str) -> str:
        key = _short_digest(sample_id)
        if key not in self._ids:
            self._ids.add(key)
            return sample_id
        self.num_renamed += 1
        for number in itertools.count(self._numbers.get(key, 2)):
            candidate = f"{sample_id}#{number}"
            if _short_digest(candidate) not in self._ids:
                self._ids.add(_short_digest(candidate))
                self._numbers[key] = number + 1
                return candidate
        raise AssertionError("numbers do not end")


class _TableWriter:
    """Rows of one table → Parquet files of it, a batch at a time."""

    def __init__(self, directory: Path, kind: str, schema: pa.Schema) -> None:
        self.num_rows = 0
        self._directory, self._kind, self._schema = directory, kind, schema
        self._rows: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self.num_rows += 1
        if len(self._rows) == BATCH_ROWS:
            self._flush()
            if self.num_rows % FILE_ROWS == 0:
                self._end_file()

    def close(self) -> None:
        self._flush()
        self._end_file()

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            path = self._directory / f"{self._kind}-{(self.num_rows - 1) // FILE_ROWS:05d}.parquet"
            self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def _end_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _write(sources: Sequence[SourceConfig], directory: Path) -> CatalogSummary:
    tables = _Tables(directory)
    summaries = []
    try:
        for config, name in zip(sources, _names(sources), strict=True):
            summaries.append(_write_source(config, name, tables))
    finally:
        tables.close()
    if not tables.samples.num_rows and not tables.clips.num_rows:
        raise DataError("no record to work on: the sources are empty; give at least one with records or media")
    return CatalogSummary(
        num_samples=tables.samples.num_rows,
        num_failed=tables.num_failed,
        num_clips=tables.clips.num_rows,
        num_missing=tables.num_missing,
        num_renamed=tables.num_renamed,
        by_error_class=dict(tables.by_error_class.most_common()),
        sources=tuple(summaries),
    )


def _write_source(config: SourceConfig, name: str, tables: _Tables) -> SourceSummary:
    before = (tables.samples.num_rows, tables.num_failed, tables.clips.num_rows)
    format_name, rows = open_source(config, name=name)
    for row in rows:
        tables.add(row)
    after = (tables.samples.num_rows, tables.num_failed, tables.clips.num_rows)
    num_samples, num_failed, num_clips = (now - then for now, then in zip(after, before, strict=True))
    return SourceSummary(
        name=name,
        path=shown(normalized(config.path)),
        format=format_name,
        weight=config.weight,
        num_samples=num_samples,
        num_failed=num_failed,
        num_clips=num_clips,
    )


def _names(sources: Sequence[SourceConfig]) -> Iterator[str]:
    """What each source is called: as it says, or by its path, with a number where that is taken."""
    taken = {config.name for config in sources if config.name is not None}
    for config in sources:
        name = config.name
        if name is None:
            name = distinct_name(printable(last_part(normalized(config.path))), taken)
            taken.add(name)
        yield name


def _batches(directory: Path, kind: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for path in sorted(directory.glob(f"{kind}-*.parquet")):
        try:
            with pq.ParquetFile(path) as file:
                if not file.schema_arrow.equals(schema):
                    raise pa.ArrowInvalid(f"its columns are {', '.join(file.schema_arrow.names)}")
                yield from file.iter_batches(batch_size=BATCH_ROWS, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{path} is no table of {kind} ({reason}); write the catalog again") from error


def _put_in_place(temporary: Path, directory: Path, summary: CatalogSummary) -> None:
    (directory / CATALOG_FILE).unlink(missing_ok=True)
    for pattern in ("clips-*.parquet", "samples-*.parquet", MAPPED_PATTERN):
        for old in directory.glob(pattern):
            old.unlink()
    for new in sorted(temporary.iterdir()):
        new.rename(directory / new.name)
    write_json(directory / CATALOG_FILE, dataclasses.asdict(summary))


def _short_digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=12).digest()
