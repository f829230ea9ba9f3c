"""What a run would read: how many samples, and how long some of them are once tokenized. Decodes nothing, knows no Ray.

In mode shards the store knows it all; in mode overlap the record files are counted, and some records, drawn with the
run's seed, are tokenized as the pipeline would: clips whose files are there count as decoded.
"""

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from valley_ray.data.config import PipelineConfig
from valley_ray.data.schema import FAILED, OK, PENDING
from valley_ray.data.shards import WindowStore
from valley_ray.train.check import pipeline_config
from valley_ray.train.config import TrainConfig

if TYPE_CHECKING:
    from pathlib import Path

    from valley_ray.processor import ValleyProcessor

NUM_SAMPLED = 64
"""Records of each file that are tokenized."""

MAX_WINDOWS = 64
"""Windows of a store whose lengths are looked at."""

FRAMES_AT_A_RATE = 8
"""Frames assumed of a video that is sampled at a rate."""


@dataclass(frozen=True)
class DataFacts:
    """What is known of the samples."""

    what: str
    """Where they come from."""
    num_samples: int
    """Rows that can be trained on: the ok ones of a store, or all records."""
    num_failed: int
    """Rows of a store that cannot."""
    sources: Mapping[str, int]
    """All rows, by the source that `data.weights` may name."""
    lengths: tuple[int, ...]
    """Tokens of the samples that were looked at."""
    label_lengths: tuple[int, ...]
    """How many of them are labels."""
    num_unknown: int
    """Labels of records that are the tokenizer's unknown token: words that the model cannot learn."""
    failures: Mapping[str, int]
    """Of the records that were tokenized, those that fail, by reason."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sample that was looked at."""
        return max(self.lengths, default=0)


def read_facts(config: TrainConfig, processor: "ValleyProcessor") -> DataFacts:
    """Look at the data of `config`, which `check_run` has let through.

    Raises:
        DataError: a record file cannot be read, or a window is damaged.
    """
    settings = pipeline_config(config)
    if settings is not None:
        return _of_records(settings, processor, seed=config.seed)
    assert config.data.windows_dir is not None, "mode shards has a windows_dir"
    return _of_store(config.data.windows_dir)


def _of_store(folder: "Path") -> DataFacts:
    store = WindowStore(folder)
    manifests, info = store.committed(), store.info()
    lengths: list[int] = []
    labels: list[int] = []
    failures: Counter[str] = Counter()
    for manifest in manifests:
        failures.update(manifest.by_error_class)
    for manifest in manifests[:: -(-len(manifests) // MAX_WINDOWS)]:
        window = store.read(manifest)
        lengths.extend(window.num_tokens[window.is_ok].tolist())
        labels.extend(window.num_label_tokens[window.is_ok].tolist())
    return DataFacts(
        what=f"{len(manifests)} windows in {folder}",
        num_samples=sum(manifest.num_ok for manifest in manifests),
        num_failed=sum(manifest.num_failed for manifest in manifests),
        sources=info.sources if info is not None else {},
        lengths=tuple(lengths),
        label_lengths=tuple(labels),
        num_unknown=0,  # a store's lengths are read, not its tokens
        failures=failures,
    )


def _of_records(settings: PipelineConfig, processor: "ValleyProcessor", *, seed: int) -> DataFacts:
    from valley_ray.data.stages import TokenizeStage

    sources: Counter[str] = Counter()
    tokenized: list[dict[str, Any]] = []
    num_frames = (settings.sampling or processor.sampling).num_frames or FRAMES_AT_A_RATE
    tokenize = TokenizeStage(processor)
    for path, root, name in zip(settings.records, settings.roots, settings.source_names, strict=True):
        rows, total = _some_rows(path, root, random.Random(seed))
        sources[name] += total
        clips = {clip["clip_id"]: _outcome(clip, num_frames) for row in rows for clip in row.clips}
        tokenized += tokenize([row.sample for row in rows if row.sample is not None], clips).to_pylist()
    unknown = getattr(processor.tokenizer, "unk_token_id", None)
    found = [row for row in tokenized if row["status"] == OK]
    failures = Counter(f"{row['error_class']}: {row['error']}" for row in tokenized if row["status"] != OK)
    return DataFacts(
        what=f"{len(settings.records)} files of records",
        num_samples=sources.total(),
        num_failed=0,
        sources=sources,
        lengths=tuple(row["num_tokens"] for row in found),
        label_lengths=tuple(row["num_label_tokens"] for row in found),
        num_unknown=sum(row["labels"].count(unknown) for row in found),
        failures=failures,
    )


def _some_rows(path: "Path", media_root: "Path", rng: random.Random) -> tuple[list[Any], int]:
    """Up to NUM_SAMPLED rows of a file, each record with the same chance, and how many records there are."""
    from valley_ray.data.sources.json_text import read_json_list
    from valley_ray.data.sources.llava import conversation_row
    from valley_ray.data.sources.media import Media
    from valley_ray.data.sources.rows import Source

    kept: list[tuple[int, Any]] = []
    count = 0
    for record in read_json_list(str(path)):
        place = count if count < NUM_SAMPLED else rng.randrange(count + 1)
        if place < NUM_SAMPLED:
            kept[place : place + 1] = [(count, record)]
        count += 1
    source = Source(str(path), path.name, Media(str(media_root)))
    return [conversation_row(record, row, source) for row, record in sorted(kept, key=lambda one: one[0])], count


def _outcome(clip: Mapping[str, Any], num_frames: int) -> dict[str, Any]:
    """What decoding would say of a clip whose file is there."""
    outcome: dict[str, Any] = {"status": OK, "error_class": "", "error": "", "shard": "", "row": 0}
    if clip["status"] != PENDING or clip["error"]:
        reason = {"status": FAILED, "error_class": clip["error_class"] or "source_not_found", "error": clip["error"]}
        return outcome | reason | {"num_frames": 0}
    if clip["kind"] == "images":
        from valley_ray.data.schema import uris_of

        return outcome | {"num_frames": len(uris_of(clip["kind"], clip["uri"]))}
    return outcome | {"num_frames": 1 if clip["kind"] == "image" else num_frames}
