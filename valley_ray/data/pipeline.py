"""The data pipeline, top to bottom: record files → tables → decoded clips → committed windows.

One Ray Data execution (execution.py) streams through all windows: a window is committed as soon as its last block has
arrived, while the blocks of later windows are being decoded. Needs an initialised Ray, on a thread of any kind.
"""

import collections
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from valley_ray.data.commit import clear_failure, commit_window, exclusive, mark_failed
from valley_ray.data.config import PipelineConfig
from valley_ray.data.execution import decode_blocks
from valley_ray.data.schema import FAILED, OK
from valley_ray.data.shards import StoreInfo, WindowManifest
from valley_ray.data.sources import join, read_records
from valley_ray.data.stages import DecodeStage, TokenizeStage, decoder_version
from valley_ray.data.windows import (
    Outcome,
    PlannedWindow,
    blocks_of,
    check_order,
    fingerprint,
    known_outcomes,
    ledger,
    open_store,
    plan_windows,
    records_digest,
)
from valley_ray.media.preprocess import check_one_size
from valley_ray.media.sampling import FrameSampling

if TYPE_CHECKING:
    from valley_ray.processor import ValleyProcessor

__all__ = ["Order", "PipelineConfig", "PipelineSummary", "run_pipeline"]

logger = logging.getLogger(__name__)

Order = Sequence[int] | npt.NDArray[np.int64]
"""Rows of the samples table, each once."""


@dataclasses.dataclass(frozen=True)
class PipelineSummary:
    """What came of a run; rows are samples, and `rows_in` = `ok` + `failed` always."""

    rows_in: int
    ok: int
    failed: int
    by_error_class: dict[str, int]
    """Failed samples by class."""
    num_clips: int
    clips_failed: int
    clips_decoded: int
    """Clips that this run decoded or tried to; the others were taken over from earlier runs."""
    num_windows: int
    windows_committed: int
    """Windows that this run committed; the others were there."""
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything that is known before the first clip is decoded."""

    config: PipelineConfig
    processor: "ValleyProcessor"
    sampling: FrameSampling
    clips: pa.Table
    samples: pa.Table
    windows: list[PlannedWindow]
    info: StoreInfo


def run_pipeline(
    config: PipelineConfig,
    *,
    order: Order | Callable[[int], Order] | None = None,
    on_window: Callable[[WindowManifest], None] | None = None,
) -> PipelineSummary:
    """Work through all samples in `order` and commit window after window under `config.windows_dir`.

    Committed windows and finished blocks of an earlier run are kept, so a restart goes on where it ended.

    Args:
        order: rows of the samples table, each once, or a function of their number; None: see `config.seed`.
        on_window: called after each commit, on this thread.

    Raises:
        DataError: nothing can be read, `order` does not fit, or windows_dir holds another store.
        CheckpointError: the model folder's processor cannot be opened.
        ConfigError: the video decoder is not installed, or the processor's crops give frames of many sizes.
    """
    with exclusive(config.windows_dir):
        clear_failure(config.windows_dir)
        try:
            return _run(_plan(config, order), on_window)
        except BaseException as error:
            # Whatever ends this thread, trainers that wait for the next window must hear of it.
            mark_failed(config.windows_dir, error)
            raise


def _plan(config: PipelineConfig, order: Order | Callable[[int], Order] | None) -> _Plan:
    from valley_ray.processor import ValleyProcessor

    processor = ValleyProcessor.from_pretrained(config.model)
    check_one_size(video_crop=processor.video_crop, image_crop=processor.image_crop)
    sampling = config.sampling if config.sampling is not None else processor.sampling
    clips, samples = join([read_records(path, media_root=config.media_root) for path in config.records])
    num_samples = samples.num_rows
    if order is None:
        shuffled = np.random.default_rng(config.seed).permutation(num_samples)
        order = shuffled if config.seed is not None else np.arange(num_samples)
    rows = check_order(order(num_samples) if callable(order) else order, num_samples)
    windows = plan_windows(clips, samples, rows, config.window_size)
    parts = {
        "processor": processor.fingerprint,
        "sampling": sampling.key,
        "decoder": decoder_version(config.video_decoder),
        "records": records_digest(clips, samples),
        "order": fingerprint({"order": rows.tobytes().hex()}),
        "window_size": str(config.window_size),
    }
    info = StoreInfo(fingerprint(parts), parts, num_samples, config.window_size, len(windows))
    return _Plan(config, processor, sampling, clips, samples, windows, info)


def _run(plan: _Plan, on_window: Callable[[WindowManifest], None] | None) -> PipelineSummary:
    start = time.perf_counter()
    config = plan.config
    store = open_store(config.windows_dir, plan.info)
    manifests = store.committed()
    num_there = len(manifests)
    outcomes = known_outcomes(store, plan.clips, plan.info.fingerprint)
    missing = plan.windows[num_there:]
    blocks = [block for window in missing for block in blocks_of(window, plan.clips, outcomes, config.block_size)]
    num_known = len(outcomes)
    logger.info(
        "%d samples, %d windows of which %d are there, %d blocks to decode",
        plan.samples.num_rows,
        len(plan.windows),
        num_there,
        len(blocks),
    )
    arriving = decode_blocks(
        blocks,
        _decode_stage(plan),
        num_cpus=config.decode_cpus,
        max_tasks=config.max_decode_tasks,
        retries=config.task_retries,
    )
    with contextlib.closing(arriving):
        for window in missing:
            _await_clips(window, plan, outcomes, arriving)
            manifest = _commit(window, plan, outcomes)
            manifests.append(manifest)
            _log_progress(manifest, plan, (len(outcomes) - num_known) / (time.perf_counter() - start))
            if on_window is not None:
                on_window(manifest)
    return _summary(plan, manifests, outcomes, num_known=num_known, num_there=num_there, start=start)


def _summary(
    plan: _Plan,
    manifests: list[WindowManifest],
    outcomes: Mapping[str, Outcome],
    *,
    num_known: int,
    num_there: int,
    start: float,
) -> PipelineSummary:
    by_error_class: collections.Counter[str] = collections.Counter()
    for manifest in manifests:
        by_error_class.update(manifest.by_error_class)
    summary = PipelineSummary(
        rows_in=plan.samples.num_rows,
        ok=sum(manifest.num_ok for manifest in manifests),
        failed=sum(manifest.num_failed for manifest in manifests),
        by_error_class=dict(by_error_class),
        num_clips=len(outcomes),
        clips_failed=sum(outcome["status"] == FAILED for outcome in outcomes.values()),
        clips_decoded=len(outcomes) - num_known,
        num_windows=len(plan.windows),
        windows_committed=len(plan.windows) - num_there,
        seconds=time.perf_counter() - start,
    )
    assert summary.rows_in == summary.ok + summary.failed, f"rows lost: {summary}"
    logger.info("data pipeline finished: %s", summary)
    return summary


def _decode_stage(plan: _Plan) -> DecodeStage:
    return DecodeStage(
        directory=plan.config.windows_dir.absolute(),
        fingerprint=plan.info.fingerprint,
        sampling=plan.sampling,
        processing=plan.processor.config,
        backend=plan.config.video_decoder,
        limits=plan.config.sandbox,
        policy=plan.config.fetch,
    )


def _log_progress(manifest: WindowManifest, plan: _Plan, clips_per_s: float) -> None:
    logger.info(
        "window %d of %d committed: %d ok, %d failed %s; %.1f clips/s",
        manifest.index + 1,
        len(plan.windows),
        manifest.num_ok,
        manifest.num_failed,
        dict(manifest.by_error_class) or "",
        clips_per_s,
    )


def _await_clips(
    window: PlannedWindow, plan: _Plan, outcomes: dict[str, Outcome], arriving: Iterator[list[Outcome]]
) -> None:
    """Take outcomes in until those of `window` are there; blocks of later windows may come between."""
    waiting = {plan.clips["clip_id"][row].as_py() for row in window.clips} - outcomes.keys()
    while waiting:
        block = next(arriving, None)
        assert block is not None, f"decoding ended, but {len(waiting)} clips of window {window.index} did not arrive"
        # A block that Ray ran again, after its first result was lost, may come with another shard: the first counts.
        outcomes.update((outcome["clip_id"], outcome) for outcome in block if outcome["clip_id"] not in outcomes)
        waiting -= outcomes.keys()


def _commit(window: PlannedWindow, plan: _Plan, outcomes: dict[str, Outcome]) -> WindowManifest:
    samples = plan.samples.take(window.samples).to_pylist()
    ids = {clip_id for sample in samples for clip_id in sample["clip_ids"]}
    tokenized = TokenizeStage(plan.processor)(samples, outcomes)
    failed = collections.Counter(
        row["error_class"] for row in tokenized.select(["status", "error_class"]).to_pylist() if row["status"] != OK
    )
    manifest = WindowManifest(
        index=window.index,
        first_position=window.first_position,
        num_samples=len(samples),
        num_ok=len(samples) - failed.total(),
        num_failed=failed.total(),
        num_tokens=sum(tokenized["num_tokens"].to_pylist()),
        num_label_tokens=sum(tokenized["num_label_tokens"].to_pylist()),
        num_clips=len(window.clips),
        by_error_class=dict(failed),
        shards=tuple(sorted({outcomes[clip_id]["shard"] for clip_id in ids})),
        fingerprint=plan.info.fingerprint,
        is_last=window.index == len(plan.windows) - 1,
    )
    clips = ledger(window, plan.clips, outcomes, plan.sampling.key)
    commit_window(plan.config.windows_dir, manifest, tokenized, clips)
    return manifest
