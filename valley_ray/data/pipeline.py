"""The data pipeline, top to bottom: record files → tables → decoded clips → committed windows.

One Ray Data execution (execution.py) streams through all windows: a window is committed as soon as its last block has
arrived, while the blocks of later windows are being decoded. Needs an initialised Ray, on a thread of any kind.
"""

import collections
import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from valley_ray.data.commit import clear_failure, exclusive, mark_failed
from valley_ray.data.config import PipelineConfig
from valley_ray.data.decoding import Decoding, decode_stage
from valley_ray.data.schema import FAILED
from valley_ray.data.shards import WindowManifest
from valley_ray.data.sources import join, read_records
from valley_ray.data.windows import check_order, known_outcomes, open_store, remove_leftovers
from valley_ray.data.writing import OnWindow, Plan, make_plan, write_windows
from valley_ray.media.preprocess import check_one_size

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
    with _writing(config):
        clear_failure(config.windows_dir)
        try:
            return _run(config, _plan(config, order), on_window)
        except BaseException as error:
            # Whatever ends this thread, trainers that wait for the next window must hear of it.
            mark_failed(config.windows_dir, error)
            raise


@contextlib.contextmanager
def _writing(config: PipelineConfig) -> Iterator[None]:
    """Be the only writer of the store, and of the shards where they lie elsewhere."""
    with contextlib.ExitStack() as locks:
        locks.enter_context(exclusive(config.windows_dir))
        if _shards_dir(config).absolute() != config.windows_dir.absolute():
            locks.enter_context(exclusive(_shards_dir(config), setting="shards_dir"))
        yield


def _shards_dir(config: PipelineConfig) -> Path:
    return config.shards_dir if config.shards_dir is not None else config.windows_dir


def _plan(config: PipelineConfig, order: Order | Callable[[int], Order] | None) -> Plan:
    from valley_ray.processor import ValleyProcessor

    processor = ValleyProcessor.from_pretrained(config.model)
    check_one_size(video_crop=processor.video_crop, image_crop=processor.image_crop)
    files = zip(config.records, config.roots, config.source_names, strict=True)
    clips, samples = join([read_records(path, media_root=root, name=name) for path, root, name in files])
    num_samples = samples.num_rows
    if order is None:
        shuffled = np.random.default_rng(config.seed).permutation(num_samples)
        order = shuffled if config.seed is not None else np.arange(num_samples)
    return make_plan(
        clips,
        samples,
        check_order(order(num_samples) if callable(order) else order, num_samples),
        processor=processor,
        sampling=config.sampling if config.sampling is not None else processor.sampling,
        decoder=config.video_decoder,
        window_size=config.window_size,
        shards_dir=os.path.relpath(_shards_dir(config), config.windows_dir),
    )


def _run(config: PipelineConfig, plan: Plan, on_window: OnWindow | None) -> PipelineSummary:
    start = time.perf_counter()
    store = open_store(config.windows_dir, plan.info)
    shards_dir = _shards_dir(config)
    remove_leftovers(shards_dir)
    num_there = len(store.committed())
    stage = decode_stage(config, shards_dir, processing=plan.processor.config, sampling=plan.sampling)
    known = known_outcomes(shards_dir, plan.clips, stage.fingerprint)
    with Decoding(plan.clips, plan.windows, known, stage=stage, settings=config) as decoding:
        logger.info(
            "%d samples, %d windows of which %d are there, %d blocks to decode",
            plan.samples.num_rows,
            len(plan.windows),
            num_there,
            decoding.num_blocks,
        )

        def committed(manifest: WindowManifest) -> None:
            _log_progress(manifest, plan, decoding.num_decoded / (time.perf_counter() - start))
            if on_window is not None:
                on_window(manifest)

        manifests = write_windows(plan, store, decoding, committed)
    return _summary(plan, manifests, decoding, num_there=num_there, start=start)


def _summary(
    plan: Plan, manifests: list[WindowManifest], decoding: Decoding, *, num_there: int, start: float
) -> PipelineSummary:
    by_error_class: collections.Counter[str] = collections.Counter()
    for manifest in manifests:
        by_error_class.update(manifest.by_error_class)
    outcomes = decoding.outcomes
    summary = PipelineSummary(
        rows_in=plan.samples.num_rows,
        ok=sum(manifest.num_ok for manifest in manifests),
        failed=sum(manifest.num_failed for manifest in manifests),
        by_error_class=dict(by_error_class),
        num_clips=len(outcomes),
        clips_failed=sum(outcome["status"] == FAILED for outcome in outcomes.values()),
        clips_decoded=decoding.num_decoded,
        num_windows=len(plan.windows),
        windows_committed=len(plan.windows) - num_there,
        seconds=time.perf_counter() - start,
    )
    assert summary.rows_in == summary.ok + summary.failed, f"rows lost: {summary}"
    logger.info("data pipeline finished: %s", summary)
    return summary


def _log_progress(manifest: WindowManifest, plan: Plan, clips_per_s: float) -> None:
    logger.info(
        "window %d of %d committed: %d ok, %d failed %s; %.1f clips/s",
        manifest.index + 1,
        len(plan.windows),
        manifest.num_ok,
        manifest.num_failed,
        dict(manifest.by_error_class) or "",
        clips_per_s,
    )
