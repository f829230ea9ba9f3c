"""Trainings whose workers, controller or driver are killed: the loss curve that counts is the undisturbed one.

Each run of the tiny model takes seconds; what is told of recovery times is printed (`-s`) and bounded at a minute.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from train_runs import Killer, attempts, losses, make_config
from train_store import make_store

from valley_ray.errors import TrainingError
from valley_ray.train.config import TrainConfig
from valley_ray.train.metrics import read_metrics
from valley_ray.train.stage_config import StageConfig
from valley_ray.train.trainer import train

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(900)]

EXACT = 2e-6
RECOVERY_S = 60.0
EVERY = 4
NUM_STEPS = 30

PLAIN = (
    StageConfig(name="stage1", trainable=("projector",), learning_rate=1e-3, max_steps=NUM_STEPS // 2),
    StageConfig(name="stage2", trainable=("projector", "language_model"), learning_rate=1e-3, max_steps=NUM_STEPS // 2),
)
LORA = (
    StageConfig(name="stage1", trainable="valley-stage1", learning_rate=1e-3, max_steps=NUM_STEPS // 2),
    StageConfig(name="lora", trainable="valley-stage2-lora", learning_rate=1e-3, max_steps=NUM_STEPS // 2),
)
CASES = {
    "zero-2": {"stages": PLAIN, "zero_stage": 2},
    "zero-3": {"stages": PLAIN, "zero_stage": 3},
    "zero-0": {"stages": PLAIN, "zero_stage": 0},
    "lora": {"stages": LORA, "zero_stage": 2, "lora": {"r": 4}},
}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_valley: Path) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "store", tiny_valley, num_samples=50, failed=(3, 17, 40))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(tiny_valley: Path, store: Path, runs: Path) -> dict[str, list[float]]:
    """The curve of every case, each made once, by two workers."""
    curves: dict[str, list[float]] = {}

    def curve_of(name: str) -> list[float]:
        if name not in curves:
            config = make_config(tiny_valley, store, runs, f"{name}-undisturbed", **CASES[name])
            curves[name] = losses(read_metrics(train(config).metrics_path))
        return curves[name]

    return _Curves(curve_of)


class _Curves(dict[str, list[float]]):
    def __init__(self, make: object) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, name: str) -> list[float]:
        self[name] = self._make(name)
        return self[name]


def disturbed(model: Path, store: Path, runs: Path, case: str, name: str, **changes: object) -> TrainConfig:
    return make_config(model, store, runs, name, **{**CASES[case], "checkpoint_every": EVERY, **changes})


def test_three_random_workers_are_killed_at_random_steps(
    tiny_valley: Path, store: Path, runs: Path, undisturbed: dict[str, list[float]]
) -> None:
    steps = tuple(sorted(random.Random().sample(range(3, NUM_STEPS - 2), 3)))
    config = disturbed(tiny_valley, store, runs, "zero-2", "three-kills")
    with Killer(runs / "three-kills" / "metrics.jsonl", steps, seed=random.randrange(1000)) as killer:
        result = train(config)
    for death in killer.deaths:
        print(f"killed after step {death.step}: a new step after {death.recovery_s:.1f} s")
    assert len(killer.deaths) == 3, f"killed at {steps}"
    check_curve(result.metrics_path, undisturbed["zero-2"])
    begun = [attempt["after_step"] for attempt in attempts(runs / "three-kills")]
    assert len(begun) == 4
    assert all(death.step - step <= EVERY for death, step in zip(killer.deaths, begun[1:], strict=True)), begun
    assert max(death.recovery_s for death in killer.deaths) <= RECOVERY_S


def check_curve(metrics: Path, expected: list[float]) -> None:
    lines = read_metrics(metrics)
    assert [line.step for line in lines] == list(range(1, NUM_STEPS + 1)), "no step is lost or told twice"
    assert losses(lines) == pytest.approx(expected, abs=EXACT, rel=0)


@pytest.mark.parametrize("case", list(CASES))
def test_two_workers_then_one_then_two(
    case: str, tiny_valley: Path, store: Path, runs: Path, undisturbed: dict[str, list[float]]
) -> None:
    """Each attempt but the last ends by a kill that the run is not to survive; LoRA has dropout."""
    name = f"{case}-2-1-2"
    killed_at = []
    for workers, step in ((2, 9), (1, 20)):
        config = disturbed(tiny_valley, store, runs, case, name, num_workers=workers, max_failures=0)
        with Killer(runs / name / "metrics.jsonl", (step,)) as killer, pytest.raises(TrainingError):
            train(config)
        killed_at += killer.kills
    result = train(disturbed(tiny_valley, store, runs, case, name, num_workers=2))
    check_curve(result.metrics_path, undisturbed[case])
    begun = attempts(runs / name)
    assert [attempt["workers"] for attempt in begun] == [2, 1, 2]
    redone = [step - attempt["after_step"] for step, attempt in zip(killed_at, begun[1:], strict=True)]
    print(f"{case}: killed after steps {killed_at}, of which {redone} were made again")
    assert all(0 <= num_steps <= EVERY for num_steps in redone), redone


def test_a_killed_controller_is_replaced(
    tiny_valley: Path, store: Path, runs: Path, undisturbed: dict[str, list[float]]
) -> None:
    config = disturbed(tiny_valley, store, runs, "zero-2", "controller")
    with Killer(runs / "controller" / "metrics.jsonl", (11,), what="TrainController") as killer:
        result = train(config)
    (death,) = killer.deaths
    print(f"controller killed after step {death.step}: a new step after {death.recovery_s:.1f} s")
    check_curve(result.metrics_path, undisturbed["zero-2"])
    assert death.recovery_s <= RECOVERY_S


DRIVER = """
import json, sys
import ray
from valley_ray.train.config import TrainConfig
from valley_ray.train.trainer import train
ray.init(address="local", num_cpus=2, include_dashboard=False)
try:
    train(TrainConfig.model_validate_json(open(sys.argv[1]).read()))
except KeyboardInterrupt as error:
    sys.exit(f"stopped: {error}")
"""


WRITERS = ("RayTrainWorker", "TrainController")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_driver_that_ended_is_gone_on_with_by_a_run_of_the_same_name(
    number: signal.Signals,
    tiny_valley: Path,
    store: Path,
    runs: Path,
    undisturbed: dict[str, list[float]],
    tmp_path: Path,
) -> None:
    name = f"driver-{number.name}"
    config = disturbed(tiny_valley, store, runs, "zero-2", name)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "config.json")]
    # A pipe that nobody reads would stop the driver once it is full.
    with (tmp_path / "said").open("w") as said, subprocess.Popen(command, stdout=said, stderr=said) as driver:
        metrics = runs / name / "metrics.jsonl"
        while driver.poll() is None and len(read_metrics(metrics)) < 11:
            time.sleep(0.01)
        children = psutil.Process(driver.pid).children(recursive=True)
        writers = [child for child in children if any(what in child_name(child) for what in WRITERS)]
        assert len(writers) == 3, writers
        os.kill(driver.pid, number)
        driver.wait(timeout=60)
    if number != signal.SIGKILL:
        lines = (tmp_path / "said").read_text().splitlines()
        (last,) = [line for line in lines if line.startswith("stopped: ")]
        print(last)
        assert f"run_name={name} goes on from the checkpoint of step" in last
    # Ray's agents look for their node's death once in a while; what writes to the run's folder ends with it.
    _, alive = psutil.wait_procs(writers, timeout=60)
    assert not alive, alive
    result = train(config)
    check_curve(result.metrics_path, undisturbed["zero-2"])
    assert attempts(runs / name)[1]["after_step"] >= 11 - EVERY


def child_name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_storage_may_be_another_file_system(
    tiny_valley: Path, store: Path, runs: Path, undisturbed: dict[str, list[float]], tmp_path: Path
) -> None:
    """A file system of fsspec's, as buckets are; metrics and curve are to be found beside the model folder."""
    config = disturbed(tiny_valley, store, runs, "zero-2", "bucket", storage=f"local://{tmp_path}/bucket", keep="best")
    result = train(config)
    check_curve(result.metrics_path, undisturbed["zero-2"])
    assert result.metrics_path.parent == runs / "bucket-model-run"
    assert result.curve_path.read_bytes().startswith(b"\x89PNG")
    kept = json.loads((tmp_path / "bucket" / "bucket" / "checkpoint_manager_snapshot.json").read_text())
    assert len(kept["checkpoint_results"]) <= config.keep_checkpoints + 1


def test_corrupt_samples_are_listed_each_with_its_reason(tiny_valley: Path, store: Path, runs: Path) -> None:
    result = train(make_config(tiny_valley, store, runs, "corrupt", stages=PLAIN[:1]))
    assert result.left_out_path is not None
    listed = [json.loads(line) for line in result.left_out_path.read_text().splitlines()]
    assert [(one["sample_id"], one["error_class"]) for one in listed] == [
        ("sample-3", "media_corrupt"),
        ("sample-17", "media_corrupt"),
        ("sample-40", "media_corrupt"),
    ]
    assert "3 samples" in result.text()


def test_a_model_folder_is_written_on_request_and_at_intervals(tiny_valley: Path, store: Path, runs: Path) -> None:
    run = runs / "exports"
    run.mkdir()
    (run / "export").touch()
    config = make_config(tiny_valley, store, runs, "exports", stages=PLAIN[:1], export_every=10)
    train(config)
    written = sorted(path.name for path in runs.glob("exports-model*"))
    assert "exports-model-step-10" in written
    assert len([name for name in written if (runs / name / "config.json").is_file()]) == 3, written
    assert not (run / "export").exists()
