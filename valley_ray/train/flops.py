"""What a step costs in floating point operations that the model needs, whatever the implementation spends; and what
GPUs can do. MFU is the one over the other.

Counted are matrix products alone, a multiplication and an addition each as one. Legend: t tokens of a sample, D width.

- a linear layer of n weights: 2 n per token forward, 2 n for the gradient of its input, 2 n for the gradient of its
  weights where those are trained;
- causal attention of one layer: 4 t D / 2 per token forward (scores and values, half of them masked), twice that
  backward;
- the head: as a linear layer, for label tokens alone;
- the tower: forward per frame, full attention, and backward only where it is trained.

Padding, frozen weights' gradients, and what gradient checkpointing computes twice count for nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from valley_ray.model import ValleyForConditionalGeneration

PEAK_FLOPS = {
    "V100": 125e12,
    "A100": 312e12,
    "A10": 125e12,
    "A40": 150e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}
"""Dense bf16 (V100: fp16) FLOP per second by a part of CUDA's name of the device, from the vendors' data sheets."""


@dataclass(frozen=True)
class FlopCounter:
    """FLOP of a stage's model per unit of what a batch holds; made before an engine spreads the weights."""

    per_token: float
    per_label_token: float
    per_squared_token: float
    """Of attention, per square of a sample's number of tokens."""
    per_frame: float

    def count(self, *, num_tokens: int, num_label_tokens: int, num_squared_tokens: int, num_frames: int) -> float:
        """FLOP of a forward and a backward pass; `num_squared_tokens` is the sum over samples."""
        return (
            self.per_token * num_tokens
            + self.per_label_token * num_label_tokens
            + self.per_squared_token * num_squared_tokens
            + self.per_frame * num_frames
        )


def count_flops(model: ValleyForConditionalGeneration) -> FlopCounter:
    """The counter of `model`, whose trainable parameters are marked by `requires_grad`."""
    language_model = model.core.language_model
    head = language_model.get_output_embeddings()
    config = language_model.config
    per_token = sum(_linear(module) for module in language_model.modules() if _is_linear(module) and module is not head)
    attention_width = config.num_attention_heads * _head_dim(config)
    return FlopCounter(
        per_token=per_token,
        per_label_token=_linear(head),
        per_squared_token=3 * 2.0 * attention_width * config.num_hidden_layers,
        per_frame=_per_frame(model),
    )


def known_peak_flops(device: torch.device, *, precision: str) -> float | None:
    """Of the GPU `device` in bf16 or fp16; None where its name is not known, for float32 and for CPUs."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    matching = [known for known in PEAK_FLOPS if known in name]
    return PEAK_FLOPS[max(matching, key=len)] if matching else None


def _linear(module: Any) -> float:
    """FLOP of one token through a linear layer, forward and backward."""
    passes = 3 if module.weight.requires_grad else 2
    return 2.0 * passes * int(module.in_features) * int(module.out_features)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _per_frame(model: ValleyForConditionalGeneration) -> float:
    """FLOP of one frame through the tower: forward, and backward through the layers that are trained."""
    tower, config = model.vision_tower, model.config.vision_config
    tokens = 1 + model.config.num_patches
    layers = [module for module in tower.modules() if _is_linear(module)]
    linear = sum(2.0 * module.in_features * module.out_features for module in layers)
    trained = sum(2.0 * module.in_features * module.out_features for module in layers if module.weight.requires_grad)
    attention = 4.0 * tokens**2 * config.hidden_size * config.num_hidden_layers
    patches = 2.0 * 3 * config.patch_size**2 * config.hidden_size * model.config.num_patches
    return float((linear * tokens + attention + patches) * (1.0 + 2.0 * trained / linear))
