"""The original's experiment YAML becomes ours: the shipped configurations, with every key accounted for."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from valley_ray.cli import main
from valley_ray.config import load_config, read_yaml
from valley_ray.errors import ConfigError
from valley_ray.train.config import TrainConfig
from valley_ray.train.upstream_config import convert_upstream

CONFIGS = Path(__file__).parents[3] / "jobs" / "configs"

BOTH: dict[str, Any] = {
    "model_name_or_path": "start",
    "data_path": "images.json",
    "image_folder": "images",
    "video_data_path": "videos.json",
    "video_folder": "videos",
    "output_dir": "out",
    "project_name": "valley",
    "only_mask_system": False,
    "conv_mode": "v1",
    "tune_mm_mlp_adapter": True,
    "is_multimodal": True,
    "save_strategy": "steps",
    "gradient_checkpointing": True,
    "fast_epoch": False,
    "vision_tower": "openai/clip-vit-large-patch14",
    "mm_vision_select_layer": -2,
    "mm_use_im_start_end": True,
    "lazy_preprocess": True,
    "bf16": False,
    "fp16": True,
    "tf32": False,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "evaluation_strategy": "no",
    "weight_decay": 0.0,
    "warmup_ratio": 0.03,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "model_max_length": 2048,
    "report_to": "wandb",
}
BETAS = {"adam_beta1": 0.9, "adam_beta2": 0.95}
ZERO_2, ZERO_3 = ({"deepspeed": f"valley/configs/deepspeed/config_zero{stage}.json"} for stage in (2, 3))

EXPERIMENTS: dict[str, dict[str, Any]] = {
    "valley-stage1": BOTH
    | BETAS
    | ZERO_2
    | {
        "freeze_backbone": True,
        "lora": False,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 16,
        "save_steps": 2400,
        "save_total_limit": 1,
        "learning_rate": "2e-3",
        "run_name": "valley_stage1",
    },
    "valley-stage2": BOTH
    | BETAS
    | ZERO_2
    | {
        "freeze_backbone": False,
        "lora": False,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "save_steps": 5000,
        "save_total_limit": 3,
        "learning_rate": "2e-5",
        "run_name": "valley_stage2",
    },
    "valley-stage2-lora": BOTH
    | BETAS
    | ZERO_2
    | {
        "freeze_backbone": False,
        "lora": True,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "save_steps": 5000,
        "save_total_limit": 3,
        "learning_rate": "5e-4",
    },
    "valley-stage2-zero3": BOTH
    | ZERO_3
    | {
        "freeze_backbone": False,
        "lora": False,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 1,
        "save_steps": 3000,
        "learning_rate": "2e-5",
        "freeze_mm_mlp_adapter": False,
        "eval_num": 600,
        "prediction_file_name": "out/eval_result.jsonl",
        "predict_with_generate": True,
        "eval_steps": 3000,
    },
}
"""Facts of the original's four experiments (valley/configs/experiment), paths aside."""

NAMES = {"model", "output", "storage", "run_name", "data", "trackers"}
"""Settings that are names and places, not facts of the training."""


def convert(changes: dict[str, Any] | None = None, **options: Any) -> Any:
    values = EXPERIMENTS["valley-stage2"] | (changes or {})
    return convert_upstream(values, source=Path("theirs.yaml"), **options)


def test_the_shipped_configurations_say_what_the_originals_say() -> None:
    for name, theirs in EXPERIMENTS.items():
        shipped = load_config(TrainConfig, CONFIGS / f"{name}.yaml")
        converted = TrainConfig.model_validate(convert_upstream(theirs, source=Path(name)).values)
        (ours,), (expected,) = shipped.stages, converted.stages
        assert ours.model_copy(update={"name": ""}) == expected.model_copy(update={"name": ""}), name
        facts = TrainConfig.model_fields.keys() - NAMES - {"stages", "lora", "keep_checkpoints"}
        assert shipped.model_dump(include=facts) == converted.model_dump(include=facts), name
        if "save_total_limit" in theirs:
            assert shipped.keep_checkpoints == theirs["save_total_limit"]
        assert len(shipped.data.pipeline["records"]) == len(shipped.data.pipeline["media_root"]) == 2


def test_every_key_is_taken_over_changed_or_ignored_with_a_reason() -> None:
    for name, theirs in EXPERIMENTS.items():
        converted = convert_upstream(theirs, source=Path(name))
        ignored = dict(converted.ignored)
        assert {"project_name", "vision_tower", "evaluation_strategy", "only_mask_system"} <= ignored.keys()
        assert all(ignored.values())
        assert not ignored.keys() & {"learning_rate", "save_steps", "lora", "freeze_backbone"}
        assert "global_batch_size" in dict(converted.changed)["per_device_train_batch_size"]
        text = converted.text()
        assert all(key in text for key in (*ignored, "changed:"))


@pytest.mark.parametrize(
    ("switches", "trainable"),
    [
        ({"freeze_backbone": True}, ("valley-stage1",)),
        ({"freeze_backbone": True, "tune_mm_mlp_adapter": False}, ("lm_head",)),
        ({"freeze_backbone": True, "freeze_mm_mlp_adapter": True}, ("embeddings",)),
        ({}, ("valley-stage2",)),
        ({"tune_mm_mlp_adapter": False}, ("valley-stage2", "lm_head")),
        ({"freeze_mm_mlp_adapter": True}, ("embeddings", "layers")),
        ({"lora": True}, ("valley-stage2-lora",)),
        ({"lora_enable": True, "freeze_backbone": True}, ("valley-stage2-lora",)),
        ({"lora": True, "tune_mm_mlp_adapter": False}, ("lora",)),
    ],
)
def test_switches_become_the_parts_that_the_original_trains(
    switches: dict[str, bool], trainable: tuple[str, ...]
) -> None:
    assert tuple(convert(switches).values["stages"][0]["trainable"]) == trainable


def test_batches_are_counted_over_all_gpus() -> None:
    values = convert({"gradient_accumulation_steps": 2}, num_workers=3).values
    assert (values["global_batch_size"], values["micro_batch_size"], values["num_workers"]) == (24, 4, 3)


def test_reporting_and_grouping_are_taken_over() -> None:
    values = convert({"report_to": ["tensorboard", "comet_ml"], "group_by_length": True, "seed": 7}).values
    assert (values["trackers"], values["length_grouping"], values["seed"]) == (["tensorboard"], True, 7)
    assert convert({"report_to": "none"}).values["trackers"] == []
    assert "comet_ml" in dict(convert({"report_to": "comet_ml"}).ignored)["report_to"]


def test_the_deepspeed_file_is_read_where_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}')
    theirs = EXPERIMENTS["valley-stage2"] | {"deepspeed": "mine.json"}
    values = convert_upstream(theirs, source=tmp_path / "deeper" / "theirs.yaml").values
    assert values["zero_stage"] == 1
    assert values["offload"] is True
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(ConfigError, match="expected a DeepSpeed configuration as JSON"):
        convert_upstream(theirs, source=tmp_path / "theirs.yaml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rte": 1.0}, "did you mean 'learning_rate'"),
        ({"learning_rate": "fast"}, "expected learning_rate to be a number, got 'fast'"),
        ({"learning_rate": True}, "expected learning_rate to be a number, got True"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"lora": "perhaps"}, "expected lora to be true or false"),
        ({"bf16": True}, "fp16 and bf16 are both on"),
        ({"num_train_epochs": 0.5}, "num_train_epochs to be a whole number"),
        ({"per_device_train_batch_size": 0}, "at least 1, got 0"),
        ({"data_path": None, "video_data_path": None}, "nothing to train on"),
        ({"model_name_or_path": None}, "expected model_name_or_path"),
        ({"deepspeed": "lost.json"}, "its name does not tell the ZeRO stage"),
        ({"model": "m", "stages": []}, "a configuration of ours already"),
    ],
)
def test_what_cannot_be_converted_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        convert(changes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "key", "said"),
    [
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type", "linear → cosine"),
        ({"save_strategy": "epoch"}, "save_strategy", "every 5000 steps"),
        ({"image_folder": None}, "image_folder", "beside data_path"),
        ({"deepspeed": None}, "deepspeed", "zero_stage=0"),
        ({"fast_epoch": True}, "fast_epoch", "max_steps"),
    ],
)
def test_what_means_something_else_here_is_told(changes: dict[str, Any], key: str, said: str) -> None:
    assert said in dict(convert(changes).changed)[key]


def test_keys_that_others_put_out_of_force_are_listed() -> None:
    epochs = convert({"max_steps": 100})
    assert "num_train_epochs" in dict(epochs.ignored)
    assert epochs.values["stages"][0]["max_steps"] == 100
    unsaved = convert({"save_strategy": "no", "run_name": "team/first"})
    assert "no checkpoints" in dict(unsaved.ignored)["save_steps"]
    assert unsaved.values["run_name"] == "team-first"
    assert "team/first → team-first" in dict(unsaved.changed)["run_name"]


def test_the_command_writes_a_file_that_runs_and_never_overwrites(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "made" / "ours.yaml"
    theirs.write_text(yaml.safe_dump(EXPERIMENTS["valley-stage2-lora"]))
    assert main(["convert-config", str(theirs), "--output", str(ours), "--num-workers", "2"]) == 0
    said = capsys.readouterr().out
    assert "ignored:" in said
    assert f"jobs/finetune.py {ours} --check" in said
    config = load_config(TrainConfig, ours, ["use_gpu=false", "precision=bf16"])
    assert (config.num_workers, config.global_batch_size) == (2, 8)
    assert main(["convert-config", str(theirs), "--output", str(ours)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["convert-config", str(tmp_path / "none.yaml"), "--output", str(tmp_path / "x.yaml")]) == 2
    assert "cannot read configuration" in capsys.readouterr().err
    assert read_yaml(ours)["stages"][0]["trainable"] == ["valley-stage2-lora"]
