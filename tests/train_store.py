"""A small store of random clips with tokenized conversations, written with the pipeline's own writers."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa

from valley_ray.chat.conversation import Conversation, Message
from valley_ray.data import commit, schema, shards
from valley_ray.media.frames import VideoFrames
from valley_ray.processor import ValleyProcessor

ANSWERS = ("A red circle moves left.", "A blue square moves right.", "One.", "Yes no yes.")


def make_store(
    directory: Path,
    model: Path,
    *,
    num_samples: int,
    window_size: int = 8,
    failed: tuple[int, ...] = (),
    seed: int = 0,
    sources: tuple[str, ...] = ("records.json",),
    num_committed: int | None = None,
) -> Path:
    """Write `num_samples` rows in windows (`failed` ones without tokens, every fifth text-only); return the folder.

    Samples come from `sources` in turn. `num_committed`: only so many windows of them, `write_window` adds others.
    """
    directory.mkdir(parents=True)
    processor = ValleyProcessor.from_pretrained(model)
    num_windows = -(-num_samples // window_size)
    parts = {"processor": processor.fingerprint}
    of_source = {name: len(range(place, num_samples, len(sources))) for place, name in enumerate(sources)}
    info = shards.StoreInfo("f", parts, num_samples, window_size, num_windows, sources=of_source)
    commit.write_json(directory / shards.STORE_FILE, dataclasses.asdict(info))
    for index in range(num_windows if num_committed is None else num_committed):
        positions = range(index * window_size, min(num_samples, (index + 1) * window_size))
        is_last = index == num_windows - 1
        write_window(directory, processor, index, positions, failed, is_last=is_last, seed=seed, sources=sources)
    return directory


def write_window(
    directory: Path,
    processor: ValleyProcessor,
    index: int,
    positions: range,
    failed: tuple[int, ...],
    *,
    is_last: bool,
    seed: int,
    sources: tuple[str, ...] = ("records.json",),
) -> None:
    """Commit one window with a shard of its own."""
    shard = f"shard-{index:05d}.arrow"
    rows = []
    with commit.ShardWriter(directory, shard, fingerprint="f") as writer:
        for position in positions:
            rng = np.random.default_rng([seed, position])
            side = processor.video_crop.size
            frames = rng.integers(0, 256, (int(rng.integers(2, 5)), side, side, 3), dtype=np.uint8)
            row = writer.append(clip_values(f"clip-{position}"), VideoFrames(frames, np.zeros(len(frames))))
            clips = [] if position % 5 == 4 else [(shard, row, len(frames))]
            made = sample_row(processor, position, clips) if position not in failed else failed_row(position)
            rows.append(made | {"source": sources[position % len(sources)]})
    table = pa.Table.from_pylist(rows, schema=schema.WINDOW_SCHEMA)
    num_ok = sum(row["status"] == schema.OK for row in rows)
    manifest = shards.WindowManifest(
        index=index,
        first_position=positions.start,
        num_samples=len(rows),
        num_ok=num_ok,
        num_failed=len(rows) - num_ok,
        num_tokens=sum(row["num_tokens"] for row in rows),
        num_label_tokens=sum(row["num_label_tokens"] for row in rows),
        num_clips=len(rows),
        by_error_class={},
        shards=(shard,),
        fingerprint="f",
        is_last=is_last,
    )
    commit.commit_window(directory, manifest, table, schema.CLIPS_SCHEMA.empty_table())


def sample_row(processor: ValleyProcessor, position: int, clips: list[tuple[str, int, int]]) -> dict[str, object]:
    """A tokenized question and answer about `clips` (shard, row, number of frames)."""
    question = "<video>\nWhat is moving?" if clips else "How many shapes do you see?"
    answer = ANSWERS[position % len(ANSWERS)]
    conversation = Conversation((Message("user", question), Message("assistant", answer)))
    encoded = processor.encode_training(conversation, [num_frames for _, _, num_frames in clips])
    return {
        "sample_id": f"sample-{position}",
        "input_ids": encoded.input_ids.tolist(),
        "labels": encoded.labels.tolist(),
        "num_tokens": len(encoded.input_ids),
        "num_label_tokens": encoded.num_label_tokens,
        "clips": [{"shard": shard, "row": row} for shard, row, _ in clips],
        "status": schema.OK,
        "error_class": "",
        "error": "",
    }


def failed_row(position: int) -> dict[str, object]:
    """A row that the pipeline could not make."""
    empty = {"input_ids": [], "labels": [], "num_tokens": 0, "num_label_tokens": 0, "clips": []}
    status = {"status": schema.FAILED, "error_class": "media_corrupt", "error": "broken"}
    return {"sample_id": f"sample-{position}", **empty, **status}


def clip_values(clip_id: str) -> dict[str, object]:
    """Scalar columns of a decoded clip."""
    values = {"clip_id": clip_id, "status": schema.OK, "error_class": "", "error": "", "attempts": 1}
    return {**values, "etag": "e", "content_digest": ""}
