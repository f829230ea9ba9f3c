"""Attention over packed rows on a GPU: flash kernels that take samples of any length one behind the other.

With the flash-attn package transformers' own implementation is used, else torch's. Everywhere else a mask of four
dimensions keeps samples apart, which costs what the whole row squared costs.
"""

import importlib.util
from typing import Any

import torch
from torch import nn
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from valley_ray.errors import ConfigError
from valley_ray.train.packing import TORCH_VARLEN

FIRST_CAPABILITY = (8, 0)
"""CUDA's compute capability from which there are such kernels (Ampere)."""


def use_packed_attention(core: Any, device: torch.device, *, precision: str) -> str:
    """Give the language model of `core` (ValleyCore, on `device`) the attention that packed rows cost least with.

    Returns its name: that of the model as it is on CPUs, in float32 and on old GPUs.

    Raises:
        ConfigError: samples of this model cannot share a row.
    """
    check_packable(core)
    if device.type == "cuda" and precision != "fp32" and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY:
        has_package = importlib.util.find_spec("flash_attn") is not None
        core.language_model.set_attn_implementation("flash_attention_2" if has_package else register_varlen())
    return str(core.language_model.config._attn_implementation)


def check_packable(core: Any) -> None:
    """Raise ConfigError where samples of this model (ValleyCore) cannot share a row."""
    if core.config.splice != "strict":
        raise ConfigError(
            f"pack_tokens puts several samples into a row, of which splice={core.config.splice} takes one clip; set "
            "pack_tokens=null, or splice=strict in the model's config.json"
        )
    if getattr(core.language_model, "_is_stateful", False):
        raise ConfigError(
            f"{type(core.language_model).__name__} carries a state from one sample of a row to the next; set "
            "pack_tokens=null"
        )


def register_varlen() -> str:
    """Make torch's kernels known to transformers; returns the name to ask for them by."""
    AttentionInterface.register(TORCH_VARLEN, varlen_attention_forward)
    # Rows that are not packed are masked and computed as with sdpa.
    AttentionMaskInterface.register(TORCH_VARLEN, sdpa_mask)
    return TORCH_VARLEN


def varlen_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention in samples of a packed row; as sdpa where no `cu_seq_lens_q` says where they begin.

    Args:
        query: [1, H, L, d]; `key` and `value` may have fewer heads.

    Returns:
        [1, L, H, d], and None for the weights, which are not computed.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output
    query_LHd, key_LHd, value_LHd = (heads[0].transpose(0, 1) for heads in (query, key, value))
    attended = varlen.varlen_attn(
        query_LHd,
        key_LHd,
        value_LHd,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(attended, torch.Tensor), "nothing beside the output was asked for"
    return attended[None], None
