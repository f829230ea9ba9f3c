"""Overrides reach into mappings and lists of the file, and say so where they cannot."""

from pathlib import Path

import pytest

from valley_ray.config import load_config
from valley_ray.errors import ConfigError
from valley_ray.train.config import TrainConfig

FILE = """
model: m
output: o
data: {mode: shards, windows_dir: w}
stages:
  - {name: one, trainable: [projector], learning_rate: 0.1, max_steps: 70}
  - {name: two, trainable: [projector, lora], learning_rate: 0.1, max_steps: 230}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(FILE)
    return tmp_path / "run.yaml"


def test_an_override_reaches_into_a_list_of_the_file(path: Path) -> None:
    config = load_config(TrainConfig, path, ["stages.1.max_steps=2", "stages.0.trainable.0=embeddings"])
    assert [stage.max_steps for stage in config.stages] == [70, 2]
    assert [stage.trainable for stage in config.stages] == [("embeddings",), ("projector", "lora")]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.2.max_steps=2", "stages is a list of 2; expected a position from 0 to 1, got '2'"),
        ("stages.stage1.max_steps=2", "stages is a list of 2; expected a position from 0 to 1, got 'stage1'"),
        ("stages.-1.max_steps=2", "got '-1'"),
        ("lora.0.r=2", "position 0 of lora, which the file does not write as a list; give the list whole"),
        ("stages.0.max_step=2", "did you mean 'max_steps'"),
        ("max_setps=2", "did you mean 'stages.0.max_steps'"),
        ("learning_rates=2", "did you mean 'stages.0.learning_rates'"),
        ("num_worker=2", "did you mean 'num_workers'"),
    ],
)
def test_an_override_that_names_no_place_is_told(path: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, path, [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_lists_that_were_read_are_left_as_they_are() -> None:
    from valley_ray.config import apply_overrides

    stages = [{"max_steps": 70}]
    values = {"stages": stages}
    apply_overrides(values, ["stages.0.max_steps=2"])
    assert stages == [{"max_steps": 70}]
    assert values == {"stages": [{"max_steps": 2}]}


@pytest.mark.parametrize(
    ("override", "blamed"),
    [
        ("num_worker=2", "the command line: unknown key 'num_worker'"),
        ("stages.0.max_step=2", "the command line: unknown key 'stages.0.max_step'"),
        ("dataa.mode=shards", "the command line: unknown key 'dataa'"),
        ("log_every=0", "the command line: log_every=0"),
        ("stages=[{name: one}]", "the command line: missing key 'stages.0.trainable'"),
        ("micro_batch_size=5", "the command line: global_batch_size=32 must be a multiple of micro_batch_size=5"),
    ],
)
def test_a_mistake_on_the_command_line_is_not_blamed_on_the_file(path: Path, override: str, blamed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, path, [override])
    assert str(caught.value).startswith(blamed)
    assert str(path) not in str(caught.value)


def test_a_mistake_in_the_file_is_not_blamed_on_the_command_line(path: Path) -> None:
    path.write_text(FILE + "num_worker: 2\nmicro_batch_size: 5\n")
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, path, ["log_every=0", "seed=3"])
    assert str(caught.value).startswith("the command line: log_every=0")
    assert f"; {path}: unknown key 'num_worker'" in str(caught.value)
    path.write_text(FILE + "micro_batch_size: 5\n")
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, path, ["log_every=2", "seed=3"])
    assert str(caught.value).startswith(f"{path}: global_batch_size=32 must be a multiple")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.0.max_steps=0", "stages.0.max_steps=0: input should be greater than or equal to 1"),
        ("stages.0.trainable=[projektor]", "stages.0.trainable.0='projektor': input should be 'projector'"),
        ("num_workers=two", "num_workers='two': input should be a valid integer"),
    ],
)
def test_a_mistake_is_named_where_it_was_written_and_what_follows_from_it_is_not(
    path: Path, override: str, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, path, [override])
    assert said in str(caught.value)
    assert "after validation" not in str(caught.value)
    assert "tuple[" not in str(caught.value)
    assert "literal[" not in str(caught.value)
