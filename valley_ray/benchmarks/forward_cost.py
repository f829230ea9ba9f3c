"""What a forward pass of the model costs beside the same transformers modules called by hand, in CPU time.

Random weights, realistic shapes (P = 256 patches of 224 px, 8 frames, LLaMA's vocabulary). Both ways must give equal
logits before they are timed, and take turns while they are. Knows no Ray.
B rows, T frames, P patches, Dv tower width, D language width, L tokens.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from pydantic import Field
from transformers import CLIPVisionConfig, LlamaConfig

from valley_ray.config import Config
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.config import ID_FIELD_OF_TOKEN, ValleyConfig

POOLINGS = ("mean", "max", "importance", "delta")
ATOL, RTOL = 1e-3, 1e-4
"""Equal logits: the tolerance of the parity set."""

_VOCABULARY = 32000
_IDS = {field: _VOCABULARY + place for place, field in enumerate(ID_FIELD_OF_TOKEN.values())}


class ForwardCost(Config):
    """What is timed."""

    num_rounds: int = Field(default=7, ge=1)
    """Rounds per case; medians over them are reported."""
    batch_size: int = Field(default=2, ge=1)
    """B, videos per batch, one in each row."""
    num_frames: int = Field(default=8, ge=1)
    """T."""
    num_text_tokens: int = Field(default=96, ge=2)
    """Tokens of a row beside its visual block."""
    hidden_size: int = Field(default=384, ge=128, multiple_of=128)
    """D; with six layers and LLaMA's vocabulary about 36 million parameters."""


@dataclass(frozen=True)
class CaseCost:
    """Medians of one case."""

    ours_cpu_ms: float
    by_hand_cpu_ms: float
    forward_vs_by_hand: float
    """Ratio of the two."""


def forward_numbers(config: ForwardCost, say: Callable[[str], None]) -> dict[str, object]:
    """What jobs/benchmark_model.py reports, on one thread of torch."""
    torch.set_num_threads(1)
    say(f"{'':<12}{'ours, ms':>10}{'by hand':>10}{'ratio':>8}")
    costs = {}
    for name, cost in measure(config):
        costs[name] = cost
        say(f"{name:<12}{cost.ours_cpu_ms:>10.1f}{cost.by_hand_cpu_ms:>10.1f}{cost.forward_vs_by_hand:>8.3f}")
    return {
        "forward_vs_by_hand": costs["mean"].forward_vs_by_hand,
        "cases": {name: asdict(cost) for name, cost in costs.items()},
        "config": config.model_dump(),
        "torch": torch.__version__,
    }


def measure(config: ForwardCost) -> Iterator[tuple[str, CaseCost]]:
    """Each pooling over a batch of videos, and `text_only` rows, by name; the caller sets torch's threads.

    Raises AssertionError where the two ways give other logits: then there is nothing to compare.
    """
    for pooling in POOLINGS:
        model = make_model(config, pooling)
        input_ids, pixel_values = make_batch(config, model.config)
        yield pooling, _compare(model, input_ids, pixel_values, config.num_rounds)
        if pooling == "mean":
            text = torch.randint(3, _VOCABULARY, input_ids.shape, generator=torch.Generator().manual_seed(1))
            yield "text_only", _compare(model, text, None, config.num_rounds)


def make_model(config: ForwardCost, pooling: str) -> ValleyForConditionalGeneration:
    """Random weights over a CLIP tower of 256 patches."""
    width = config.hidden_size
    vision = CLIPVisionConfig(
        hidden_size=width // 2,
        intermediate_size=width * 2,
        num_hidden_layers=3,
        num_attention_heads=width // 128,
        image_size=224,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=_VOCABULARY + len(_IDS),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=6,
        num_attention_heads=width // 64,
        max_position_embeddings=2048,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        valley = ValleyConfig(text_config=text, vision_config=vision, pooling=pooling, **_IDS)
        model: ValleyForConditionalGeneration = ValleyForConditionalGeneration(valley).eval()
    return model


def make_batch(config: ForwardCost, valley: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids int64 [B, L] with a visual block in the middle of each row, and pixel values [B, T, 3, 224, 224]."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch_size, config.num_frames, 3, valley.image_size, valley.image_size)
    pixel_values = torch.randn(shape, generator=generator)
    block = [valley.im_start_token_id, *[valley.im_patch_token_id] * valley.num_patches, valley.im_end_token_id]
    block += [valley.vi_start_token_id, *[valley.vi_frame_token_id] * config.num_frames, valley.vi_end_token_id]
    before = config.num_text_tokens // 2
    text = torch.randint(3, _VOCABULARY, (config.batch_size, config.num_text_tokens), generator=generator)
    blocks = torch.tensor(block).expand(config.batch_size, -1)
    return torch.cat([text[:, :before], blocks, text[:, before:]], dim=1), pixel_values


def forward_by_hand(
    model: ValleyForConditionalGeneration, input_ids: torch.Tensor, pixel_values: torch.Tensor | None
) -> torch.Tensor:
    """Logits [B, L, V] as somebody writes them who has the modules and one video per row, and no house around them."""
    core, config = model.core, model.config
    embeddings = core.language_model.get_input_embeddings()(input_ids)
    if pixel_values is not None:
        num_videos, num_frames = pixel_values.shape[:2]
        hidden = model.vision_tower(pixel_values.flatten(0, 1), output_hidden_states=True).hidden_states[-2]
        projected = core.mm_projector(hidden).unflatten(0, (num_videos, num_frames))  # [B, T, 1 + P, D]
        patches = _pooled(core, projected[:, :, 1:])
        embeddings[input_ids == config.im_patch_token_id] = patches.flatten(0, 1)
        embeddings[input_ids == config.vi_frame_token_id] = projected[:, :, 0].flatten(0, 1)
    logits: torch.Tensor = core.language_model(inputs_embeds=embeddings).logits
    return logits


def _pooled(core: Any, patches: torch.Tensor) -> torch.Tensor:
    """Projected patches [B, T, P, D] → [B, P, D]."""
    pooling: Any = core.pooling
    match core.config.pooling:
        case "mean":
            return patches.mean(dim=1)
        case "max":
            return patches.amax(dim=1)
        case "importance":
            scores: torch.Tensor = pooling.score(patches.flatten(2)).softmax(dim=1)  # [B, T, 1]
            return (scores[..., None] * patches).sum(dim=1)
        case other:
            assert other == "delta", f"no way by hand for {other=}"
            steps = patches + pooling.position_encoding[: patches.shape[1], None]
            encoded = pooling.encoder(steps.transpose(1, 2).flatten(0, 1))[:, -1]
            deltas: torch.Tensor = encoded.unflatten(0, (len(patches), -1))
            return patches.mean(dim=1) + deltas


@torch.inference_mode()
def _compare(
    model: ValleyForConditionalGeneration,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    num_rounds: int,
) -> CaseCost:
    def ours() -> torch.Tensor:
        logits: torch.Tensor = model(input_ids, pixel_values=pixel_values).logits
        return logits

    def by_hand() -> torch.Tensor:
        return forward_by_hand(model, input_ids, pixel_values)

    torch.testing.assert_close(ours(), by_hand(), atol=ATOL, rtol=RTOL)  # also the warm-up
    times: dict[Callable[[], torch.Tensor], list[float]] = {ours: [], by_hand: []}
    for index in range(num_rounds):
        # Whoever goes first changes from round to round, so that a drifting clock favours nobody.
        for run in (ours, by_hand) if index % 2 else (by_hand, ours):
            start = time.process_time()
            run()
            times[run].append((time.process_time() - start) * 1000)
    ours_ms, by_hand_ms = median(times[ours]), median(times[by_hand])
    return CaseCost(round(ours_ms, 1), round(by_hand_ms, 1), round(ours_ms / by_hand_ms, 4))
