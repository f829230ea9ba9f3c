"""`--check` says what a run would do, by arithmetic that can be followed, and starts nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_store import make_store

from valley_ray.errors import ConfigError
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.checkpoint import read_model_config
from valley_ray.train.config import DataConfig, TrainConfig
from valley_ray.train.forecast import activation_bytes, forecast_memory, forecast_stage
from valley_ray.train.report import report_run
from valley_ray.train.stage_config import StageConfig
from valley_ray.train.stages import prepare_stage

PARTS = ("projector", "embeddings", "layers", "lm_head")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_valley: Path) -> Path:
    return make_store(tmp_path_factory.mktemp("report") / "store", tiny_valley, num_samples=20, failed=(3,))


@pytest.fixture
def config(tiny_valley: Path, store: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(**changes: Any) -> TrainConfig:
        values = {"model": tiny_valley, "output": tmp_path / "out", "data": DataConfig(windows_dir=store)}
        sizes = {"stages": (stage(),), "global_batch_size": 4, "micro_batch_size": 2, "checkpoint_every": 5}
        return TrainConfig(**{**values, **sizes, **changes})

    return make


def stage(**changes: Any) -> StageConfig:
    return StageConfig(**{"name": "one", "trainable": PARTS, "learning_rate": 1e-3, "epochs": 2, **changes})


def test_trained_parameters_are_those_of_the_real_model(config: Callable[..., TrainConfig], tiny_valley: Path) -> None:
    rates = stage(learning_rates={"projector": 1e-2})
    forecast = forecast_stage(read_model_config(tiny_valley), config(), rates)
    model = ValleyForConditionalGeneration.from_pretrained(tiny_valley)
    groups = prepare_stage(model.core, rates)
    assert forecast.num_trained == sum(p.numel() for group in groups for p in group.parameters)
    assert forecast.num_module == sum(p.numel() for p in model.core.parameters())
    assert forecast.num_outside == sum(p.numel() for p in model.vision_tower.parameters())
    assert {part.part: part.learning_rate for part in forecast.parts} == dict.fromkeys(PARTS, 1e-3) | {
        "projector": 1e-2
    }


def test_new_rows_alone_are_counted(config: Callable[..., TrainConfig], tiny_valley: Path) -> None:
    forecast = forecast_stage(read_model_config(tiny_valley), config(), stage(trainable="new_embeddings"))
    assert forecast.num_trained == 7 * 32


def test_memory_follows_the_formula(config: Callable[..., TrainConfig], tiny_valley: Path) -> None:
    model_config = read_model_config(tiny_valley)
    forecast = forecast_stage(model_config, config(), stage(trainable="projector"))
    module, trained, tower = forecast.num_module, forecast.num_trained, forecast.num_outside

    def memory(zero_stage: int, *, offload: bool = False, **changes: Any) -> Any:
        return forecast_memory(forecast, config(**changes), zero_stage=zero_stage, offload=offload)

    plain = memory(0)
    assert (plain.weights, plain.gradients, plain.optimizer) == (4 * module, 4 * trained, 8 * trained)
    assert plain.total == 4 * module + 12 * trained + 4 * tower
    assert memory(1, precision="bf16").weights == 2 * module
    assert memory(2, precision="bf16").optimizer == 12 * trained // 2
    assert memory(2).gradients == 4 * trained // 2
    assert memory(3, num_workers=4).optimizer == 3 * trained
    kept = memory(2, offload=True)
    assert (kept.optimizer, kept.host) == (0, 12 * trained // 2 + 4 * trained // 2)
    alone = memory(3, num_workers=1)
    assert alone.weights == 4 * module, "one worker has nothing to gather"


def test_a_forward_pass_keeps_no_more_than_is_expected(config: Callable[..., TrainConfig], tiny_valley: Path) -> None:
    """Bytes of what autograd really saves, weights aside; the estimate is an upper end, and not twice as high."""
    model = ValleyForConditionalGeneration.from_pretrained(tiny_valley, attn_implementation="sdpa")
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(5, 20, (4, 200))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.core(ids, labels=ids, loss_reduction="sum")
    expected = activation_bytes(model.config, config(), num_tokens=ids.numel())
    assert sum(saved.values()) < expected < 2.5 * sum(saved.values())


def test_a_store_is_counted_whole(config: Callable[..., TrainConfig]) -> None:
    report = report_run(config(log_every=1))
    assert (report.data.num_samples, report.data.num_failed) == (19, 1)
    assert len(report.data.lengths) == 19
    assert report.steps == (10,), "two epochs of 19 samples in batches of 4"
    assert report.without_effect == report.warnings == ()
    text = report.text()
    assert "19 samples, 1 failed" in text
    assert "* ZeRO 2" in text
    assert "warnings   none" in text


def test_records_are_counted_and_some_are_tokenized(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "<video>\nWhat is moving?"},
        {"from": "gpt", "value": "A red circle moves left."},
    ]
    records = [{"id": f"r{number}", "video": f"{number}.mp4", "conversations": turns} for number in range(90)]
    for number in range(0, 90, 2):
        (tmp_path / f"{number}.mp4").write_bytes(b"not looked into")
    (tmp_path / "records.json").write_text(json.dumps(records))
    pipeline = {"records": [str(tmp_path / "records.json")], "media_root": str(tmp_path), "windows_dir": "w"}
    data = DataConfig(mode="overlap", pipeline=pipeline | {"seed": 3})
    report = report_run(config(data=data, checkpoint_every=None, log_every=1))
    assert report.data.num_samples == 90
    assert len(report.data.lengths) + sum(report.data.failures.values()) == 64
    assert 16 < len(report.data.lengths) < 48, "about half of the drawn ones have their file"
    assert set(report.data.lengths) == {report.data.longest}
    assert any("data.pipeline.seed" in one for one in report.without_effect)
    assert any("begins the run again" in one for one in report.warnings)
    assert any("of the records cannot be trained on" in one for one in report.warnings)
    assert "there is no such file" in report.text()
    assert not (tmp_path / "w").exists()
    with pytest.raises(ConfigError, match="larger than the data, 90 records"):
        report_run(config(data=data, global_batch_size=92))


def test_answers_of_words_that_the_tokenizer_lacks_are_told(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What is moving?"}, {"from": "gpt", "value": "red dogs"}]
    records = [{"id": f"r{number}", "conversations": turns} for number in range(4)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    pipeline = {"records": [str(tmp_path / "records.json")], "media_root": str(tmp_path), "windows_dir": "w"}
    report = report_run(config(data=DataConfig(mode="overlap", pipeline=pipeline), log_every=1))
    assert report.data.num_unknown == 4, "dogs, in each"
    share = 4 / sum(report.data.label_lengths)
    assert any(one.startswith(f"{share:.0%} of the label tokens") for one in report.warnings)


def test_settings_without_effect_and_idle_workers_are_told(config: Callable[..., TrainConfig]) -> None:
    changes = {"stages": (stage(trainable="valley-stage2"),), "checkpoint_every": 50, "log_every": 20, "num_workers": 3}
    report = report_run(config(**changes))
    told = " ".join(report.without_effect)
    assert all(part in told for part in ("checkpoint_every=50", "log_every=20", "mean pooling has no weights"))
    assert any("1 of 3 workers have nothing to do" in one for one in report.warnings)
    moving = {"stages": (stage(trainable=("projector", "tower")),), "feature_cache_bytes": 1000, "export_every": 99}
    report = report_run(config(**moving, checkpoint_every=None, log_every=1, use_gpu=True))
    told = " ".join(report.without_effect)
    assert all(part in told for part in ("feature_cache_bytes", "export_every=99: the run has 10 steps"))
    if not torch.cuda.is_available():
        assert any("this machine has no GPU" in one for one in report.warnings)


def test_defaults_that_nobody_set_are_not_told_to_be_without_effect(
    tiny_valley: Path, store: Path, tmp_path: Path
) -> None:
    values = {"model": tiny_valley, "output": tmp_path / "out", "data": DataConfig(windows_dir=store)}
    sizes = {"stages": (stage(epochs=1),), "global_batch_size": 4, "micro_batch_size": 2}
    config = TrainConfig(**{**values, **sizes}).under(tmp_path)
    report = report_run(config)
    assert report.steps[0] < config.log_every
    assert report.without_effect == ()
