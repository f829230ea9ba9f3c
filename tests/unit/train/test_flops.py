"""FLOP of a step by the formula, against what torch counts."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from train_batches import BatchMaker

from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.lora import LoraSettings, add_lora
from valley_ray.train.flops import count_flops, known_peak_flops
from valley_ray.train.stage_config import StageConfig
from valley_ray.train.stages import prepare_stage
from valley_ray.train.trainable import TowerAndCore


def measured(module: torch.nn.Module, tiny_valley: Path, *, tower: bool) -> tuple[int, dict[str, int]]:
    """FLOP of one video's forward and backward pass as torch counts them, and what the batch holds.

    Eager attention: torch counts its products in full, without regard to the mask.
    """
    maker = BatchMaker(tiny_valley)
    sample = maker.sample("video", (0, 0))
    batch = maker.micro_batch([sample])
    (clip,) = batch.clips
    visual = (
        {"pixel_values": [clip.pixel_values]} if tower else {"features": [torch.randn(len(clip.pixel_values), 17, 32)]}
    )
    inputs = batch.model_inputs(torch.device("cpu"), attention="eager")
    with FlopCounterMode(display=False) as counter:
        module(**inputs, **visual, return_logits=False).loss.backward()
    length = len(sample.input_ids)
    counts = {"num_tokens": length, "num_label_tokens": sample.num_label_tokens, "num_squared_tokens": length**2}
    return counter.get_total_flops(), counts | {"num_frames": len(clip.pixel_values) if tower else 0}


@pytest.mark.parametrize("kind", ["whole", "projector", "lora", "tower"])
def test_the_formula_counts_what_torch_counts(tiny_valley: Path, kind: str) -> None:
    model = ValleyForConditionalGeneration.from_pretrained(tiny_valley, attn_implementation="eager")
    parts = {
        "whole": ("projector", "language_model"),
        "projector": ("projector",),
        "lora": ("lora",),
        "tower": ("tower", "projector", "language_model"),
    }[kind]
    if kind == "lora":
        add_lora(model.core, LoraSettings(r=4, dropout=0.0))
    stage = StageConfig(name="s", trainable=parts, learning_rate=1e-3, max_steps=1)
    prepare_stage(model.core, stage, tower=model.vision_tower)
    module = TowerAndCore(model) if kind == "tower" else model.core
    total, counts = measured(module, tiny_valley, tower=kind == "tower")
    ours = count_flops(model)
    # The mask's half, which eager attention computes and the formula leaves out.
    masked = ours.per_squared_token * counts["num_squared_tokens"]
    # 7 %: the projector, and adapters of the first layer, below which nothing wants a gradient.
    assert ours.count(**counts) + masked == pytest.approx(total, rel=0.07)


def test_a_frozen_weight_costs_two_passes_and_a_trained_one_three(tiny_valley: Path) -> None:
    model = ValleyForConditionalGeneration.from_pretrained(tiny_valley)
    counters = []
    for parts in (("projector",), ("projector", "language_model")):
        prepare_stage(model.core, StageConfig(name="s", trainable=parts, learning_rate=1e-3, max_steps=1))
        counters.append(count_flops(model))
    frozen, trained = counters
    assert trained.per_token == pytest.approx(1.5 * frozen.per_token)
    assert trained.per_label_token == pytest.approx(1.5 * frozen.per_label_token)
    assert trained.per_squared_token == frozen.per_squared_token


def test_peaks_are_known_by_the_name_of_the_gpu_and_else_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    for name, peak in (("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12), ("Other", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert known_peak_flops(cuda, precision="bf16") == peak
    assert known_peak_flops(cuda, precision="fp32") is None
    assert known_peak_flops(torch.device("cpu"), precision="bf16") is None
