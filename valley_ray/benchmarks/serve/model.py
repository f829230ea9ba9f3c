"""The model that both servers answer with, and the videos and questions they are asked about.

Random weights of a size that a CPU serves: a tower of 224 pixels and P = 256 patches, as CLIP-L/14's, before a LLaMA.
It never ends an answer by itself, so that all answers have the length that is asked for.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from valley_ray.benchmarks.long_clips import write_long_clip
from valley_ray.benchmarks.serve.config import ServeCost
from valley_ray.media.sampling import FrameSampling
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.nano.language import make_tokenizer
from valley_ray.nano.world import COLORS, DIRECTIONS, SHAPES
from valley_ray.processor import ProcessorConfig, ValleyProcessor

MAX_LENGTH = 512
CLIP_WH = (640, 360)
_NUM_WORDS = 16
"""Of a question: with system prompt and visual block about 304 tokens."""


def make_served_model(folder: Path, config: ServeCost) -> int:
    """Write the model folder; returns its number of parameters."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=3,
            num_attention_heads=3,
            image_size=224,
            patch_size=14,
        )
    )
    width = config.server_hidden_size
    language_model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width * 43 // 16,
            num_hidden_layers=config.server_num_layers,
            num_attention_heads=width // 64,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model = ValleyForConditionalGeneration.from_backbones(tower, language_model, tokenizer)
    words = set(tokenizer(_all_words(), add_special_tokens=False).input_ids)
    silent = [token for token in range(len(tokenizer)) if token not in words]
    with torch.no_grad():
        # A logit of 0 is never the largest of a hundred: no end token, no mark, nothing that could be a stop text.
        model.core.language_model.get_output_embeddings().weight[silent] = 0
    model.save_pretrained(folder)
    processing = ProcessorConfig(
        num_patches=model.config.num_patches, sampling=FrameSampling(num_frames=8), max_length=MAX_LENGTH
    )
    ValleyProcessor(tokenizer, processing).save_pretrained(folder)
    return sum(one.numel() for one in model.parameters())


def make_videos(folder: Path, config: ServeCost, count: int) -> list[Path]:
    """Clips that share no picture, encoded where they are missing (about a second each)."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{config.clip_s:g}s-{seed}.mp4" for seed in range(count)]
    for seed, path in enumerate(paths):
        if not path.is_file():
            write_long_clip(path, seed=seed, num_bframes=2, seconds=config.clip_s, size_wh=CLIP_WH)
    return paths


def questions(count: int, seed: int) -> list[str]:
    """Texts of words that the model's tokenizer knows; no two are alike."""
    random = np.random.default_rng(seed)
    words = random.choice(_all_words().split(), (count, _NUM_WORDS))
    return [" ".join(row) for row in words]


def _all_words() -> str:
    return " ".join((*COLORS, *SHAPES, *DIRECTIONS))
