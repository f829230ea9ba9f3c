"""Batches of random clips and texts in memory, cut for the ranks of a world as a plan cuts them; no store, no plan."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from valley_ray.chat.conversation import Conversation, Message
from valley_ray.data.shards import Sample
from valley_ray.processor import ValleyProcessor
from valley_ray.train.feed import StepBatches
from valley_ray.train.packing import MicroBatch, collate, make_clip

Kind = Literal["video", "image", "text"]
KINDS: tuple[Kind, ...] = ("video", "image", "text")

ANSWERS = ("A red circle moves left.", "A blue square moves right.", "One.", "Yes no yes.")


class BatchMaker:
    """Samples and batches for the model of `folder`; the same seeds give the same ones."""

    def __init__(self, folder: Path) -> None:
        self.processor = ValleyProcessor.from_pretrained(folder)

    def sample(self, kind: Kind, seed: Sequence[int]) -> Sample:
        """One question and answer, with a clip of two to four frames, an image, or nothing."""
        rng = np.random.default_rng(list(seed))
        count = {"video": int(rng.integers(2, 5)), "image": 1, "text": 0}[kind]
        side = self.processor.video_crop.size
        frames = (rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8),) if count else ()
        mark = {"video": "<video>\n", "image": "<image>\n", "text": ""}[kind]
        answer = ANSWERS[int(rng.integers(len(ANSWERS)))]
        turns = (Message("user", f"{mark}What is moving?"), Message("assistant", answer))
        encoded = self.processor.encode_training(Conversation(turns), [len(clip) for clip in frames])
        name = "-".join(map(str, seed))
        return Sample(name, encoded.input_ids, encoded.labels, frames, encoded.num_label_tokens)

    def micro_batch(self, samples: Sequence[Sample]) -> MicroBatch:
        """`samples` padded to the longest."""
        clips = [
            make_clip((sample.sample_id, number), frames, pixel_values=self.processor.pixel_values, features=None)
            for sample in samples
            for number, frames in enumerate(sample.frames)
        ]
        return collate(samples, clips, pad_token_id=self.processor.pad_token_id)

    def step(self, slots: Sequence[Sequence[Sample]], *, index: int = 0, rank: int = 0, world: int = 1) -> StepBatches:
        """What `rank` does of a global batch cut into `slots`; zero-weight micro-batches fill up."""
        mine = [*slots[rank::world]]
        mine += [()] * (-(-len(slots) // world) - len(mine))
        samples = [sample for slot in slots for sample in slot]
        return StepBatches(
            index=index,
            micro_batches=tuple(self.micro_batch(slot) for slot in mine),
            num_samples=len(samples),
            num_tokens=sum(len(sample.input_ids) for sample in samples),
            num_label_tokens=sum(sample.num_label_tokens for sample in samples),
            plan_hash="",
        )
