"""A tower that is trained, and activations that are computed again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from train_batches import BatchMaker

from valley_ray.errors import ConfigError
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.train.config import DataConfig, TrainConfig
from valley_ray.train.stage_config import StageConfig
from valley_ray.train.stages import prepare_stage
from valley_ray.train.trainable import TowerAndCore, trainable_module

TOWER = StageConfig(
    name="s", trainable=("tower", "projector"), learning_rate=1e-3, learning_rates={"tower": 1e-5}, max_steps=1
)


def config_of(model: Path, **changes: Any) -> TrainConfig:
    values = {"model": model, "output": model / "nowhere", "data": DataConfig(windows_dir=model), "stages": (TOWER,)}
    return TrainConfig(**{**values, **changes})


def gradients(module: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    module.zero_grad()
    module(**inputs, loss_reduction="sum").loss.backward()
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_a_trained_tower_has_its_own_rate_and_only_layers_that_features_come_from(tiny_valley: Path) -> None:
    model = ValleyForConditionalGeneration.from_pretrained(tiny_valley)
    groups = prepare_stage(model.core, TOWER, tower=model.vision_tower)
    rates = {name: group.learning_rate for group in groups for name in group.names}
    of_tower = {name for name in rates if name.startswith("vision_tower.")}
    assert {rates[name] for name in of_tower} == {1e-5}
    assert {rates[name] for name in rates.keys() - of_tower} == {1e-3}
    unused = {name for name, parameter in model.vision_tower.named_parameters() if not parameter.requires_grad}
    assert unused, "features come from the last layer but one"
    assert all("layers.2." in name or "post_layernorm" in name for name in unused)
    with pytest.raises(ConfigError, match="trains tower"):
        prepare_stage(model.core, TOWER)
    prepare_stage(model.core, TOWER.model_copy(update={"trainable": ("projector",)}), tower=model.vision_tower)
    assert not any(parameter.requires_grad for parameter in model.vision_tower.parameters())


def test_every_trained_parameter_has_a_gradient_also_on_a_batch_without_media(tiny_valley: Path) -> None:
    model = ValleyForConditionalGeneration.from_pretrained(tiny_valley)
    prepare_stage(model.core, TOWER, tower=model.vision_tower)
    module = trainable_module(model, TOWER, config_of(tiny_valley))
    assert isinstance(module, TowerAndCore)
    maker = BatchMaker(tiny_valley)
    for kind in ("video", "text"):
        batch = maker.micro_batch([maker.sample(kind, (1, 1))])
        pixels = [clip.pixel_values for clip in batch.clips]
        found = gradients(module, batch.model_inputs(torch.device("cpu"), attention="sdpa") | {"pixel_values": pixels})
        assert all(gradient is not None for gradient in found.values()), kind
        largest = max(float(gradient.abs().max()) for gradient in found.values() if gradient is not None)
        assert (largest > 0) == (kind == "video"), kind


def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradients(tiny_valley: Path) -> None:
    stage = TOWER.model_copy(update={"trainable": ("tower", "projector", "language_model"), "learning_rates": {}})
    maker = BatchMaker(tiny_valley)
    batch = maker.micro_batch([maker.sample("video", (1, row)) for row in range(4)])
    pixels = [clip.pixel_values for clip in batch.clips]
    inputs = batch.model_inputs(torch.device("cpu"), attention="sdpa") | {"pixel_values": pixels}
    kept, found = [], []
    for is_on in (False, True):
        model = ValleyForConditionalGeneration.from_pretrained(tiny_valley)
        prepare_stage(model.core, stage, tower=model.vision_tower)
        module = trainable_module(model, stage, config_of(tiny_valley, gradient_checkpointing=is_on))
        sizes: list[int] = []

        def count(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            module(**inputs)
        kept.append(sum(sizes))
        found.append(gradients(module, inputs))
    assert kept[1] < kept[0] / 2
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)
