"""One optimizer step on one rank: micro-batches in, loss and gradient norm out. Knows no plan, no files, no Ray."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed

from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.train.feed import FeatureCache, StepBatches
from valley_ray.train.flops import FlopCounter
from valley_ray.train.packing import MicroBatch
from valley_ray.train.trainable import TowerAndCore
from valley_ray.train.zero import DTYPES, ZeroEngine


@dataclass(frozen=True)
class StepResult:
    """What one step gave; the same on every rank."""

    loss: float
    """Mean over the label tokens of the global batch. Where it is not finite, no step was made."""
    grad_norm: float
    """Before clipping; nan where the loss is not finite or the step was skipped."""
    is_skipped: bool = False
    """Whether the step was left out because gradients overflowed in fp16."""
    flops: float = 0.0
    """Of all ranks, as `valley_ray.train.flops` counts them."""

    @property
    def is_finite(self) -> bool:
        """Whether training can go on: loss and gradients are numbers, or the overflow is one that fp16 allows for."""
        return math.isfinite(self.loss) and (self.is_skipped or math.isfinite(self.grad_norm))


class Stepper:
    """Trains one stage step by step. A frozen tower stays outside the engine and gets no gradients."""

    def __init__(
        self,
        model: ValleyForConditionalGeneration,
        engine: ZeroEngine,
        cache: FeatureCache,
        *,
        device: torch.device,
        rank: int,
        world: int,
        seed: int,
        precision: str = "fp32",
        flops: FlopCounter | None = None,
    ) -> None:
        """`cache` gets the features of a frozen tower; `flops` counts what the steps cost, where that is asked for."""
        self._model = model
        self._engine = engine
        self._cache = cache
        self._device = device
        self._rank, self._world = rank, world
        self._seed = seed
        self._trains_tower = isinstance(engine.engine.module, TowerAndCore)
        self._tower_dtype = DTYPES[precision]
        self._attention = str(model.core.language_model.config._attn_implementation)
        self._flops = flops
        self.num_encoded = 0
        """Clips that the tower has run on so far."""

    def train(self, batches: StepBatches, *, step: int, scale: float) -> StepResult:
        """Make optimizer step number `step` of the run at `scale` times the peak learning rates; collective."""
        # float64: the sum over micro-batches and ranks is as good as that of one big batch.
        totals = torch.zeros(2, dtype=torch.float64, device=self._device)
        last = len(batches.micro_batches) - 1
        for number, micro_batch in enumerate(batches.micro_batches):
            # Dropout is that of the slot, for every number of ranks, and in a run that was interrupted too.
            slot = self._rank + number * self._world
            torch.manual_seed(int(np.random.SeedSequence([self._seed, step, slot]).generate_state(1)[0]))
            totals[0] += self._backward(micro_batch, batches.num_label_tokens, is_last=number == last)
            totals[1] += self._count_flops(micro_batch)
        torch.distributed.all_reduce(totals)
        loss, flops = totals.tolist()
        if not math.isfinite(loss):
            return StepResult(loss=loss, grad_norm=float("nan"), flops=flops)
        applied = self._engine.step(scale)
        return StepResult(loss=loss, grad_norm=applied.grad_norm, is_skipped=applied.is_skipped, flops=flops)

    def _backward(self, micro_batch: MicroBatch, num_label_tokens: int, *, is_last: bool) -> torch.Tensor:
        """Gradients of one micro-batch; returns its share of the step's loss."""
        inputs = micro_batch.model_inputs(self._device, attention=self._attention)
        visual = self._visual_inputs(micro_batch)
        output = self._engine(**inputs, **visual, loss_reduction="sum", return_logits=False)
        loss: torch.Tensor = output.loss / max(1, num_label_tokens)
        self._engine.backward(loss * self._world, is_last=is_last)
        return loss.detach()

    def _visual_inputs(self, micro_batch: MicroBatch) -> dict[str, Any]:
        """Pixels for a tower inside the engine, else features."""
        if not self._trains_tower:
            return {"features": self._features(micro_batch)}
        pixels = [clip.pixel_values for clip in micro_batch.clips if clip.pixel_values is not None]
        assert len(pixels) == len(micro_batch.clips), "features of a tower that is trained are of no use"
        self.num_encoded += len(pixels)
        return {"pixel_values": [clip.to(self._device) for clip in pixels]}

    def _features(self, micro_batch: MicroBatch) -> list[torch.Tensor]:
        """Tower features of every visual block, in order: [T, 1+P, Dv], or as they were stored."""
        missing = [clip for clip in micro_batch.clips if clip.pixel_values is not None]
        pixels = [clip.pixel_values.to(self._device) for clip in missing if clip.pixel_values is not None]
        # On a GPU the tower would else cost as much in float32 as the language model in bfloat16.
        is_mixed = self._device.type == "cuda" and self._tower_dtype != torch.float32
        with torch.autocast(self._device.type, self._tower_dtype, enabled=is_mixed):
            features = self._model.encode_clips(pixels) if pixels else []
        encoded = dict(zip(map(id, missing), features, strict=True))
        self.num_encoded += len(missing)
        for clip in missing:
            self._cache.put(clip.key, encoded[id(clip)])
        found = [encoded.get(id(clip), clip.features) for clip in micro_batch.clips]
        return [features.to(self._device) for features in found if features is not None]

    def _count_flops(self, micro_batch: MicroBatch) -> float:
        if self._flops is None:
            return 0.0
        lengths = _sample_lengths(micro_batch)
        pixels = [clip.pixel_values for clip in micro_batch.clips if clip.pixel_values is not None]
        return self._flops.count(
            num_tokens=sum(lengths),
            num_label_tokens=int((micro_batch.labels >= 0).sum()),
            num_squared_tokens=sum(length * length for length in lengths),
            num_frames=sum(map(len, pixels)),
        )


def _sample_lengths(micro_batch: MicroBatch) -> list[int]:
    """Tokens of every sample."""
    if not micro_batch.sample_ids:
        return []
    if micro_batch.segment_ids is None:
        return [int(length) for length in micro_batch.attention_mask.sum(dim=1)]
    return [int(count) for row in micro_batch.segment_ids for count in row[row > 0].unique(return_counts=True)[1]]
