"""Sampling parameters that no request can mean are refused by name."""

import pytest

from valley_ray.engine.engine import SamplingParams
from valley_ray.errors import ConfigError


def test_numbers_outside_their_range_are_refused() -> None:
    for values, rule in (
        ({"max_tokens": 0}, "max_tokens >= 1"),
        ({"temperature": -1.0}, "0 <= temperature < inf"),
        ({"temperature": float("nan")}, "0 <= temperature < inf"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"top_k": -1}, "top_k >= 0"),
        ({"presence_penalty": 2.5}, "-2 <= presence_penalty <= 2"),
        ({"frequency_penalty": float("nan")}, "-2 <= frequency_penalty <= 2"),
        ({"logit_bias": ((3, 101.0),)}, "-100 <= logit_bias <= 100"),
        ({"logprobs": 21}, "0 <= logprobs <= 20"),
    ):
        with pytest.raises(ConfigError, match=rule):
            SamplingParams(**values)
