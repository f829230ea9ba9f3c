"""What a run has trained becomes a model folder; an adapter alone where it and the start are the same model."""

from pathlib import Path

import pytest
import torch

from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.lora import load_adapter
from valley_ray.train.export import ADAPTER_FOLDER, export_model, put_trained
from valley_ray.train.stage_config import StageConfig
from valley_ray.train.stages import prepare_stage

LORA = {"r": 4}


def trained(folder: Path, *stages: str) -> dict[str, torch.Tensor]:
    """Random values of what each stage trains, one after the other."""
    values: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for parts in stages:
        model = ValleyForConditionalGeneration.from_pretrained(folder)
        put_trained(model, values, lora=LORA, adapt="lora" in parts)
        stage = StageConfig(name="s", trainable=tuple(parts.split()), learning_rate=1.0, max_steps=1)
        for group in prepare_stage(model.core, stage, tower=model.vision_tower):
            for name, parameter in zip(group.names, group.parameters, strict=True):
                values[name] = torch.randn(parameter.shape, generator=generator) * 0.1
    return values


def logits(model: ValleyForConditionalGeneration) -> torch.Tensor:
    with torch.no_grad():
        return model.core(torch.arange(5, 25)[None]).logits


@pytest.mark.parametrize(
    ("stages", "has_adapter"),
    [
        (("projector embeddings", "projector lora"), True),
        (("projector lora", "embeddings lora"), True),
        (("layers", "projector lora"), False),
        (("projector lora", "layers", "lora"), False),
        (("lm_head lora",), False),
        (("tower projector", "lora"), False),
    ],
)
def test_an_adapter_stands_alone_only_where_it_and_the_start_are_the_trained_model(
    stages: tuple[str, ...], has_adapter: bool, tiny_valley: Path, tmp_path: Path
) -> None:
    export_model(tiny_valley, tmp_path / "out", values := trained(tiny_valley, *stages), lora=LORA)
    unmerged = ValleyForConditionalGeneration.from_pretrained(tiny_valley).eval()
    put_trained(unmerged, values, lora=LORA, adapt=False)
    merged = ValleyForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(merged), logits(unmerged.eval()), atol=1e-5, rtol=1e-5)
    adapter = tmp_path / "out" / ADAPTER_FOLDER
    assert adapter.exists() == has_adapter
    if has_adapter:
        separate = ValleyForConditionalGeneration.from_pretrained(tiny_valley)
        load_adapter(separate.core, adapter)
        torch.testing.assert_close(logits(separate.eval()), logits(merged), atol=1e-5, rtol=1e-5)
