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
    ):
        with pytest.raises(ConfigError, match=rule):
            SamplingParams(**values)
