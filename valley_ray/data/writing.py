"""A plan's samples → committed windows, as the clips that they show arrive. Knows the store; no Ray of its own."""

import collections
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from valley_ray.data.commit import commit_window
from valley_ray.data.decoding import Decoding
from valley_ray.data.mapped import pick
from valley_ray.data.schema import OK
from valley_ray.data.shards import StoreInfo, WindowManifest, WindowStore
from valley_ray.data.stages import TokenizeStage, decoder_version
from valley_ray.data.windows import PlannedWindow, fingerprint, ledger, plan_windows, records_digest
from valley_ray.media.decode import Backend
from valley_ray.media.sampling import FrameSampling

if TYPE_CHECKING:
    from valley_ray.processor import ValleyProcessor

OnWindow = Callable[[WindowManifest], None]
"""Called after each commit, on the committing thread."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the windows of one store will hold; known before the first clip is decoded."""

    processor: "ValleyProcessor"
    sampling: FrameSampling
    clips: pa.Table
    samples: pa.Table
    windows: list[PlannedWindow]
    info: StoreInfo


def make_plan(
    clips: pa.Table,
    samples: pa.Table,
    order: npt.NDArray[np.int64],
    *,
    processor: "ValleyProcessor",
    sampling: FrameSampling,
    decoder: Backend,
    window_size: int,
    shards_dir: str,
    again: str = "",
) -> Plan:
    """Cut `order` (int64 [N], rows of `samples`) into windows; the plan's fingerprint follows all that is in them.

    Args:
        shards_dir: relative to the folder of the windows, see `StoreInfo`.
        again: not empty where clips are decoded again, which may make other windows of the same things.
    """
    parts = {
        "processor": processor.fingerprint,
        "sampling": sampling.key,
        "decoder": decoder_version(decoder),
        "records": records_digest(clips, samples),
        "order": fingerprint({"order": order.tobytes().hex()}),
        "window_size": str(window_size),
    }
    parts |= {"again": again} if again else {}
    windows = plan_windows(clips, samples, order, window_size)
    sources = collections.Counter(samples["source"].to_pylist())
    info = StoreInfo(fingerprint(parts), parts, samples.num_rows, window_size, len(windows), shards_dir, dict(sources))
    return Plan(processor, sampling, clips, samples, windows, info)


def write_windows(
    plan: Plan, store: WindowStore, decoding: Decoding, on_window: OnWindow | None = None
) -> list[WindowManifest]:
    """Commit the windows that `store` lacks, each as soon as its clips are there; returns the manifests of all."""
    manifests = store.committed()
    clip_ids = plan.clips.select(["clip_id"])
    for window in plan.windows[len(manifests) :]:
        # Its clips, and those that windows of an earlier run were the first to show.
        shown = pick(plan.samples.select(["clip_ids"]), window.samples)["clip_ids"].to_pylist()
        decoding.wait({*pick(clip_ids, window.clips)["clip_id"].to_pylist(), *(one for ids in shown for one in ids)})
        manifest = _commit(window, plan, store.directory, decoding)
        manifests.append(manifest)
        if on_window is not None:
            on_window(manifest)
    return manifests


def _commit(window: PlannedWindow, plan: Plan, directory: Path, decoding: Decoding) -> WindowManifest:
    samples = pick(plan.samples, window.samples).to_pylist()
    outcomes = decoding.outcomes
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
        shards=tuple(sorted({outcomes[clip_id]["shard"] for clip_id in ids} - {None})),
        fingerprint=plan.info.fingerprint,
        is_last=window.index == len(plan.windows) - 1,
    )
    clips = ledger(pick(plan.clips, window.clips), outcomes, plan.sampling.key)
    commit_window(directory, manifest, tokenized, clips)
    return manifest
