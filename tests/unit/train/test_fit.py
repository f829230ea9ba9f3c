"""What surrounds a fit: one driver at a time, and no minute of waiting for nodes that are gone. No Ray is started."""

import os
from pathlib import Path

import pytest
from train_runs import make_config

from valley_ray.errors import ConfigError
from valley_ray.train import fit
from valley_ray.train.config import TrainConfig
from valley_ray.train.run_folder import RunFolder, run_folder

VARIABLE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


def test_a_run_with_a_range_of_workers_waits_shortly_for_room_and_a_user_may_say_how_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(fit, "_fit", lambda *_: seen.append(os.environ.get(VARIABLE)) or {})
    monkeypatch.delenv(VARIABLE, raising=False)
    folder = run_folder(str(tmp_path), "a")
    for workers in (2, (1, 2), 2):
        fit.fit(make_config(tmp_path, tmp_path, tmp_path, "a", num_workers=workers), folder, tmp_path)
    monkeypatch.setenv(VARIABLE, "300")
    fit.fit(make_config(tmp_path, tmp_path, tmp_path, "a", num_workers=(1, 2)), folder, tmp_path)
    assert seen == [None, "20", None, "300"]


def test_a_second_driver_of_a_run_is_refused_and_takes_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_folder(str(tmp_path), "a")
    upload = folder.local / "checkpoint_1"

    def drive(config: TrainConfig, run: RunFolder, windows_dir: Path) -> dict[str, int]:
        upload.mkdir()
        with pytest.raises(ConfigError, match="run_name=a is being trained already"):
            fit.fit(config, run, windows_dir)
        assert upload.is_dir()
        return {"num_steps": 1}

    monkeypatch.setattr(fit, "_fit", drive)
    assert fit.fit(make_config(tmp_path, tmp_path, tmp_path, "a"), folder, tmp_path) == {"num_steps": 1}
