"""The work on a row as plain callables: decode clips into a shard, tokenize samples. Ray calls them, none knows Ray."""

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from valley_ray.chat.conversation import Conversation, Message
from valley_ray.config import validate_config
from valley_ray.data.commit import ShardWriter
from valley_ray.data.frame_store import read_shard_records
from valley_ray.data.journal import THIS_MACHINE, BlockJournal, IsAlive
from valley_ray.data.schema import FAILED, OK, PENDING, WINDOW_SCHEMA, uris_of
from valley_ray.data.sources.objects import is_object, read_object
from valley_ray.errors import (
    ConfigError,
    CorruptMediaError,
    DataError,
    DecodeCrashError,
    DecodeMemoryError,
    DecodeTimeoutError,
    DecodeWorkerError,
    SourceNotFoundError,
    ValleyError,
)
from valley_ray.fetch import FetchPolicy, fetch
from valley_ray.media.decode import Backend
from valley_ray.media.frames import VideoFrames
from valley_ray.media.preprocess import Crop
from valley_ray.media.sampling import FrameSampling
from valley_ray.media.sandbox import Sandbox, SandboxLimits

if TYPE_CHECKING:
    from valley_ray.processor import ProcessorConfig, ValleyProcessor

BLOCK_SCHEMA = pa.schema(
    [
        ("window", pa.int32()),
        ("block", pa.int32()),
        ("clip_id", pa.string()),
        ("kind", pa.string()),
        ("uri", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("size_bytes", pa.int64()),
        ("etag", pa.string()),
        ("error", pa.string()),
    ]
)
"""What DecodeStage takes: clips of one block of one window, by path only. error: see CLIPS_SCHEMA."""

OUTCOME_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("status", pa.string()),
        ("error_class", pa.string()),
        ("error", pa.string()),
        ("attempts", pa.int32()),
        ("num_frames", pa.int32()),
        ("content_digest", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int32()),
        ("duration_s", pa.float64()),
        ("fps", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
"""What DecodeStage gives back, a row for each row in; the frames stay on disk, in row `row` of `shard`. duration_s to
height: what the container says of the file, as in CLIPS_SCHEMA."""

TRIED_AGAIN = (DecodeCrashError, DecodeTimeoutError, DecodeMemoryError)
"""Failures that another process may have caused; the others come out the same however often a file is decoded."""
MAX_ATTEMPTS = 2


def decoder_version(backend: Backend) -> str:
    """Name of what turns bytes into frames; frames of another decoder are other frames.

    Raises:
        ConfigError: the decoder is not installed here.
    """
    if backend == "pyav":
        return f"pyav-{importlib.metadata.version('av')}"
    try:
        return f"{backend}-{importlib.metadata.version(backend)}"
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(f"video_decoder={backend} is not installed here; use pyav") from error


def outcomes_in(shard: Path) -> tuple[str, list[dict[str, Any]]]:
    """The fingerprint of a shard, and its rows as rows of OUTCOME_SCHEMA with `etag` and `size_bytes` beside them."""
    fingerprint, records = read_shard_records(shard)
    names = [name for name in (*OUTCOME_SCHEMA.names, "etag", "size_bytes") if records and name in records[0]]
    return fingerprint, [
        {name: record[name] for name in names}
        | {"shard": shard.name, "row": row, "width": record.get("source_width"), "height": record.get("source_height")}
        for row, record in enumerate(records)
    ]


@dataclass(frozen=True)
class DecodeStage:
    """Block of paths (BLOCK_SCHEMA) → a shard in `directory` and its outcomes (OUTCOME_SCHEMA).

    Needs a fraction of a CPU and the memory of a few clips. A clip that fails is a row with its reason; only what is
    no fault of a clip (a full disk, say) is raised. Called again with the same block, after its result was lost or its
    worker died, it takes the shard that is there, or goes on past a clip that has killed its worker twice. The end of a
    whole node is no clip's doing: `node` names the one that this runs on, `is_alive` tells of others.
    """

    directory: Path
    fingerprint: str
    sampling: FrameSampling
    processing: "ProcessorConfig"
    backend: Backend
    limits: SandboxLimits
    policy: FetchPolicy
    max_deaths: int = 3
    """Runs over a block that may end between two clips, by the death of the worker, before it is given up."""
    again: str = ""
    """Not empty where the clips were decoded before and their shards shall not count."""

    def __call__(self, block: pa.Table, *, node: str = THIS_MACHINE, is_alive: IsAlive = lambda name: True) -> pa.Table:
        clips = block.to_pylist()
        name = self._shard_name(clips)
        if not (self.directory / name).exists():
            with BlockJournal(self.directory, name, node=node, is_alive=is_alive) as journal:
                if (times := journal.deaths_between) > self.max_deaths:
                    raise DataError(f"{name}: its worker died {times} times between two clips; see the worker's log")
                with ShardWriter(self.directory, name, fingerprint=self.fingerprint) as shard:
                    for clip in clips:
                        self._append(clip, shard, journal)
        # Read back rather than kept: where another run over this block was faster, its shard is the one that counts.
        return pa.Table.from_pylist(outcomes_in(self.directory / name)[1], schema=OUTCOME_SCHEMA)

    def _shard_name(self, clips: Sequence[Mapping[str, Any]]) -> str:
        """The same for the same work, so that a block which is run again finds what the run before it has finished."""
        key = [
            self.fingerprint,
            self.again,
            [[clip[name] for name in ("clip_id", "etag", "size_bytes")] for clip in clips],
        ]
        digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=6).hexdigest()
        return f"shard-{clips[0]['window']:05d}-{clips[0]['block']:04d}-{digest}.arrow"

    def _append(self, clip: Mapping[str, Any], shard: ShardWriter, journal: BlockJournal) -> None:
        journal.begin(clip["clip_id"])
        outcome, frames = self._decode(clip, deaths=journal.deaths[clip["clip_id"]])
        said = _said(frames)
        of_file = said | {"source_width": said["width"], "source_height": said["height"]}
        key = {name: clip[name] for name in ("clip_id", "etag", "size_bytes")}
        shard.append(key | outcome | of_file, frames)
        journal.end()

    def _decode(self, clip: Mapping[str, Any], *, deaths: int) -> tuple[dict[str, Any], VideoFrames | None]:
        digest = ""
        outcome: dict[str, Any] = {"status": FAILED, "error_class": DecodeWorkerError.code, "attempts": deaths}
        outcome |= {"error": f"{clip['uri']}: the worker that decoded it died {deaths} times"}
        for attempt in range(deaths + 1, MAX_ATTEMPTS + 1):
            outcome = {"status": OK, "error_class": "", "error": "", "attempts": attempt}
            try:
                sources = [_source_of(uri, self.policy) for uri in uris_of(clip["kind"], clip["uri"])]
                digest = _digest(sources)
                return outcome | {"content_digest": digest}, self._frames(sources, clip)
            except ValleyError as error:
                reason = clip["error"] if isinstance(error, SourceNotFoundError) else None
                outcome |= {"status": FAILED, "error_class": error.code, "error": reason or str(error)}
                if not isinstance(error, TRIED_AGAIN):
                    break
        return outcome | {"content_digest": digest}, None

    def _frames(self, sources: Sequence[Path | bytes], clip: Mapping[str, Any]) -> VideoFrames:
        sampling, crop = self._plan_of(clip)
        sandbox = _sandbox(self.limits, self.backend)
        names = [Path(uri).name for uri in uris_of(clip["kind"], clip["uri"])]
        parts = [
            sandbox.frames(source, sampling, crop=crop, name=name) for source, name in zip(sources, names, strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        if len({part.frames_THWC.shape[1:] for part in parts}) > 1:
            raise CorruptMediaError(f"{names[0]} ...: the images of one clip differ in size; ask for a crop or stretch")
        frames_THWC = np.concatenate([part.frames_THWC for part in parts])
        return VideoFrames(frames_THWC, np.concatenate([part.pts_seconds for part in parts]), parts[0].info)

    def _plan_of(self, clip: Mapping[str, Any]) -> tuple[FrameSampling, Crop]:
        """How the clip is read; its own window replaces the sampling's."""
        if clip["kind"] in ("image", "images"):
            return self.processing.media_plan("image")
        window = {key: clip[key] for key in ("start_s", "end_s") if clip[key] is not None}
        values = self.sampling.model_dump() | window
        sampling = validate_config(FrameSampling, values, source=f"the window of {clip['uri']}")
        return self.processing.media_plan("video", sampling, is_folder=clip["kind"] == "frames")


def _said(frames: VideoFrames | None) -> dict[str, Any]:
    """The columns that tell what the container said, upright; null where it did not."""
    if frames is None or frames.info is None:
        return dict.fromkeys(("duration_s", "fps", "width", "height"))
    width, height = frames.info.upright_size
    return {
        "duration_s": frames.info.duration_s,
        "fps": frames.info.fps or None,
        "width": width or None,
        "height": height or None,
    }


def _source_of(uri: str, policy: FetchPolicy) -> Path | bytes:
    """Local files are read by the decoder itself, whatever their size; the rest goes through the fetch policy."""
    if is_object(uri):
        return read_object(uri, max_bytes=policy.max_bytes)
    return fetch(uri, policy).source if "://" in uri else Path(uri)


def _digest(sources: Sequence[Path | bytes]) -> str:
    """Hex digest of the bytes, where all of them were read anyway; else empty."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sources:
        if isinstance(source, Path):
            return ""
        digest.update(source)
    return digest.hexdigest()


@functools.cache
def _sandbox(limits: SandboxLimits, backend: Backend) -> Sandbox:
    """The one decoding child of this worker process; it ends with it."""
    return Sandbox(limits=limits, backend=backend)


@dataclass(frozen=True)
class TokenizeStage:
    """Rows of the samples table and the outcomes of their clips → rows of a window (WINDOW_SCHEMA), one for one.

    Needs one CPU for about a millisecond per sample, no memory to speak of.
    """

    processor: "ValleyProcessor"

    def __call__(self, samples: Sequence[Mapping[str, Any]], outcomes: Mapping[str, Mapping[str, Any]]) -> pa.Table:
        """`outcomes` by clip_id; a sample with a failed clip fails with that clip's class and reason."""
        rows = [self._row(sample, [outcomes[clip] for clip in sample["clip_ids"]]) for sample in samples]
        return pa.Table.from_pylist(rows, schema=WINDOW_SCHEMA)

    def _row(self, sample: Mapping[str, Any], clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        row: dict[str, Any] = {"sample_id": sample["sample_id"], "source": sample.get("source", "")}
        row["clips"] = [{"shard": c["shard"], "row": c["row"]} for c in clips]
        if sample["status"] != PENDING:
            return row | _failure(sample["error_class"], sample["error"])
        bad = next((clip for clip in clips if clip["status"] != OK), None)
        if bad is not None:
            return row | _failure(bad["error_class"], bad["error"])
        try:
            encoded = self._encode(sample, [clip["num_frames"] for clip in clips])
        except ValleyError as error:
            return row | _failure(error.code, str(error))
        return row | encoded | {"status": OK, "error_class": "", "error": ""}

    def _encode(self, sample: Mapping[str, Any], num_frames: Sequence[int]) -> dict[str, Any]:
        conversation = Conversation(tuple(Message(**turn) for turn in sample["conversation"]))
        encoded = self.processor.encode_training(conversation, num_frames)
        return {
            "input_ids": encoded.input_ids.tolist(),
            "labels": encoded.labels.tolist(),
            "num_tokens": len(encoded.input_ids),
            "num_label_tokens": encoded.num_label_tokens,
        }


def _failure(error_class: str, error: str) -> dict[str, Any]:
    empty: dict[str, Any] = {"input_ids": [], "labels": [], "num_tokens": 0, "num_label_tokens": 0, "clips": []}
    return empty | {"status": FAILED, "error_class": error_class, "error": error}
