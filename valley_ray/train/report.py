"""What `--check` prints: what each stage trains, the data, memory per ZeRO stage, and settings without effect.

Builds the model on the meta device and tokenizes some samples; starts no Ray and reads no weights but the projector's.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from valley_ray.train.check import check_run
from valley_ray.train.config import TrainConfig
from valley_ray.train.data_facts import DataFacts, read_facts
from valley_ray.train.forecast import Memory, StageForecast, activation_bytes, forecast_memory, forecast_stage
from valley_ray.train.plan import StagePlan

if TYPE_CHECKING:
    from valley_ray.model.config import ValleyConfig

GB, MB = 1e9, 1e6
MAX_REASONS = 3
"""Reasons of failing samples that are shown."""


@dataclass(frozen=True)
class RunReport:
    """What a run would do."""

    config: TrainConfig
    stages: tuple[StageForecast, ...]
    steps: tuple[int, ...]
    """Optimizer steps per stage, at most: failed samples make fewer."""
    data: DataFacts
    memory: dict[tuple[int, bool], Memory]
    """Of the stage that needs most, by ZeRO stage and offload."""
    warnings: tuple[str, ...]
    without_effect: tuple[str, ...]

    def text(self) -> str:
        """For a terminal."""
        return "\n".join((*_stage_lines(self), *_data_lines(self), *_memory_lines(self), *_note_lines(self)))


def report_run(config: TrainConfig) -> RunReport:
    """Look at everything that `config` names and start nothing.

    Raises:
        ConfigError, CheckpointError, DataError: as `check_run` and `read_facts`.
    """
    from valley_ray.model.checkpoint import read_model_config
    from valley_ray.processor import ValleyProcessor
    from valley_ray.train.check import check_batch, check_draws

    warnings = check_run(config)
    model_config = read_model_config(config.model)
    data = read_facts(config, ValleyProcessor.from_pretrained(config.model))
    check_batch(config, data.num_samples, what="records" if config.data.mode == "overlap" else "ok samples")
    check_draws(config, data.sources)
    stages = tuple(forecast_stage(model_config, config, stage) for stage in config.stages)
    # Where nothing is drawn more or less often, failed rows of a store are known not to count.
    rows = data.sources if config.data.weights else data.num_samples
    steps = tuple(StagePlan.of_stage(config, number).num_steps(rows) for number in range(len(config.stages)))
    memory = {
        (zero, offload): _largest(model_config, config, stages, data, zero, offload=offload)
        for zero in (0, 1, 2, 3)
        for offload in ((False, True) if zero else (False,))
    }
    report = RunReport(
        config, stages, steps, data, memory, warnings, tuple(without_effect(config, model_config, steps))
    )
    return RunReport(**{**report.__dict__, "warnings": (*warnings, *_warnings(report))})


def without_effect(config: TrainConfig, model_config: "ValleyConfig", steps: tuple[int, ...]) -> Iterator[str]:
    """Settings that change nothing in this run, each with the reason."""
    yield from _intervals_without_effect(config, sum(steps))
    yield from _data_without_effect(config)
    if config.use_gpu and "threads_per_worker" in config.model_fields_set:
        yield "threads_per_worker: the work is the GPU's"
    for stage in config.stages:
        if "temporal" in stage.parts and model_config.pooling in ("mean", "max"):
            yield f"{stage.name}: temporal, {model_config.pooling} pooling has no weights"
        rates = set(stage.learning_rates)
        if rates and rates >= stage.parts - {"temporal"}:
            yield f"{stage.name}: learning_rate, learning_rates names every part"


def _intervals_without_effect(config: TrainConfig, num_steps: int) -> Iterator[str]:
    if config.checkpoint_every is None:
        for name in ("keep_checkpoints", "max_failures"):
            if name in config.model_fields_set:
                yield f"{name}: checkpoint_every is null, so that there is nothing to go on from"
        if config.evaluation is not None:
            yield "evaluation: checkpoints are what is evaluated, and checkpoint_every is null"
    for name in ("checkpoint_every", "export_every", "log_every"):
        every = getattr(config, name)
        if name in config.model_fields_set and every is not None and every > num_steps:
            yield f"{name}={every}: the run has {num_steps} steps"


def _data_without_effect(config: TrainConfig) -> Iterator[str]:
    data = config.data
    if data.mode == "shards" and data.pipeline is not None:
        yield "data.pipeline: mode shards reads what was prepared"
    if data.mode == "overlap" and data.windows_dir is not None:
        yield "data.windows_dir: mode overlap writes to data.pipeline.windows_dir"
    if data.mode == "overlap" and (data.pipeline or {}).get("seed") is not None:
        yield "data.pipeline.seed: the order of a training is drawn from seed"
    if config.pack_tokens is not None and "micro_batch_size" in config.model_fields_set:
        yield "micro_batch_size: pack_tokens says how much a micro-batch holds"
    if config.feature_cache_bytes and all("tower" in stage.parts for stage in config.stages):
        yield "feature_cache_bytes: a tower that is trained gives other features after every step"


def _warnings(report: RunReport) -> Iterator[str]:
    config, data = report.config, report.data
    slots = -(-config.global_batch_size // config.micro_batch_size)
    if config.pack_tokens is None and slots < config.max_workers:
        yield (
            f"{config.max_workers - slots} of {config.max_workers} workers have nothing to do: global_batch_size / "
            f"micro_batch_size is {slots}; lower {'micro_batch_size' if config.micro_batch_size > 1 else 'num_workers'}"
        )
    if config.checkpoint_every is None and config.max_failures:
        yield "checkpoint_every is null: a worker's death begins the run again"
    if config.pack_tokens is not None and (over := sum(length > config.pack_tokens for length in data.lengths)):
        yield f"{over} of {len(data.lengths)} samples looked at have more than pack_tokens={config.pack_tokens} tokens"
    if config.data.mode == "overlap" and data.failures:
        share = sum(data.failures.values()) / (len(data.lengths) + sum(data.failures.values()))
        yield f"about {share:.0%} of the records cannot be trained on; see above"
    if data.num_unknown:
        share = data.num_unknown / sum(data.label_lengths)
        yield f"{share:.0%} of the label tokens are words that the model's tokenizer does not know; they teach nothing"
    if config.use_gpu and not _has_gpu():
        yield "use_gpu is on and this machine has no GPU: start it on a cluster that has some, or set use_gpu=false"
    memory = report.memory[(config.zero_stage, config.offload)]
    room, name = _room(config)
    if room is not None and memory.total > room:
        yield f"a worker needs about {memory.total / GB:.1f} GB, {name} has {room / GB:.1f} GB for each"


def _room(config: TrainConfig) -> tuple[float | None, str]:
    """Bytes that a worker can have on this machine, which may not be the one that trains."""
    import torch

    if not config.use_gpu:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / config.min_workers, "this machine"
    if not _has_gpu():
        return None, ""
    return float(torch.cuda.get_device_properties(0).total_memory), "its GPU"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _largest(
    model_config: "ValleyConfig",
    config: TrainConfig,
    stages: tuple[StageForecast, ...],
    data: DataFacts,
    zero_stage: int,
    *,
    offload: bool,
) -> Memory:
    kept = activation_bytes(model_config, config, num_tokens=micro_batch_tokens(config, data))
    found = (
        forecast_memory(stage, config, zero_stage=zero_stage, offload=offload, activations=kept) for stage in stages
    )
    return max(found, key=lambda memory: memory.total)


def micro_batch_tokens(config: TrainConfig, data: DataFacts) -> int:
    """Tokens of the largest micro-batch, padding included."""
    return config.pack_tokens or config.micro_batch_size * data.longest


def _stage_lines(report: RunReport) -> Iterator[str]:
    config = report.config
    yield f"model      {config.model} → {config.output}"
    for stage, forecast, steps in zip(config.stages, report.stages, report.steps, strict=True):
        share = forecast.num_trained / (forecast.num_module + forecast.num_outside)
        epochs = steps * config.global_batch_size / max(1, report.data.num_samples)
        yield (
            f"{stage.name:<10} {steps:,} steps of {config.global_batch_size} samples ({epochs:.2f} epochs), warm-up "
            f"{math.ceil(stage.warmup_ratio * steps)}, {stage.schedule}; {forecast.num_trained:,} parameters trained "
            f"({share:.2%})"
        )
        for part in forecast.parts:
            yield f"           {part.part:<16} {part.num_parameters:>15,}  learning rate {part.learning_rate:.2e}"


def _data_lines(report: RunReport) -> Iterator[str]:
    data, config = report.data, report.config
    failed = f", {data.num_failed:,} failed" if data.num_failed else ""
    yield f"data       {data.what}: {data.num_samples:,} samples{failed}"
    if data.lengths:
        mean, labels = (sum(part) / len(data.lengths) for part in (data.lengths, data.label_lengths))
        yield (
            f"           {len(data.lengths):,} looked at: {mean:.0f} tokens on average, {data.longest} at most, "
            f"{labels:.0f} of them labels; up to {micro_batch_tokens(config, data):,} tokens in a micro-batch"
        )
    for reason, count in list(data.failures.items())[:MAX_REASONS]:
        yield f"           {count} fail: {reason[:160]}"


def _memory_lines(report: RunReport) -> Iterator[str]:
    config = report.config
    unit, name = (GB, "GB") if max(memory.total for memory in report.memory.values()) >= GB else (MB, "MB")
    workers = f"one of {config.min_workers} workers" if config.min_workers > 1 else "the one worker"
    yield f"memory     of {workers}, {config.precision}, {name}; * is this run (the formula: docs/training.md)"
    columns = ("weights", "gradients", "optimizer", "buckets", "tower", "activations", "total", "host")
    yield " " * 31 + "".join(f"{column:>12}" for column in columns)
    for (zero_stage, offload), memory in report.memory.items():
        mark = "*" if (zero_stage, offload) == (config.zero_stage, config.offload) else " "
        row = f"{mark} ZeRO {zero_stage}{' + offload' if offload else ''}"
        values = "".join(f"{getattr(memory, column) / unit:>12.2f}" for column in columns)
        yield f"           {row:<20}{values}"


def _note_lines(report: RunReport) -> Iterator[str]:
    for title, notes in (("warnings", report.warnings), ("no effect", report.without_effect)):
        yield f"{title:<10} {notes[0] if notes else 'none'}"
        yield from (f"           {note}" for note in notes[1:])
