"""Trackers: real TensorBoard files; stand-ins for packages that are not installed here."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter  # noqa: F401  # the format that is read below

from valley_ray.errors import ConfigError
from valley_ray.train.trackers import MODULES, check_trackers, open_trackers


def events(folder: Path) -> list[Event]:
    """All events of a TensorBoard folder: records of length (8 bytes), its checksum (4), data, checksum (4)."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard_files_hold_every_number_and_a_resumed_run_takes_back_what_it_makes_again(tmp_path: Path) -> None:
    check_trackers(["tensorboard"])
    for last_step in (0, 2):
        (tracker,) = open_trackers(["tensorboard"], tmp_path, run_name="r", config={}, last_step=last_step)
        for step in range(last_step + 1, last_step + 4):
            tracker.log({"loss": 4.0 / step, "mfu": 0.4}, step=step)
        tracker.close()
    found = events(tmp_path / "tensorboard")
    scalars = [(event.step, value.tag, value.simple_value) for event in found for value in event.summary.value]
    assert [step for step, tag, _ in scalars if tag == "train/loss"] == [1, 2, 3, 3, 4, 5]
    assert (4, "train/loss", 1.0) in scalars
    assert {tag for _, tag, _ in scalars} == {"train/loss", "train/mfu"}
    starts = [event.step for event in found if event.session_log.status == event.session_log.START]
    assert starts == [3], "readers drop what the killed attempt wrote from there on"


def test_a_tracker_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in MODULES:
        with pytest.raises(ConfigError, match=rf"{name} needs .* pip install"):
            check_trackers([name])


def test_a_tracker_that_does_not_open_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = ModuleType("wandb")
    monkeypatch.setitem(sys.modules, "wandb", broken)
    opened = open_trackers(["wandb", "tensorboard"], tmp_path, run_name="r", config={}, last_step=0)
    assert [tracker.name for tracker in opened] == ["tensorboard"]


def test_wandb_gets_a_run_of_the_same_name_in_the_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def init(**options: Any) -> SimpleNamespace:
        told.append(options)
        return SimpleNamespace(
            log=lambda values, step: told.append((step, values)), finish=lambda: told.append("finished")
        )

    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    (tracker,) = open_trackers(["wandb"], tmp_path, run_name="r", config={"seed": 3}, last_step=0)
    tracker.log({"loss": 2.0}, step=5)
    tracker.close()
    same = {"project": "valley_ray", "name": "r", "id": "r", "resume": "allow"}
    assert told == [{**same, "dir": str(tmp_path), "config": {"seed": 3}}, (5, {"loss": 2.0}), "finished"]


class MlflowClient:
    """What is used of MLflow's client, kept over two openings."""

    runs: list[SimpleNamespace] = []  # noqa: RUF012  # shared on purpose: a server's memory
    told: list[Any] = []  # noqa: RUF012

    def search_runs(self, experiments: list[str], filter_string: str, max_results: int) -> list[SimpleNamespace]:
        assert (experiments, filter_string) == (["7"], "tags.mlflow.runName = 'r'")
        return self.runs[:max_results]

    def create_run(self, experiment: str, run_name: str) -> SimpleNamespace:
        self.runs.append(SimpleNamespace(info=SimpleNamespace(run_id=f"{experiment}-{run_name}")))
        return self.runs[-1]

    def log_param(self, run: str, key: str, value: object) -> None:
        self.told.append((run, key, value))

    def log_metric(self, run: str, key: str, value: float, step: int) -> None:
        self.told.append((run, key, value, step))

    def set_terminated(self, run: str) -> None:
        self.told.append((run, "ended"))


def test_mlflow_goes_on_with_the_run_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[str] = []
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    stand_in = SimpleNamespace(
        set_tracking_uri=places.append,
        set_experiment=lambda name: SimpleNamespace(experiment_id="7"),
        MlflowClient=MlflowClient,
    )
    monkeypatch.setitem(sys.modules, "mlflow", stand_in)
    for last_step in (0, 2):
        (tracker,) = open_trackers(["mlflow"], tmp_path, run_name="r", config={"seed": 3}, last_step=last_step)
        tracker.log({"loss": 2.0}, step=last_step + 1)
        tracker.close()
    assert places[0] == f"file://{tmp_path / 'mlflow'}"
    assert len(MlflowClient.runs) == 1
    assert MlflowClient.told == [
        ("7-r", "seed", 3),
        *[("7-r", "loss", 2.0, 1), ("7-r", "ended")],
        *[("7-r", "loss", 2.0, 3), ("7-r", "ended")],
    ]
