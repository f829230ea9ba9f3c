"""Random models to time: one that a CPU trains at a dozen samples a second, and shapes of real ones."""

from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from valley_ray.benchmarks.small_models import WORDS, make_model, save_model
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.config import ID_FIELD_OF_TOKEN, ValleyConfig

FEWEST_WORDS, MOST_WORDS = 64, 192
"""Of an answer to train on."""

_SHAPES = {
    "llama7b-shape": (
        CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
        ),
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        32000,
    ),
    "tiny-shape": (
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ),
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
        300,
    ),
}


def make_small_model(folder: Path) -> Path:
    """Write a model folder: a tower of 224 pixels (P = 49), a language model of about six million parameters."""
    tower = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=224,
        patch_size=32,
    )
    model, tokenizer = make_model(tower, width=256, num_layers=6)
    save_model(model, tokenizer, folder)
    return folder


def random_text(random: np.random.Generator) -> str:
    """Words that the small model's tokenizer knows."""
    words = random.choice(WORDS, random.integers(FEWEST_WORDS, MOST_WORDS + 1))
    return " ".join(words)


def make_shape(name: str, device: torch.device) -> ValleyForConditionalGeneration:
    """A random model of a real one's shape, in float32 on `device`; its seven added tokens come last."""
    vision, text, vocabulary = _SHAPES[name]
    ids = {field: vocabulary + place for place, field in enumerate(ID_FIELD_OF_TOKEN.values())}
    config = ValleyConfig(
        vision_config=vision,
        text_config=LlamaConfig(vocab_size=vocabulary + len(ids), max_position_embeddings=8192, **text),
        **ids,
    )
    with device:
        return ValleyForConditionalGeneration(config)
