"""Random models to time: one that a CPU trains at a dozen samples a second, and shapes of real ones."""

from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from valley_ray.media.sampling import FrameSampling
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.config import ID_FIELD_OF_TOKEN, ValleyConfig
from valley_ray.nano.language import make_tokenizer
from valley_ray.nano.world import COLORS, DIRECTIONS, SHAPES
from valley_ray.processor import ProcessorConfig, ValleyProcessor

MAX_LENGTH = 512
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
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=224,
            patch_size=32,
        )
    )
    language_model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model = ValleyForConditionalGeneration.from_backbones(tower, language_model, tokenizer)
    model.save_pretrained(folder)
    config = ProcessorConfig(
        num_patches=model.config.num_patches, sampling=FrameSampling(num_frames=8), max_length=MAX_LENGTH
    )
    ValleyProcessor(tokenizer, config).save_pretrained(folder)
    return folder


def random_text(random: np.random.Generator) -> str:
    """Words that the small model's tokenizer knows."""
    words = random.choice([*COLORS, *SHAPES, *DIRECTIONS], random.integers(FEWEST_WORDS, MOST_WORDS + 1))
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
