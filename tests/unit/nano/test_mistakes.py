"""Sizes that cannot work are said before anything is made."""

import pytest

from valley_ray.config import load_config
from valley_ray.errors import ConfigError
from valley_ray.quickstart.config import QuickstartConfig


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("num_workers=5", "multiple of num_workers"),
        ("world.num_held_out=0", "greater than or equal to 1"),
        ("nano.tower.num_scenes=20", "raise num_scenes"),
        ("nano.tower.patch_size=7", "of patch_size"),
        ("nano.language.hidden_size=100", "even multiple of num_heads"),
        ("nano.language.num_step=1", "did you mean 'num_steps'"),
    ],
)
def test_a_size_that_cannot_work_is_named(override: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(QuickstartConfig, overrides=[override])
