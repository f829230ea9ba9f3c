"""Clips → outcomes as they arrive, for whoever waits for some of them: windows, or the end.

Driver side of execution.py: knows what was there before, takes every clip's outcome once, counts.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import pyarrow as pa
import ray

from valley_ray.data.config import DecodeSettings
from valley_ray.data.execution import decode_blocks
from valley_ray.data.metrics import DecodeMetrics
from valley_ray.data.outcomes import Outcome, Outcomes
from valley_ray.data.stages import DecodeStage, decoder_version
from valley_ray.data.windows import PlannedWindow, blocks_of, decode_fingerprint
from valley_ray.media.sampling import FrameSampling

if TYPE_CHECKING:
    from valley_ray.processor import ProcessorConfig

BLOCKS_PER_CPU = 1.5
"""Blocks that the rest of the clips is enough for, on every CPU: the last blocks are small and end together."""
SMALLEST_BLOCK = 8
"""Clips per task that are worth a task: between two tasks a CPU stands still for 0.15 s, while Ray Data polls."""

OnOutcomes = Callable[[Sequence[Outcome]], None]
"""Called with each block's new outcomes, on the thread that waits."""


class Decoding:
    """One run over the clips that are still to be decoded, as a context manager.

    Attributes:
        outcomes: clip_id -> its outcome, of this run or an earlier one.
        num_known: how many were there before this run.
        num_blocks: tasks of this run.
    """

    def __init__(
        self,
        clips: pa.Table,
        windows: Iterable[PlannedWindow],
        known: Mapping[str, Outcome],
        *,
        stage: DecodeStage,
        settings: DecodeSettings,
        on_outcomes: OnOutcomes | None = None,
    ) -> None:
        self.outcomes = known if isinstance(known, Outcomes) else Outcomes(known.items())
        self.num_known = len(known)
        blocks = list(blocks_of(windows, clips, known, _size_of(settings)))
        self.num_blocks = len(blocks)
        self._on_outcomes = on_outcomes
        self._metrics = DecodeMetrics(sum(block.num_rows for block in blocks))
        self._arriving = decode_blocks(
            blocks,
            stage,
            num_cpus=settings.decode_cpus,
            max_tasks=settings.max_decode_tasks,
            retries=settings.task_retries,
            block_size=settings.block_size,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._arriving.close()

    @property
    def num_decoded(self) -> int:
        """Clips that this run has decoded or tried to."""
        return len(self.outcomes) - self.num_known

    def wait(self, clip_ids: Iterable[str]) -> None:
        """Take outcomes in until those of `clip_ids` are there; others may come between."""
        waiting = set(clip_ids) - self.outcomes.keys()
        while waiting:
            block = next(self._arriving, None)
            assert block is not None, f"decoding ended, but {len(waiting)} clips did not arrive, {min(waiting)} is one"
            self._take(block)
            waiting -= self.outcomes.keys()

    def finish(self) -> None:
        """Take in what is left."""
        for block in self._arriving:
            self._take(block)

    def _take(self, block: Sequence[Outcome]) -> None:
        # A block that Ray ran again, after its first result was lost, may come twice.
        new = [outcome for outcome in block if outcome["clip_id"] not in self.outcomes]
        self.outcomes.update((outcome["clip_id"], outcome) for outcome in new)
        self._metrics.count(new)
        if self._on_outcomes is not None:
            self._on_outcomes(new)


def _size_of(settings: DecodeSettings) -> Callable[[int], int]:
    """Clips in a block, given how many are left: fewer where they no longer keep every CPU busy with whole ones."""
    num_cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))

    def size_of(num_left: int) -> int:
        share = math.ceil(num_left / (BLOCKS_PER_CPU * num_cpus))
        return min(settings.block_size, max(SMALLEST_BLOCK, share))

    return size_of


def decode_stage(
    settings: DecodeSettings,
    shards_dir: Path,
    *,
    processing: "ProcessorConfig",
    sampling: FrameSampling,
    again: str = "",
) -> DecodeStage:
    """The stage that decodes into `shards_dir` as the settings say.

    Raises:
        ConfigError: the video decoder is not installed here.
    """
    made_with = decode_fingerprint(
        sampling,
        video_crop=processing.video_crop,
        image_crop=processing.image_crop,
        decoder=decoder_version(settings.video_decoder),
    )
    return DecodeStage(
        directory=shards_dir.absolute(),
        fingerprint=made_with,
        sampling=sampling,
        processing=processing,
        backend=settings.video_decoder,
        limits=settings.sandbox,
        policy=settings.fetch,
        max_deaths=settings.task_retries,
        again=again,
    )
