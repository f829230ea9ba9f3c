"""What config.json claims, held against the weight files before a module is built.

A claim that no weight bears out would cost memory and time without end, or end in a traceback from below.
"""

from pathlib import Path
from typing import Any

import torch

from valley_ray.errors import CheckpointError
from valley_ray.model.config import ID_FIELD_OF_TOKEN, ValleyConfig

WIDTHS = ("vocab_size", "hidden_size", "intermediate_size", "head_dim")
"""Fields that are a length of some weight, or a part of one."""


def check_claims(config: ValleyConfig, state: dict[str, torch.Tensor], path: Path) -> None:
    """Compare `config`, read from `path`, with the weights of `state`.

    Raises:
        CheckpointError: a part with more layers or a greater width than the weights have, or ids of added tokens that
            are outside the vocabulary or the same twice.
    """
    longest = max((length for tensor in state.values() for length in tensor.shape), default=0)
    for part in (config.text_config, config.vision_config):
        _check_part(part, path, longest=longest, num_weights=len(state))
    _check_ids(config, path)


def _check_part(part: Any, path: Path, *, longest: int, num_weights: int) -> None:
    limits = dict.fromkeys(WIDTHS, longest) | {"num_hidden_layers": num_weights}
    for name, limit in limits.items():
        claimed = getattr(part, name, None)
        if isinstance(claimed, int) and claimed > limit:
            raise CheckpointError(
                f"{path}: {name}={claimed} of {part.model_type} is more than the weight files hold; copy it again"
            )


def _check_ids(config: ValleyConfig, path: Path) -> None:
    ids = {token: getattr(config, field) for token, field in ID_FIELD_OF_TOKEN.items()}
    known = {token: token_id for token, token_id in ids.items() if token_id not in (None, -1)}
    vocab_size: int = config.text_config.vocab_size  # type: ignore[union-attr]
    outside = [f"{token} {token_id}" for token, token_id in known.items() if not 0 <= token_id < vocab_size]
    if outside:
        raise CheckpointError(
            f"{path}: the model has {vocab_size=}, but the added tokens have other ids: {', '.join(outside)}; use the "
            "tokenizer saved with the model"
        )
    if len(set(known.values())) < len(known):
        raise CheckpointError(f"{path}: two added tokens have one id ({known}); use the tokenizer saved with the model")
