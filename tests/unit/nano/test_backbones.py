"""Backbones learn something in a few steps and come out as one model folder."""

from pathlib import Path

import numpy as np
import pytest

from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.nano.backbones import BackboneProgress, NanoConfig, make_backbones
from valley_ray.nano.language import LanguageConfig
from valley_ray.nano.tower import TowerConfig, train_tower, zero_shot_accuracy
from valley_ray.processor import ValleyProcessor

SMALL = NanoConfig(
    tower=TowerConfig(width=32, num_scenes=100, num_steps=60, batch_size=32, learning_rate=1e-3),
    language=LanguageConfig(hidden_size=32, intermediate_size=64, num_layers=1, num_steps=60, batch_size=16),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[BackboneProgress]]:
    told: list[BackboneProgress] = []
    folder = make_backbones(tmp_path_factory.mktemp("nano") / "backbones", SMALL, on_progress=told.append)
    return folder, told


def test_backbones_open_as_a_model_folder(made: tuple[Path, list[BackboneProgress]]) -> None:
    folder, _ = made
    model = ValleyForConditionalGeneration.from_pretrained(folder)
    processor = ValleyProcessor.from_pretrained(folder)
    assert model.config.num_patches == processor.num_patches == 16
    assert sorted(path.name for path in folder.parent.iterdir()) == ["backbones"]
    features = model.encode_frames(processor.pixel_values(np.zeros((2, 32, 32, 3), np.uint8)))
    assert tuple(features.shape) == (2, 17, 32)


def test_both_backbones_report_falling_losses(made: tuple[Path, list[BackboneProgress]]) -> None:
    _, told = made
    for name in ("tower", "language"):
        losses = [progress.loss for progress in told if progress.name == name]
        assert len(losses) == 3
        assert losses[1] < losses[0]  # the last third brings harder scenes


def test_saved_tower_is_the_trained_one(made: tuple[Path, list[BackboneProgress]]) -> None:
    folder, _ = made
    weights = train_tower(SMALL.tower).vision_model.state_dict()
    saved = ValleyForConditionalGeneration.from_pretrained(folder).vision_tower.state_dict()
    assert set(saved) == set(weights)
    # Another number of threads sums in another order; a random tower would be off by its whole scale.
    for name, weight in weights.items():
        assert (saved[name] - weight).abs().max() < 0.05, name


def test_tower_learns_colours_from_captions() -> None:
    config = TowerConfig(width=64, num_scenes=600, num_steps=120, batch_size=64)
    trained = zero_shot_accuracy(train_tower(config), seed=9, num_frames=200)
    assert trained["color"] > 0.5, "chance is one in six"
