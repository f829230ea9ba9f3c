"""The quickstart and jobs/configs/nano.yaml train the nano model in the same way."""

from pathlib import Path

from valley_ray.config import load_config
from valley_ray.quickstart.config import QuickstartConfig
from valley_ray.train.config import TrainConfig


def test_quickstart_and_the_nano_configuration_have_the_same_stages() -> None:
    yaml = load_config(TrainConfig, Path(__file__).parents[3] / "jobs" / "configs" / "nano.yaml")
    assert yaml.stages == QuickstartConfig().stages
    assert yaml.global_batch_size == QuickstartConfig().global_batch_size
