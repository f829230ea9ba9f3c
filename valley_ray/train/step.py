"""One optimizer step of one rank: micro-batches in, loss and gradient norm out. Knows no plan, no files, no Ray."""

from dataclasses import dataclass

import torch
import torch.distributed

from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.train.feed import FeatureCache, StepBatches
from valley_ray.train.packing import MicroBatch
from valley_ray.train.zero import ZeroEngine

_SEED_STRIDE = 1_000_003
"""Between the seeds of two steps, so that runs whose seeds are neighbours share none."""


@dataclass(frozen=True)
class StepResult:
    """What one step gave; the same on every rank."""

    loss: float
    """Mean over the label tokens of the global batch. Where it is not finite, no step was made."""
    grad_norm: float
    """Before clipping; nan where the loss is not finite."""


class Stepper:
    """Trains one stage step by step; the tower stays outside the engine and gets no gradients."""

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
    ) -> None:
        self._model = model
        self._engine = engine
        self._cache = cache
        self._device = device
        self._rank, self._world = rank, world
        self._seed = seed
        self.num_encoded = 0
        """Clips that the tower has run on so far."""

    def train(self, batches: StepBatches, *, step: int, scale: float) -> StepResult:
        """Make optimizer step number `step` of the run at `scale` times the peak learning rates; collective."""
        # Dropout of a resumed run is that of the run that was not interrupted.
        torch.manual_seed(self._seed + _SEED_STRIDE * (step * self._world + self._rank))
        loss = torch.zeros((), device=self._device)
        *accumulated, last = batches.micro_batches
        for micro_batch in accumulated:
            loss += self._backward(micro_batch, batches.num_label_tokens)
            self._engine.step(scale)
        loss += self._backward(last, batches.num_label_tokens)
        torch.distributed.all_reduce(loss)
        if not bool(torch.isfinite(loss)):
            return StepResult(loss=float(loss), grad_norm=float("nan"))
        return StepResult(loss=float(loss), grad_norm=self._engine.step(scale))

    def _backward(self, micro_batch: MicroBatch, num_label_tokens: int) -> torch.Tensor:
        """Gradients of one micro-batch; returns its share of the step's loss."""
        device = self._device
        output = self._engine(
            input_ids=micro_batch.input_ids.to(device),
            attention_mask=micro_batch.attention_mask.to(device),
            features=self._features(micro_batch),
            labels=micro_batch.labels.to(device),
            loss_reduction="sum",
            return_logits=False,
        )
        loss: torch.Tensor = output.loss / max(1, num_label_tokens)
        self._engine.backward(loss * self._world)
        return loss.detach()

    def _features(self, micro_batch: MicroBatch) -> list[torch.Tensor]:
        """Tower features of every visual block, in order: [T, 1+P, Dv], or as they were stored."""
        missing = [clip for clip in micro_batch.clips if clip.pixel_values is not None]
        pixels = [clip.pixel_values.to(self._device) for clip in missing if clip.pixel_values is not None]
        encoded = dict(zip(map(id, missing), self._model.encode_clips(pixels), strict=True)) if pixels else {}
        self.num_encoded += len(missing)
        for clip in missing:
            self._cache.put(clip.key, encoded[id(clip)])
        found = [encoded.get(id(clip), clip.features) for clip in micro_batch.clips]
        return [features.to(self._device) for features in found if features is not None]
