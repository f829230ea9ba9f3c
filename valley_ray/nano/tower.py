"""The nano vision tower: a CLIP-style image encoder trained from nothing on generated frames and their captions.

Frames of random scenes become vision tower weights; the text half is thrown away. Knows no video files and no language
model. N frames, U distinct captions of a batch, S crop side, E width of the shared space.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn
from transformers import CLIPConfig, CLIPModel

from valley_ray.config import Config
from valley_ray.media.preprocess import Crop, normalize, resize_and_crop
from valley_ray.nano.questions import COLUMNS, ROWS, caption_views
from valley_ray.nano.world import COLORS, SHAPES, SIDE, VISIBLE, SceneKind, render, sample_scene

IMAGE_SIZE = 32
CROP = Crop(size=IMAGE_SIZE, short_side=round(IMAGE_SIZE * 256 / 224))
"""Upstream's 256 to 224, at the nano size."""
IMAGE_MEAN = (0.5, 0.5, 0.5)
IMAGE_STD = (0.25, 0.25, 0.25)

_VIEW_WEIGHTS = {"full": 0.5, "shape": 1.5, "place": 1.0, "color": 0.5}
_WORDS = sorted({*COLORS, *SHAPES, "and", "one", "two", "three", "four"} | set(" ".join((*ROWS, *COLUMNS)).split()))
_START, _END = 1, 2 + len(_WORDS)
"""CLIP's text model reads a caption's embedding where the end token stands; it must not have the id 2, which
transformers treats as an old checkpoint's and then looks for the largest id instead."""


class TowerConfig(Config):
    """Size of the tower and of its training."""

    width: int = Field(default=96, ge=8)
    """Hidden size; a multiple of `num_heads`."""
    num_layers: int = Field(default=3, ge=2)
    """Transformer layers; features come from the last but one."""
    num_heads: int = Field(default=4, ge=1)
    """Attention heads."""
    patch_size: int = Field(default=8, ge=1)
    """Side of a patch, pixels of the 32 x 32 crop."""
    num_scenes: int = Field(default=18_000, ge=2)
    """Scenes rendered for training, `frames_per_scene` frames each."""
    frames_per_scene: int = Field(default=2, ge=1)
    """Frames of each scene, at random times."""
    num_steps: int = Field(default=1200, ge=2)
    """Optimizer steps."""
    batch_size: int = Field(default=64, ge=2)
    """Frames per step; at most half of all that are rendered."""
    learning_rate: float = Field(default=4e-3, gt=0)
    """Peak of a one-cycle schedule."""
    seed: int = Field(default=0, ge=0)
    """Weights, scenes and order."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.num_heads or IMAGE_SIZE % self.patch_size:
            raise ValueError(
                f"width must be a multiple of num_heads and {IMAGE_SIZE} of patch_size, "
                f"got {self.width=} {self.num_heads=} {self.patch_size=}"
            )
        if self.batch_size > self.num_scenes // 2 * self.frames_per_scene:
            raise ValueError(f"{self.batch_size=} is more than half of the rendered frames; raise num_scenes")
        return self


@dataclass(frozen=True, eq=False)
class _Pool:
    """Frames with their captions in several degrees of detail."""

    frames_NSSC: npt.NDArray[np.uint8]
    captions: dict[str, torch.Tensor]
    """View name to int64 [N, words] token ids, padded with 0."""


def train_tower(config: TowerConfig, *, on_step: Callable[[int, int, float], None] | None = None) -> nn.Module:
    """Train a CLIPModel contrastively and return it in eval mode; its vision half is the tower.

    The loss is CLIP's, image to caption and caption to image, summed over views of a caption (all of it, its shape,
    its place, its colour), where frames with equal captions are positives of each other. Without the short views a
    batch holds hardly two frames that differ in shape alone, and the shape is learned last.
    Deterministic for a seed, a thread count and a machine. `on_step` gets (step, num_steps, loss).
    """
    torch.manual_seed(config.seed)
    pool = _make_pool(config)
    model = new_clip(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.num_steps, pct_start=0.1
    )
    model.train()
    for step, rows in enumerate(_batches(config, len(pool.frames_NSSC))):
        loss = _contrastive_loss(model, pool, rows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step + 1, config.num_steps, float(loss.detach()))
    trained: nn.Module = model.eval()
    return trained


@torch.no_grad()
def zero_shot_accuracy(model: nn.Module, *, seed: int, num_frames: int) -> dict[str, float]:
    """Share of fresh single-shape frames whose nearest full caption has the right color, shape and place."""
    pool = _render_pool([("single", index) for index in range(num_frames)], seed=seed, frames_per_scene=1)
    candidates = [f"{c} {s} {r} {col}" for c in COLORS for s in SHAPES for r in ROWS for col in COLUMNS]
    texts = F.normalize(_text_embedding(model, _token_ids(candidates)), dim=-1)
    images = F.normalize(_image_embedding(model, pool.frames_NSSC), dim=-1)
    nearest = (images @ texts.T).argmax(dim=1)
    best = _token_ids(candidates)[nearest]
    truth = pool.captions["full"][:, : best.shape[1]]
    same_length = torch.zeros_like(best)
    same_length[:, : truth.shape[1]] = truth
    equal = best == same_length
    return {
        "color": float(equal[:, 1].float().mean()),
        "shape": float(equal[:, 2].float().mean()),
        "place": float(equal[:, 3:].all(dim=1).float().mean()),
    }


def new_clip(config: TowerConfig) -> CLIPModel:
    """A small CLIPModel with weights scaled to their inputs: CLIP's own 0.02 hides the position embedding here."""
    model = CLIPModel(
        CLIPConfig(
            text_config={
                "vocab_size": _END + 1,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "max_position_embeddings": 16,
                "bos_token_id": _START,
                "eos_token_id": _END,
                "pad_token_id": 0,
            },
            vision_config={
                "hidden_size": config.width,
                "intermediate_size": 2 * config.width,
                "num_hidden_layers": config.num_layers,
                "num_attention_heads": config.num_heads,
                "image_size": IMAGE_SIZE,
                "patch_size": config.patch_size,
            },
            projection_dim=64,
        )
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5)
                if module.bias is not None:
                    module.bias.zero_()
        vision, text = model.vision_model.embeddings, model.text_model.embeddings
        vision.position_embedding.weight.normal_(0, 0.5)
        vision.class_embedding.normal_(0, 0.5)
        vision.patch_embedding.weight.normal_(0, (3 * config.patch_size**2) ** -0.5)
        text.token_embedding.weight.normal_(0, 0.5)
        text.position_embedding.weight.normal_(0, 0.2)
    return model


def _make_pool(config: TowerConfig) -> _Pool:
    """Mostly single shapes: the other kinds come in the last third, after the shapes are known."""
    kinds: tuple[SceneKind, ...] = ("single", "single", "single", "pair", "count")
    scenes: list[tuple[SceneKind, int]] = [
        ("single" if index < config.num_scenes // 2 else kinds[index % len(kinds)], index)
        for index in range(config.num_scenes)
    ]
    return _render_pool(scenes, seed=config.seed + 1, frames_per_scene=config.frames_per_scene)


def _render_pool(scenes: Sequence[tuple[SceneKind, int]], *, seed: int, frames_per_scene: int) -> _Pool:
    rng = np.random.default_rng(seed)
    frames: list[npt.NDArray[np.uint8]] = []
    views: dict[str, list[str]] = {name: [] for name in _VIEW_WEIGHTS}
    for kind, index in scenes:
        scene = sample_scene(seed, index, kind)
        moments = rng.random(frames_per_scene)
        frames.append(resize_and_crop(render(scene, moments), CROP))
        for moment in moments:
            captions = caption_views(scene, float(moment), offset=(SIDE - VISIBLE) / 2, side=VISIBLE)
            for name, texts in views.items():
                texts.append(captions[name])
    return _Pool(np.concatenate(frames), {name: _token_ids(texts) for name, texts in views.items()})


def _batches(config: TowerConfig, num_frames: int) -> Iterator[npt.NDArray[np.int64]]:
    """Row numbers; single shapes first, all kinds (the pool's second half) from two thirds of the steps on."""
    rng = np.random.default_rng(config.seed)
    for step in range(config.num_steps):
        end = num_frames if step >= config.num_steps * 2 // 3 else num_frames // 2
        yield rng.choice(end, config.batch_size, replace=False)


def _contrastive_loss(model: CLIPModel, pool: _Pool, rows: npt.NDArray[np.int64]) -> torch.Tensor:
    views = {name: torch.unique(ids[rows], dim=0, return_inverse=True) for name, ids in pool.captions.items()}
    texts = F.normalize(_text_embedding(model, torch.cat([unique for unique, _ in views.values()])), dim=-1)
    images = F.normalize(_image_embedding(model, pool.frames_NSSC[rows]), dim=-1)
    scale = model.logit_scale.exp().clamp(max=50)
    loss = images.new_zeros(())
    start = 0
    for name, (unique, of_image) in views.items():
        logits_NU = scale * images @ texts[start : start + len(unique)].T
        start += len(unique)
        is_positive_NU = F.one_hot(of_image, len(unique)).to(logits_NU.dtype)
        to_caption = F.cross_entropy(logits_NU, of_image)
        to_image = -((is_positive_NU / is_positive_NU.sum(0)) * logits_NU.log_softmax(0)).sum(0).mean()
        loss = loss + _VIEW_WEIGHTS[name] * (to_caption + to_image) / 2
    return loss


def _image_embedding(model: Any, frames_NSSC: npt.NDArray[np.uint8]) -> torch.Tensor:
    """[N, E], not normalised."""
    pixel_values = torch.from_numpy(normalize(frames_NSSC, mean=IMAGE_MEAN, std=IMAGE_STD))
    pooled = model.vision_model(pixel_values=pixel_values).pooler_output
    embedding: torch.Tensor = model.visual_projection(pooled)
    return embedding


def _text_embedding(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """[U, E], not normalised."""
    used = int((token_ids != 0).sum(dim=1).max())
    pooled = model.text_model(input_ids=token_ids[:, :used]).pooler_output
    embedding: torch.Tensor = model.text_projection(pooled)
    return embedding


def _token_ids(captions: Sequence[str]) -> torch.Tensor:
    """int64 [N, 16], padded with 0."""
    ids = torch.zeros(len(captions), 16, dtype=torch.int64)
    numbers = {word: number + 2 for number, word in enumerate(_WORDS)}
    for row, caption in enumerate(captions):
        tokens = [_START, *(numbers[word] for word in caption.split()), _END]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids
