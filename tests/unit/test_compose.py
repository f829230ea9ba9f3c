"""A tower and a language model, each a folder, become a model folder that opens, trains and answers."""

import json
from pathlib import Path

import pytest
import torch
from tiny import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from valley_ray.assistant import Assistant
from valley_ray.cli import main
from valley_ray.cli.weights import POOLINGS
from valley_ray.engine.engine import SamplingParams
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.processor import ValleyProcessor


def save_backbones(folder: Path) -> tuple[Path, Path]:
    tower, language = folder / "tower", folder / "language"
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    SiglipVisionModel(vision).save_pretrained(tower)
    settings = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 32, "width": 32}, "resample": 3}
    (tower / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = make_tokenizer()
    words = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=96,
    )
    LlamaForCausalLM(words).save_pretrained(language)
    tokenizer.save_pretrained(language)
    return tower, language


def test_a_tower_and_a_language_model_become_a_folder_that_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tower, language = save_backbones(tmp_path)
    output = tmp_path / "model"
    words = ["--tower", str(tower), "--language-model", str(language), "--output", str(output), "--pooling", "delta"]
    assert main(["compose", *words]) == 0
    assert f"wrote {output}; train it" in capsys.readouterr().out
    processor = ValleyProcessor.from_pretrained(output)
    assert (processor.image_mean, processor.image_std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert (processor.image_crop.fit, processor.image_crop.size, processor.max_length) == ("stretch", 32, 96)
    with Assistant.from_pretrained(output) as assistant:
        assert assistant.model.config.pooling == "delta"
        assert len(assistant.ask("What is moving?", params=SamplingParams(max_tokens=3)).token_ids) <= 3
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "random: train this folder" in card


def test_the_same_seed_draws_the_same_projector(tmp_path: Path) -> None:
    tower, language = save_backbones(tmp_path)
    weights = []
    for name, seed in (("one", "3"), ("same", "3"), ("other", "4")):
        words = ["--tower", str(tower), "--language-model", str(language), "--output", str(tmp_path / name)]
        assert main(["compose", *words, "--seed", seed]) == 0
        weights.append(ValleyForConditionalGeneration.from_pretrained(tmp_path / name).core.mm_projector.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_what_cannot_be_composed_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tower, language = save_backbones(tmp_path)
    words = ["compose", "--tower", str(tower), "--output", str(tmp_path / "model")]
    assert main([*words, "--language-model", str(tmp_path / "nowhere")]) == 2
    assert "language model" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    assert main(["compose", "--tower", str(tower), "--language-model", str(language), "--output", str(tower)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_every_pooling_that_is_offered_exists(tmp_path: Path) -> None:
    tower, language = save_backbones(tmp_path)
    for pooling in POOLINGS:
        words = ["--tower", str(tower), "--language-model", str(language), "--output", str(tmp_path / pooling)]
        assert main(["compose", *words, "--pooling", pooling]) == 0
        assert ValleyForConditionalGeneration.from_pretrained(tmp_path / pooling).config.pooling == pooling
