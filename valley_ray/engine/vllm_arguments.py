"""What vLLM is started with: a language model, sizes and the user's settings → arguments of its engine."""

import os
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from valley_ray.engine.engine import MOST_LOGPROBS
from valley_ray.engine.open import VllmSettings
from valley_ray.errors import ConfigError

_CPU_BLOCK = 32
"""Tokens per block of vLLM's cache on a CPU."""


def engine_arguments(
    folder: Path, model: PreTrainedModel, settings: VllmSettings, num_slots: int, max_length: int
) -> dict[str, Any]:
    """Arguments of vLLM's AsyncEngineArgs for the `model` that lies in `folder`.

    Raises ConfigError where the kernels of a CPU build lack the model's heads.
    """
    arguments: dict[str, Any] = {
        "model": str(folder),
        "dtype": str(model.dtype).removeprefix("torch."),
        "skip_tokenizer_init": True,
        "enable_prompt_embeds": True,
        "enable_prefix_caching": True,
        "max_model_len": max_length,
        "max_num_seqs": num_slots,
        "max_logprobs": MOST_LOGPROBS,
        "logprobs_mode": "raw_logprobs",
        "logits_processors": ["valley_ray.engine.vllm_sampling:HouseSampling"],
        # Penalties need the tokens so far when the next one is chosen.
        "async_scheduling": False,
        "generation_config": "vllm",
        "disable_log_stats": True,
        "enforce_eager": not settings.compile,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "kv_cache_memory_bytes": settings.cache_bytes,
    }
    # Inside Ray several would look for GPUs of their own; one alone computes in the engine process, since the queue
    # between two processes spins.
    arguments["distributed_executor_backend"] = "mp" if settings.tensor_parallel_size > 1 else "uni"
    if _is_cpu_build():
        config: Any = model.config.get_text_config(decoder=True)
        _check_cpu_kernels(config)
        # The smallest block of its CPU kernels: 128, its default, would find a video of 264 tokens only half as often.
        arguments["block_size"] = _CPU_BLOCK
        needed = _cache_bytes(config, model.dtype.itemsize, num_tokens=2 * num_slots * (max_length + _CPU_BLOCK))
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        arguments["kv_cache_memory_bytes"] = settings.cache_bytes or min(needed, memory // 4)
    return arguments


def _is_cpu_build() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _cache_bytes(config: Any, itemsize: int, *, num_tokens: int) -> int:
    """Of the keys and values of so many tokens."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * _head_width(config) * itemsize * num_tokens)


def _check_cpu_kernels(config: Any) -> None:
    """Raise ConfigError for heads that vLLM would refuse only when the first request comes."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    width = _head_width(config)
    if not CPUAttentionBackend.supports_head_size(width):
        served = ", ".join(map(str, CPUAttentionBackend.get_supported_head_sizes()))
        raise ConfigError(
            f"vLLM does not start: its CPU kernels serve attention heads of width {served}, the model's have {width}; "
            "use the engine slots"
        )


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
