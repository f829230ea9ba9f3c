"""The same training twice: by the engines of a worker group, and by plain torch in one process. No Ray in here.

Cases run one after another within one worker group: starting one costs seconds, an engine for a tiny model less.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from train_batches import KINDS, BatchMaker

from valley_ray.data.shards import Sample
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.lora import LoraSettings, add_lora
from valley_ray.train import zero
from valley_ray.train.config import DataConfig, TrainConfig
from valley_ray.train.feed import FeatureCache, StepBatches
from valley_ray.train.stage_config import StageConfig
from valley_ray.train.stages import ParameterGroup, learning_rate_scale, prepare_stage
from valley_ray.train.step import Stepper, StepResult
from valley_ray.train.trainable import TowerAndCore, trainable_module
from valley_ray.train.zero import DTYPES, Applied, ZeroEngine

NUM_STEPS = 10
DEEPSPEED_SETTINGS = zero.deepspeed_settings
CPU = torch.device("cpu")

Slots = list[list[Sample]]
"""A global batch, cut into micro-batches."""


@dataclass(frozen=True)
class Case:
    """One training of ten steps."""

    name: str
    zero_stage: int = 2
    parts: tuple[str, ...] = ("projector", "language_model")
    lora: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Of TrainConfig."""
    stage: dict[str, Any] = field(default_factory=dict)
    """Of StageConfig."""

    def configs(self, model: Path) -> tuple[TrainConfig, StageConfig]:
        """The configuration of this case, on the model folder `model`."""
        values = {"name": "s", "trainable": self.parts, "learning_rate": 1e-3, "max_steps": NUM_STEPS} | self.stage
        stage = StageConfig(**values)
        config = TrainConfig(
            **{
                "model": model,
                "output": model / "nowhere",
                "data": DataConfig(windows_dir=model),
                "stages": (stage,),
                "lora": self.lora,
                "zero_stage": self.zero_stage,
                **self.settings,
            }
        )
        return config, stage


@dataclass(frozen=True)
class Outcome:
    """What a training gave; parameters and gradients are full ones, by their names in the stage."""

    losses: list[float]
    grad_norms: list[float]
    parameters: dict[str, torch.Tensor]
    gradients: list[dict[str, torch.Tensor]]
    """Of each step, before clipping; [] where they were not asked for."""
    num_skipped: int = 0
    """Steps whose gradients overflowed."""


def steady_batches(maker: BatchMaker) -> list[Slots]:
    """Ten global batches of twelve samples; the number of micro-batches changes from step to step."""
    batches = []
    for step in range(NUM_STEPS):
        samples = [maker.sample(KINDS[(step + row) % 3], (step, row)) for row in range(12)]
        size = (4, 3, 6)[step % 3]
        batches.append([samples[start : start + size] for start in range(0, 12, size)])
    return batches


def random_patterns(maker: BatchMaker, num_patterns: int) -> list[Slots]:
    """Global batches whose micro-batches are videos, images, texts or mixtures, as it comes; slots of any number."""
    batches = []
    for pattern in range(num_patterns):
        rng = torch.Generator().manual_seed(pattern)
        slots: Slots = []
        for slot in range(int(torch.randint(1, 7, (1,), generator=rng))):
            only = int(torch.randint(0, 4, (1,), generator=rng))
            count = int(torch.randint(1, 4, (1,), generator=rng))
            kinds = torch.randint(0, 3, (count,), generator=rng).tolist() if only == 3 else [only] * count
            slots.append([maker.sample(KINDS[kind], (pattern, slot, row)) for row, kind in enumerate(kinds)])
        batches.append(slots)
    return batches


def open_stage(
    case: Case, folder: Path, *, device: torch.device = CPU
) -> tuple[ValleyForConditionalGeneration, tuple[ParameterGroup, ...]]:
    """The model of a case, with the same fresh adapter wherever it is opened, marked for its stage."""
    config, stage = case.configs(folder)
    model = ValleyForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    if "lora" in stage.parts:
        torch.manual_seed(0)
        add_lora(model.core, LoraSettings(**(config.lora or {})), quantized=True)
    model.to(device)
    return model, prepare_stage(model.core, stage, tower=model.vision_tower)


@dataclass(frozen=True)
class KeepingEngine(ZeroEngine):
    """An engine that keeps the gradients of its steps."""

    kept: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def step(self, scale: float) -> Applied:
        from deepspeed.utils import safe_get_full_grad  # seconds of import that collecting tests should not pay

        named = [pair for group in self.groups for pair in zip(group.names, group.parameters, strict=True)]
        self.kept.append({name: safe_get_full_grad(parameter).clone() for name, parameter in named})
        return super().step(scale)


def _settings_without_thresholds(*arguments: Any, **options: Any) -> dict[str, Any]:
    """DeepSpeed's settings, by which ZeRO-3 would keep every weight of a tiny model on every rank: here it gathers each
    one when it is used, and lets go of it again."""
    settings = DEEPSPEED_SETTINGS(*arguments, **options)
    names = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
    settings["zero_optimization"] |= {f"stage3_{name}": 0 for name in names}
    return settings


@dataclass(frozen=True)
class Run:
    """What the workers do with a case."""

    case: Case
    num_patterns: int = 0
    """Random batches instead of the ten steady ones: their gradients are kept, and the weights stay as they were."""
    resumes_at: int | None = None
    """Step at which the engine is saved, thrown away, built again and loaded."""

    def slots(self, folder: Path) -> list[Slots]:
        """The global batches."""
        maker = BatchMaker(folder)
        return random_patterns(maker, self.num_patterns) if self.num_patterns else steady_batches(maker)

    def scale(self, index: int, stage: StageConfig) -> float:
        """Of the learning rates at step `index`."""
        return 0.0 if self.num_patterns else learning_rate_scale(index, NUM_STEPS, stage)


def run_engines(run: Run, folder: Path, *, rank: int, world: int, shared: Path, device: torch.device = CPU) -> Outcome:
    """The steps as the loop makes them; called on every rank of a process group, `shared` is a folder of all ranks."""
    config, stage = run.case.configs(folder)
    kept: list[dict[str, torch.Tensor]] = []
    results: list[StepResult] = []
    maker, batches = BatchMaker(folder), run.slots(folder)
    parts = [range(len(batches))]
    if run.resumes_at is not None:
        parts = [range(run.resumes_at), range(run.resumes_at, len(batches))]
    for part in parts:
        model, groups = open_stage(run.case, folder, device=device)
        with mock.patch.object(zero, "deepspeed_settings", _settings_without_thresholds):
            engine = zero.build_engine(trainable_module(model, stage, config), groups, config, stage, world=world)
        if run.num_patterns:
            engine = KeepingEngine(engine.engine, engine.groups, engine.zero_stage, kept)
        if part.start:
            engine.load(shared, tag="half")
        options = {"device": device, "rank": rank, "world": world, "seed": 0, "precision": config.precision}
        stepper = Stepper(model, engine, FeatureCache(0), **options)
        for index in part:
            step = maker.step(batches[index], index=index, rank=rank, world=world)
            results.append(stepper.train(step, step=index, scale=run.scale(index, stage)))
        if part.stop < len(batches):
            engine.save(shared, tag="half")
            torch.distributed.barrier()
        parameters = engine.trained_parameters()
        engine.close()
    assert all(result.is_finite for result in results)
    losses, norms = [result.loss for result in results], [result.grad_norm for result in results]
    return Outcome(losses, norms, parameters, kept, num_skipped=sum(result.is_skipped for result in results))


def run_plain(run: Run, folder: Path) -> Outcome:
    """The same steps by torch alone: one process, AdamW on float32 weights, whole batches.

    The size of a product decides how it is rounded. Where that is more than what is asked for, of less than float32
    and of single gradients (whole batches differ from their own parts by 1.1e-6), the micro-batches are those of the
    engines, summed in float32.
    """
    config, stage = run.case.configs(folder)
    model, groups = open_stage(run.case, folder)
    model.core.train()
    module = TowerAndCore(model) if "tower" in stage.parts else model.core
    for parameter in module.parameters():
        # Not the buffers: rotary frequencies of less than float32 turn far positions wrongly.
        parameter.data = parameter.data.to(DTYPES[config.precision])
    pairs = [(name, low) for group in groups for name, low in zip(group.names, group.parameters, strict=True)]
    masters = {name: torch.nn.Parameter(low.detach().float().clone()) for name, low in pairs}
    optimizer = torch.optim.AdamW(
        [{"params": [masters[name] for name in group.names], "weight_decay": group.weight_decay} for group in groups],
        betas=stage.betas,
        eps=stage.eps,
    )
    losses, norms, gradients = [], [], []
    maker = BatchMaker(folder)
    for index, slots in enumerate(run.slots(folder)):
        whole = [[sample for slot in slots for sample in slot]]
        step = maker.step(whole if config.precision == "fp32" and not run.num_patterns else slots)
        losses.append(sum(_backward(model, module, step, masters, dict(pairs))))
        if run.num_patterns:
            gradients.append({name: master.grad.clone() for name, master in masters.items()})
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.values(), stage.max_grad_norm or float("inf"))))
        for values, group in zip(optimizer.param_groups, groups, strict=True):
            values["lr"] = group.learning_rate * run.scale(index, stage)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, low in pairs:
                low.copy_(masters[name])
    return Outcome(losses, norms, {name: master.detach() for name, master in masters.items()}, gradients)


def _backward(
    model: ValleyForConditionalGeneration,
    module: torch.nn.Module,
    step: StepBatches,
    masters: dict[str, torch.nn.Parameter],
    parameters: dict[str, torch.nn.Parameter],
) -> Iterator[float]:
    """Add the gradients of a step's micro-batches to the masters; their shares of the loss."""
    for micro_batch in step.micro_batches:
        inputs: dict[str, Any] = micro_batch.model_inputs(CPU, attention="sdpa")
        pixels = [clip.pixel_values for clip in micro_batch.clips]
        if isinstance(module, TowerAndCore):
            inputs["pixel_values"] = pixels
        elif pixels:
            inputs["features"] = model.encode_clips(pixels)
        loss = module(**inputs, loss_reduction="sum", return_logits=False).loss / step.num_label_tokens
        module.zero_grad()
        loss.backward()
        for name, low in parameters.items():
            gradient = low.grad.float()
            masters[name].grad = gradient if masters[name].grad is None else masters[name].grad + gradient
        yield float(loss.detach())


def largest_difference(first: Sequence[float], second: Sequence[float]) -> float:
    """Of two curves of the same length."""
    return max(abs(a - b) for a, b in zip(first, second, strict=True))
