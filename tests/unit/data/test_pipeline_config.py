"""What is refused before the pipeline reads a record or starts a task."""

import json
from pathlib import Path

import pytest
from data_clips import turns
from tiny import make_tiny_valley

from valley_ray.config import validate_config
from valley_ray.data import pipeline
from valley_ray.data.pipeline import PipelineConfig, run_pipeline
from valley_ray.errors import ConfigError
from valley_ray.train.config import TrainConfig
from valley_ray.train.trainer import pipeline_config


def test_crops_of_many_sizes_are_refused_by_name(tmp_path: Path) -> None:
    model = make_tiny_valley(tmp_path / "model")
    path = model / "processor_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["image_crop"]["fit"] = "keep"
    path.write_text(json.dumps(values), encoding="utf-8")
    (tmp_path / "records.json").write_text(json.dumps([{"id": 0, "conversations": turns()}]), encoding="utf-8")
    config = PipelineConfig(
        records=(tmp_path / "records.json",), media_root=tmp_path, model=model, windows_dir=tmp_path / "windows"
    )
    with pytest.raises(ConfigError, match=r"image_crop has fit=keep.*many sizes.*crop or stretch"):
        run_pipeline(config)


def test_two_files_of_one_name_are_two_sources(tmp_path: Path, tiny_valley: Path) -> None:
    paths = [tmp_path / name / "chat.json" for name in ("images", "videos", "more")]
    for number, path in enumerate(paths, 1):
        path.parent.mkdir()
        records = [{"id": f"{number}-{row}", "conversations": turns()} for row in range(number)]
        path.write_text(json.dumps(records), encoding="utf-8")
    config = PipelineConfig(records=paths, media_root=tmp_path, model=tiny_valley, windows_dir=tmp_path / "windows")
    names = ("chat.json", "chat.json#2", "chat.json#3")
    assert config.source_names == names
    plan = pipeline._plan(config, None)
    assert plan.info.sources == dict(zip(names, (1, 2, 3), strict=True))


def test_unknown_video_decoder_is_refused() -> None:
    values = {"records": ["a.json"], "media_root": ".", "model": "m", "windows_dir": "w", "video_decoder": "opencv"}
    with pytest.raises(ConfigError, match=r"video_decoder.*pyav"):
        validate_config(PipelineConfig, values, source="test")


def test_every_file_of_records_may_have_a_media_root_of_its_own() -> None:
    values = {"records": ["a.json", "b.json"], "model": "m", "windows_dir": "w"}

    def roots(media_root: object) -> list[str]:
        config = validate_config(PipelineConfig, values | {"media_root": media_root}, source="test")
        return [str(root) for root in config.roots]

    assert roots("images") == ["images", "images"]
    assert roots(["images", "videos"]) == ["images", "videos"]
    with pytest.raises(ConfigError, match="media_root lists 3 folders for 2 files"):
        roots(["1", "2", "3"])


def test_settings_of_the_pipeline_beside_training_are_checked_before_ray_starts(tmp_path: Path) -> None:
    pipeline: dict[str, object] = {"records": ["a.json"], "media_root": ".", "windows_dir": "w"}
    run = {"model": "m", "output": "o", "storage": str(tmp_path), "stages": [stage()]}
    config = validate_config(TrainConfig, run | {"data": {"mode": "overlap", "pipeline": pipeline}}, source="test")
    settings = pipeline_config(config)
    assert settings is not None
    assert settings.video_decoder == "pyav"
    for change, reason in (({"window_sise": 3}, "did you mean 'window_size'"), ({"model": "n"}, "differs from")):
        data = {"mode": "overlap", "pipeline": pipeline | change}
        config = validate_config(TrainConfig, run | {"data": data}, source="test")
        with pytest.raises(ConfigError, match=reason):
            pipeline_config(config)
    shards = validate_config(TrainConfig, run | {"data": {"windows_dir": "w"}}, source="test")
    assert pipeline_config(shards) is None


def stage() -> dict[str, object]:
    return {"name": "one", "trainable": ["projector"], "learning_rate": 1e-3, "epochs": 1}
