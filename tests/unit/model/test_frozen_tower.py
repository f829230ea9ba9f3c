"""A tower that is opened alone is the tower of the whole model, in every layout."""

from pathlib import Path

import pytest
import torch

from valley_ray.errors import CheckpointError
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.frozen_tower import FrozenTower, tower_key

COLOURS = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}


def check_same(folder: Path) -> None:
    model = ValleyForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tower = FrozenTower.from_pretrained(folder)
    assert {name.split(".")[0] for name in tower.state_dict()} == {"vision_tower"}
    assert {weight.dtype for weight in tower.parameters()} == {torch.float32}
    side = model.config.image_size
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tower.encode_frames(pixels), model.encode_frames(pixels), rtol=0, atol=0)
    keys = {tower_key(one.vision_tower, one.config, **COLOURS) for one in (model, tower)}
    assert len(keys) == 1


def test_the_tower_alone_is_that_of_the_whole_model_in_our_layout(tiny_valley: Path) -> None:
    check_same(tiny_valley)


def test_the_tower_alone_is_that_of_the_whole_model_in_the_released_layout(upstream_folder: Path) -> None:
    check_same(upstream_folder)


def test_a_folder_without_tower_weights_is_refused(tmp_path: Path, tiny_valley: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((tiny_valley / name).read_bytes())
    weights = load_file(tiny_valley / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("vision_tower.embeddings")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: vision_tower\.embeddings"):
        FrozenTower.from_pretrained(tmp_path)
