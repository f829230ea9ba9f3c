"""Configurations that cannot work are refused with the reason and the fix."""

from pathlib import Path
from typing import Any

import pytest

from valley_ray.config import validate_config
from valley_ray.errors import ConfigError
from valley_ray.train.config import TrainConfig
from valley_ray.train.stage_config import StageConfig


def values(**changes: Any) -> dict[str, Any]:
    return {"model": "m", "output": "o", "data": {"mode": "shards", "windows_dir": "w"}, **changes}


def stage(**changes: Any) -> dict[str, Any]:
    return {"name": "s", "trainable": ["projector"], "learning_rate": 1e-3, "max_steps": 3, **changes}


def test_defaults_are_valleys_two_stages_on_zero_2() -> None:
    config = validate_config(TrainConfig, values(), source="test")
    assert [(s.name, s.trainable) for s in config.stages] == [
        ("stage1", ("projector",)),
        ("stage2", ("projector", "language_model")),
    ]
    assert config.zero_stage == 2
    assert config.max_failures > 0
    assert config.model == Path("m")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"global_batch_size": 10, "micro_batch_size": 4}, "must be a multiple of micro_batch_size=4"),
        ({"stages": [stage(epochs=1)]}, "exactly one of epochs and max_steps"),
        ({"stages": [stage(), stage()]}, "stage names must differ"),
        ({"stages": [stage(learning_rates={"language_model": 1.0})]}, "does not train: language_model"),
        ({"stages": []}, "at least 1 item"),
        ({"data": {"mode": "shards"}}, "windows_dir"),
        ({"data": {"mode": "overlap"}}, "needs pipeline"),
        ({"precision": "fp16"}, "needs use_gpu"),
        ({"zero_stag": 2}, "did you mean 'zero_stage'"),
        ({"zero_stage": 4}, "zero_stage=4"),
        ({"stages": [stage(learning_rate=float("inf"))]}, "stages.0.learning_rate=inf"),
        ({"stages": [stage(learning_rates={"projector": -1.0})]}, "stages.0.learning_rates.projector=-1.0"),
        ({"stages": [stage(betas=[0.9, 1.0])]}, "stages.0.betas.1=1.0: input should be less than 1"),
        ({"stages": [stage(max_grad_norm=float("inf"))]}, "stages.0.max_grad_norm=inf"),
        ({"seed": 2**64}, "seed="),
        ({"timeout_s": float("inf")}, "timeout_s=inf"),
        ({"cpus_per_worker": float("inf")}, "cpus_per_worker=inf"),
        ({"run_name": ".."}, "run_name: expected the name of a folder"),
        ({"run_name": "a/b"}, "run_name: expected the name of one folder, storage is where it lies"),
        ({"num_workers": [4, 2]}, "[smallest, largest]; got (4, 2)"),
    ],
)
def test_impossible_values_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_config(TrainConfig, values(**changes), source="test")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stage_config_survives_json() -> None:
    config = StageConfig(**stage(learning_rates={"projector": 2e-3}))
    assert StageConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("pipeline", [{"records": [5]}, {"media_root": 5}, {"windows_dir": None}])
def test_odd_pipeline_paths_are_left_to_the_pipeline(pipeline: dict[str, Any], tmp_path: Path) -> None:
    config = validate_config(TrainConfig, values(data={"mode": "overlap", "pipeline": pipeline}), source="test")
    assert config.under(tmp_path).data.pipeline == pipeline


def test_a_home_that_does_not_exist_is_named(tmp_path: Path) -> None:
    config = validate_config(TrainConfig, values(output="~nobody-of-that-name/x"), source="test")
    with pytest.raises(ConfigError, match="no such user's home"):
        config.under(tmp_path)
