"""Where outputs go: beside the caller, where VALLEY_STORAGE says, and never into a submitted job's copy."""

import json
import signal
from pathlib import Path

import pytest
import ray

from valley_ray.errors import ConfigError, UnavailableError
from valley_ray.session import connect
from valley_ray.storage import storage_root
from valley_ray.train.config import DataConfig, TrainConfig


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VALLEY_STORAGE", raising=False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.chdir(tmp_path)


def test_outputs_stay_beside_the_caller(tmp_path: Path) -> None:
    assert storage_root() == tmp_path


def test_the_environment_names_the_storage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VALLEY_STORAGE", str(tmp_path / "kept"))
    assert storage_root() == tmp_path / "kept"


def test_a_submitted_job_keeps_nothing_in_its_working_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "x"}}))
    assert storage_root() == tmp_path / "home" / "valley_storage"


def test_inputs_that_exist_stay_and_outputs_move(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("[]")
    root = tmp_path / "kept"
    data = DataConfig(
        mode="overlap", pipeline={"records": ["mine.json", "made.json"], "media_root": "clips", "windows_dir": "w"}
    )
    config = TrainConfig(model=Path("model"), output=Path("out"), data=data).under(root)
    assert config.output == root / "out"
    assert config.model == root / "model"
    assert config.data.pipeline == {
        "records": [tmp_path / "mine.json", root / "made.json"],
        "media_root": root / "clips",
        "windows_dir": root / "w",
    }


def test_connecting_leaves_a_handler_of_sigterm_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(*_: object) -> None: ...

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **_: signal.signal(signal.SIGTERM, lambda *_: None))
    before = signal.signal(signal.SIGTERM, own)
    try:
        connect()
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_ray_that_is_too_slow_to_start_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", start)
    with pytest.raises(UnavailableError, match="too busy; try again"):
        connect()


def test_an_address_where_nobody_listens_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match="cannot be joined"):
        connect()
