"""Which lengths an engine takes: of the whole model, and of one request. Knows no engine."""

from typing import Any

from valley_ray.engine.engine import Prompt, SamplingParams
from valley_ray.errors import ConfigError, PromptTooLongError


def check_max_length(config: Any, max_length: int) -> None:
    """Raise ConfigError where a language model's configuration has no `max_length` positions."""
    context = getattr(config, "max_position_embeddings", None) or max_length
    if max_length > context:
        raise ConfigError(f"max_length={max_length} is over the model's context of {context}; lower it")


def check_fits(prompt: Prompt, params: SamplingParams, max_length: int) -> None:
    """Raise PromptTooLongError where prompt and answer together can exceed `max_length`."""
    if len(prompt.input_ids) + params.max_tokens > max_length:
        raise PromptTooLongError(
            f"the prompt has {len(prompt.input_ids)} tokens and max_tokens={params.max_tokens}, together more than "
            f"the {max_length} that fit; ask shorter, take fewer frames or lower max_tokens"
        )
    assert prompt.input_ids, "a prompt has at least one token"
    assert params.max_tokens > 0, "a request makes at least one token"
