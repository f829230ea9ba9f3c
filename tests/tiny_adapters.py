"""Adapter folders on a tiny Valley, as a LoRA stage writes them: matrices, projector and token table have moved."""

from pathlib import Path

import torch

from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.lora import LoraSettings, add_lora, save_adapter


def make_adapter(
    base: Path,
    folder: Path,
    *,
    seed: int,
    r: int = 4,
    use_dora: bool = False,
    moved: tuple[str, ...] = ("mm_projector", "embed_tokens"),
    adapter_only: bool = False,
) -> Path:
    """Write an adapter of `base` whose answers differ from the base's and from those of other seeds."""
    model = ValleyForConditionalGeneration.from_pretrained(base)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        add_lora(model.core, LoraSettings(r=r, alpha=2 * r, dropout=0.0, use_dora=use_dora))
        for name, parameter in model.core.named_parameters():
            if "lora_" in name or any(part in name for part in moved):
                parameter.add_(0.1 * torch.randn_like(parameter))
        save_adapter(model.core, folder, adapter_only=adapter_only)
    return folder
