"""The model that both servers answer with, and the videos and questions they are asked about.

Random weights of a size that a CPU serves: a tower of 224 pixels and P = 256 patches, as CLIP-L/14's, before a LLaMA.
It never ends an answer by itself, so that all answers have the length that is asked for.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionConfig

from valley_ray.benchmarks.long_clips import write_long_clip
from valley_ray.benchmarks.serve.config import ServeCost
from valley_ray.benchmarks.small_models import WORDS, make_model, save_model

CLIP_WH = (640, 360)
_NUM_WORDS = 16
"""Of a question: with system prompt and visual block about 304 tokens."""


def make_served_model(folder: Path, config: ServeCost) -> int:
    """Write the model folder; returns its number of parameters."""
    tower = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=224,
        patch_size=14,
    )
    model, tokenizer = make_model(tower, width=config.server_hidden_size, num_layers=config.server_num_layers)
    words = set(tokenizer(" ".join(WORDS), add_special_tokens=False).input_ids)
    silent = [token for token in range(len(tokenizer)) if token not in words]
    with torch.no_grad():
        # A logit of 0 is never the largest of a hundred: no end token, no mark, nothing that could be a stop text.
        model.core.language_model.get_output_embeddings().weight[silent] = 0
    save_model(model, tokenizer, folder)
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
    words = random.choice(WORDS, (count, _NUM_WORDS))
    return [" ".join(row) for row in words]
