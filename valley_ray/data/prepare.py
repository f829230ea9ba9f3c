"""Sources → a prepared data set in one folder, in which every row is accounted for.

    catalog/      what the sources hold (sources/catalog.py)
    shards/       decoded clips (frame_store.py); any later run over the same clips takes them from here. Beside them,
                  where they are asked for, features of a model's tower (feature_store.py)
    windows/ID/   tokenized samples for training, where a model is given; a folder for each plan (shards.py)
    clips/        the ledger: a row per clip, what came of it and where its frames lie (CLIPS_SCHEMA, Parquet)
    samples/      a row per sample (SAMPLES_SCHEMA, Parquet)
    summary.json  PrepareSummary
    report.html   the same to look at

A run that was stopped is gone on with by running it again. Needs a connected Ray.
"""

import contextlib
import dataclasses
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from valley_ray.data.check import CLIPS_DIR, SAMPLES_DIR, TABLE_PATTERN, check_output
from valley_ray.data.commit import exclusive, storing, write_json
from valley_ray.data.compact import compact_locked, moved_places
from valley_ray.data.config import PrepareConfig
from valley_ray.data.decoding import Decoding, decode_stage
from valley_ray.data.digests import KNOWN, with_digests
from valley_ray.data.feature_store import FeatureSet
from valley_ray.data.features import feature_set, features_of_clips
from valley_ray.data.frame_store import read_json
from valley_ray.data.mapped import pick
from valley_ray.data.metrics import DecodeProgress
from valley_ray.data.outcomes import Outcomes
from valley_ray.data.report import write_report
from valley_ray.data.schema import OK, PENDING, SAMPLES_SCHEMA
from valley_ray.data.shards import WindowStore
from valley_ray.data.sources import mixing_order, read_catalog, write_catalog
from valley_ray.data.stages import decoder_version
from valley_ray.data.summary import (
    COUNTED,
    REPORT_FILE,
    SUMMARY_FILE,
    PrepareSummary,
    counts_by_status,
    counts_of_clips,
)
from valley_ray.data.windows import (
    LEDGER_ROWS,
    Outcome,
    known_outcomes,
    ledger,
    open_store,
    plan_windows,
    remove_leftovers,
    rest_window,
)
from valley_ray.data.writing import Plan, make_plan, write_windows
from valley_ray.media.preprocess import check_one_size
from valley_ray.media.sampling import FrameSampling

if TYPE_CHECKING:
    from valley_ray.processor import ProcessorConfig, ValleyProcessor

__all__ = ["PrepareSummary", "prepare", "read_tables"]

CATALOG_DIR, SHARDS_DIR, WINDOWS_DIR = "catalog", "shards", "windows"
RETRIED_FILE = "retried.json"
ROWS_PER_FILE = 1 << 17
_TOLD = pa.schema([SAMPLES_SCHEMA.field(name) for name in ("num_tokens", "status", "error_class", "error")])
"""Columns of the samples that a run fills."""


@dataclasses.dataclass(frozen=True)
class _Job:
    """Everything that is known before the first clip is decoded."""

    config: PrepareConfig
    output: Path
    clips: pa.Table
    samples: pa.Table
    order: np.ndarray[Any, np.dtype[np.int64]]
    processing: "ProcessorConfig"
    processor: "ValleyProcessor | None"
    sampling: FrameSampling
    features: FeatureSet | None


def prepare(config: PrepareConfig) -> PrepareSummary:
    """Decode every clip of the sources into `config.output`, tokenize their samples where a model is given.

    Progress goes to stderr and to the metrics of Ray's dashboard.

    Raises:
        DataError: a source cannot be read or is empty, another run writes to the folder, or what lies in it is not of
            an earlier one.
        CheckpointError: the model folder's processor, or the tower for features, cannot be opened.
        ConfigError: the video decoder is not installed, the crops give frames of many sizes, or features were asked
            for that the model cannot use.
        StorageError: the disk is full or cannot be written.
    """
    start = time.perf_counter()
    output = config.output.absolute()
    check_output(output)
    with (
        exclusive(output, setting="output"),
        exclusive(output / SHARDS_DIR, setting="output"),
        storing(output, setting="output"),
    ):
        job = _read(config, output)
        outcomes, num_decoded, plan = _decode(job)
        features = features_of_clips(outcomes, output / SHARDS_DIR, job.features, config)
        if config.compact:
            compact_locked(output / SHARDS_DIR)
        clips = moved_places(ledger(job.clips, outcomes, job.sampling.key), output / SHARDS_DIR)
        clips = with_digests(clips, _earlier_ledger(output), num_cpus=config.decode_cpus)
        samples = _samples(job, outcomes, plan)
        _replace_tables(output / CLIPS_DIR, clips)
        _replace_tables(output / SAMPLES_DIR, samples)
        windows_dir = _windows_dir(plan) if plan is not None else None
        summary = PrepareSummary(
            **counts_of_clips(clips, read_tables(output / CLIPS_DIR, COUNTED)),
            **{f"samples_{name}": value for name, value in counts_by_status(samples).items()},
            **{f"features_{name}": value for name, value in dataclasses.asdict(features).items()},
            clips_decoded=num_decoded,
            windows_dir=windows_dir,
            num_windows=len(plan.windows) if plan is not None else 0,
            seconds=round(time.perf_counter() - start, 3),
        )
        assert summary.rows_in == job.clips.num_rows == summary.ok + summary.failed, f"rows lost: {summary}"
        made_with = {"decoder": decoder_version(config.video_decoder), "model": str(config.model or "none")}
        write_report(clips, samples, output / SHARDS_DIR, output / REPORT_FILE, title=output.name, made_with=made_with)
        write_json(output / SUMMARY_FILE, dataclasses.asdict(summary))
    return summary


def read_tables(directory: Path, schema: pa.Schema) -> pa.Table:
    """The rows of all Parquet files of a folder, in the order of their names; none where there is no folder."""
    parts = [pq.read_table(path, schema=schema) for path in sorted(directory.glob("*.parquet"))]
    return pa.concat_tables([schema.empty_table(), *parts])


def _read(config: PrepareConfig, output: Path) -> _Job:
    processing, processor = _processing(config)
    check_one_size(video_crop=processing.video_crop, image_crop=processing.image_crop)
    catalog = write_catalog(config.under(Path.cwd()).sources, output / CATALOG_DIR)
    clips, samples = read_catalog(output / CATALOG_DIR)
    counts = [source.num_samples for source in catalog.sources]
    order = mixing_order([source.weight for source in catalog.sources], counts, config.seed)
    sampling = config.sampling if config.sampling is not None else processing.sampling
    return _Job(config, output, clips, samples, order, processing, processor, sampling, feature_set(config))


def _processing(config: PrepareConfig) -> tuple["ProcessorConfig", "ValleyProcessor | None"]:
    """How clips are cut: as the model's processor does, or as the configuration says."""
    from valley_ray.processor import ProcessorConfig, ValleyProcessor

    if config.model is not None:
        processor = ValleyProcessor.from_pretrained(config.model)
        return processor.config, processor
    crops = {"video_crop": config.video_crop, "image_crop": config.image_crop}
    given = {name: crop for name, crop in crops.items() if crop is not None}
    return ProcessorConfig(num_patches=1).model_copy(update=given), None


def _decode(job: _Job) -> tuple[Mapping[str, Outcome], int, Plan | None]:
    """The outcomes of all clips, how many of them are this run's, and the plan of the windows that it committed."""
    config, shards_dir = job.config, job.output / SHARDS_DIR
    again = _again(shards_dir / RETRIED_FILE, config.retry_failed)
    plan = _plan(job, again) if job.processor is not None else None
    windows = plan.windows if plan is not None else plan_windows(job.clips, job.samples, job.order, config.window_size)
    remove_leftovers(shards_dir)
    stage = decode_stage(config, shards_dir, processing=job.processing, sampling=job.sampling, again=again)
    known = known_outcomes(shards_dir, job.clips, stage.fingerprint)
    if config.retry_failed:
        known = Outcomes((name, one) for name, one in known.items() if one["status"] == OK or one["shard"] is None)
    progress = DecodeProgress(job.clips.num_rows, len(known))
    all_windows = [*windows, rest_window(windows, job.clips)]
    with (
        contextlib.closing(progress),
        Decoding(job.clips, all_windows, known, stage=stage, settings=config, on_outcomes=progress.count) as decoding,
    ):
        if plan is not None:
            write_windows(plan, open_store(job.output / _windows_dir(plan), plan.info), decoding)
        decoding.finish()
    return decoding.outcomes, decoding.num_decoded, plan


def _again(path: Path, retry_failed: bool) -> str:
    """Names the latest run that decoded failed clips again: windows from before it still call them failed."""
    if retry_failed:
        write_json(path, {"run": uuid.uuid4().hex})
    return str(read_json(path)["run"]) if path.exists() else ""


def _plan(job: _Job, again: str) -> Plan:
    assert job.processor is not None, "only a model's processor tokenizes"
    return make_plan(
        job.clips,
        job.samples,
        job.order,
        processor=job.processor,
        sampling=job.sampling,
        decoder=job.config.video_decoder,
        window_size=job.config.window_size,
        shards_dir=os.path.join("..", "..", SHARDS_DIR),
        again=again,
    )


def _windows_dir(plan: Plan) -> str:
    return f"{WINDOWS_DIR}/{plan.info.fingerprint[:12]}"


def _samples(job: _Job, outcomes: Mapping[str, Outcome], plan: Plan | None) -> pa.Table:
    """The samples table with what came of each."""
    if plan is not None:
        told = _tokenized(job, WindowStore(job.output / _windows_dir(plan)))
    else:
        told = _by_clips(job.samples, outcomes)
    table = job.samples
    for field in _TOLD:
        table = table.set_column(SAMPLES_SCHEMA.get_field_index(field.name), field, told[field.name])
    return table


def _tokenized(job: _Job, store: WindowStore) -> pa.Table:
    """What the windows say about each sample (_TOLD), in the order of the table."""
    tables = [store.read(manifest).table.select(_TOLD.names).cast(_TOLD) for manifest in store.committed()]
    places = np.empty(len(job.order), np.int64)
    places[job.order] = np.arange(len(job.order))
    return pick(pa.concat_tables([_TOLD.empty_table(), *tables]), places)


def _by_clips(samples: pa.Table, outcomes: Mapping[str, Outcome]) -> pa.Table:
    """What comes of each sample (_TOLD) by its clips alone."""
    parts = [_TOLD.empty_table()]
    for batch in samples.select(["clip_ids", *_TOLD.names]).to_batches(max_chunksize=LEDGER_ROWS):
        rows = [row | _status_of(row, outcomes) for row in batch.to_pylist()]
        parts.append(pa.Table.from_pylist(rows, schema=_TOLD))
    return pa.concat_tables(parts)


def _status_of(sample: Mapping[str, Any], outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """What comes of a sample by its clips alone."""
    if sample["status"] != PENDING:
        return {}
    bad = next((outcomes[one] for one in sample["clip_ids"] if outcomes[one]["status"] != OK), None)
    return {"status": OK} if bad is None else {name: bad[name] for name in ("status", "error_class", "error")}


def _earlier_ledger(output: Path) -> pa.Table:
    has_digest = pc.greater(pc.field("content_digest"), "")
    paths = sorted((output / CLIPS_DIR).glob(TABLE_PATTERN))
    parts = (pq.read_table(path, schema=KNOWN, filters=has_digest) for path in paths)
    return pa.concat_tables([KNOWN.empty_table(), *parts])


def _replace_tables(directory: Path, table: pa.Table) -> None:
    """Put `table` into a folder of Parquet files, in place of what it holds."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for first in range(0, max(1, table.num_rows), ROWS_PER_FILE):
        path = temporary / f"part-{first // ROWS_PER_FILE:05d}.parquet"
        pq.write_table(table.slice(first, ROWS_PER_FILE), path)
    for old in directory.glob(TABLE_PATTERN):
        old.unlink()
    with contextlib.suppress(FileNotFoundError):
        directory.rmdir()
    temporary.rename(directory)
