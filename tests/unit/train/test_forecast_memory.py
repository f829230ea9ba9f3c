"""What `--check` says of memory is what an engine takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_memory import config_of
from transformers import CLIPVisionConfig, LlamaConfig

from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.checkpoint import read_model_config
from valley_ray.model.config import ValleyConfig
from valley_ray.train.forecast import forecast_memory, forecast_stage

TESTS = Path(__file__).parents[2]
SLACK = 0.03
"""Of the forecast: tensors of a few kilobytes that belong to nothing in the formula."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight million parameters, so that they outweigh everything that a process has anyway."""
    text = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=8)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    vision.image_size, vision.patch_size = 32, 8
    torch.manual_seed(0)
    config = ValleyConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    folder = tmp_path_factory.mktemp("model")
    ValleyForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_an_engine_takes_what_was_forecast(model: Path, zero_stage: int, precision: str) -> None:
    """Between steps; DeepSpeed's buckets live only within a backward pass, on some stages."""
    words = [str(model), str(zero_stage), precision, "layers,projector"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [sys.executable, str(TESTS / "engine_memory.py"), *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured = int(done.stdout.split()[-1])
    config = config_of(model, zero_stage, precision, "layers,projector")
    forecast = forecast_stage(read_model_config(model), config, config.stages[0])
    memory = forecast_memory(forecast, config, zero_stage=zero_stage, offload=False)
    assert memory.total * (1 + SLACK) >= measured >= (memory.total - memory.buckets) * (1 - SLACK)
