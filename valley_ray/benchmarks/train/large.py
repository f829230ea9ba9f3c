"""Packed steps of a random model of a real one's shape: tokens per second and MFU. One process, no Ray, no files.

Every sample is a video of eight frames and some text; the frozen tower's features are computed in the step, as in
training. MFU counts what flops.py says.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch

from valley_ray.benchmarks.train.config import TrainCost
from valley_ray.benchmarks.train.models import make_shape
from valley_ray.benchmarks.train.trainee import start_alone
from valley_ray.config import validate_config
from valley_ray.data.shards import Sample
from valley_ray.errors import ConfigError
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.config import ID_FIELD_OF_TOKEN
from valley_ray.train.attention import use_packed_attention
from valley_ray.train.config import DataConfig, TrainConfig
from valley_ray.train.feed import FeatureCache, StepBatches
from valley_ray.train.flops import count_flops, known_peak_flops
from valley_ray.train.packing import IGNORED, Clip, collate_packed
from valley_ray.train.stage_config import StageConfig
from valley_ray.train.stages import prepare_stage
from valley_ray.train.step import Stepper
from valley_ray.train.trainable import trainable_module
from valley_ray.train.zero import build_engine

NUM_FRAMES, NUM_WARM = 8, 2
SHORTEST_TEXT, LONGEST_TEXT = 32, 400
"""Text tokens of a sample, beside its visual ones."""


def large_numbers(config: TrainCost, *, say: Callable[[str], None]) -> dict[str, object]:
    """`tokens_per_s`, `mfu` (None where the peak is not known) and the medians behind them.

    Raises:
        ConfigError: no GPU, or a setting that cannot be.
    """
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"model={config.model} device=cuda needs a CUDA GPU and there is none here; run it where one is"
        )
    if device.type == "cpu" and config.model == "llama7b-shape":
        raise ConfigError(f"model={config.model} on a CPU would take hours; set device=cuda")
    start_alone("nccl" if device.type == "cuda" else "gloo")
    try:
        return _measure(config, device, say)
    finally:
        torch.distributed.destroy_process_group()


def _measure(config: TrainCost, device: torch.device, say: Callable[[str], None]) -> dict[str, object]:
    settings = _train_config(config)
    [stage] = settings.stages
    model = make_shape(config.model, device)
    attention = use_packed_attention(model.core, device, precision=settings.precision)
    if "lora" in stage.parts:
        _adapt(model)
    groups = prepare_stage(model.core, stage, tower=model.vision_tower)
    flops = count_flops(model)
    engine = build_engine(trainable_module(model, stage, settings), groups, settings, stage, world=1)
    stepper = Stepper(
        model,
        engine,
        FeatureCache(0),
        device=device,
        rank=0,
        world=1,
        seed=0,
        precision=settings.precision,
        flops=flops,
    )
    peak = config.peak_flops or known_peak_flops(device, precision=settings.precision)
    times, rates, used = [], [], []
    for number in range(NUM_WARM + config.num_steps):
        batches = _batches(model, config, number)
        _wait_for(device)
        start = time.perf_counter()
        result = stepper.train(batches, step=number, scale=1.0)
        _wait_for(device)
        seconds = time.perf_counter() - start
        say(f"step {number}: {batches.num_tokens} tokens in {seconds:.2f} s, loss {result.loss:.3f}")
        if number >= NUM_WARM:
            times.append(seconds)
            rates.append(batches.num_tokens / seconds)
            used.append(result.flops / seconds)
    return {
        "tokens_per_s": median(rates),
        "mfu": median(used) / peak if peak is not None else None,
        "tflops_per_s": median(used) / 1e12,
        "step_s": median(times),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
        "attention": attention,
        "config": config.model_dump(mode="json"),
    }


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _batches(model: ValleyForConditionalGeneration, config: TrainCost, number: int) -> StepBatches:
    """Rows filled with samples up to the budget; of every step others."""
    random = np.random.default_rng(number)
    rows, num_tokens, num_label_tokens = [], 0, 0
    for _ in range(config.num_rows):
        samples: list[Sample] = []
        left = config.pack_tokens
        while True:
            sample = _sample(model, random)
            if (left := left - len(sample.input_ids)) < 0:
                break
            samples.append(sample)
        clips = [_clip(model, random) for _ in samples]
        rows.append(collate_packed(samples, clips))
        num_tokens += sum(len(sample.input_ids) for sample in samples)
        num_label_tokens += sum(sample.num_label_tokens for sample in samples)
    return StepBatches(number, tuple(rows), sum(len(row.sample_ids) for row in rows), num_tokens, num_label_tokens, "")


def _sample(model: ValleyForConditionalGeneration, random: np.random.Generator) -> Sample:
    """A visual block, then text whose second half is learned."""
    valley = model.config
    num_words = valley.text_config.vocab_size - len(ID_FIELD_OF_TOKEN)
    text = random.integers(3, num_words, random.integers(SHORTEST_TEXT, LONGEST_TEXT + 1))
    block = [valley.im_start_token_id, *[valley.im_patch_token_id] * valley.num_patches, valley.im_end_token_id]
    block += [valley.vi_start_token_id, *[valley.vi_frame_token_id] * NUM_FRAMES, valley.vi_end_token_id]
    input_ids = np.array([1, *block, *text], np.int64)
    labels = np.where(np.arange(len(input_ids)) >= len(input_ids) - len(text) // 2, input_ids, IGNORED)
    return Sample("random", input_ids, labels, (), len(text) // 2)


def _clip(model: ValleyForConditionalGeneration, random: np.random.Generator) -> Clip:
    side = model.config.image_size
    pixels = torch.from_numpy(random.standard_normal((NUM_FRAMES, 3, side, side), dtype=np.float32))
    return Clip(0, pixel_values=pixels)


def _adapt(model: ValleyForConditionalGeneration) -> None:
    from valley_ray.model.lora import LoraSettings, add_lora

    add_lora(model.core, validate_config(LoraSettings, {}, source="benchmark"))


def _train_config(config: TrainCost) -> TrainConfig:
    is_gpu = config.device == "cuda"
    return TrainConfig(
        model=Path("random"),
        output=Path("none"),
        data=DataConfig(windows_dir=Path("none")),
        stages=(StageConfig(name="timed", trainable=(config.stage,), learning_rate=1e-5, max_steps=1),),
        pack_tokens=config.pack_tokens,
        num_workers=1,
        use_gpu=is_gpu,
        zero_stage=1,
        precision="bf16",
        gradient_checkpointing=config.gradient_checkpointing,
        offload=config.offload,
    )
