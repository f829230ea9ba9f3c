"""A benchmark as a program: what it prints, and how each of its ends looks to the shell."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from valley_ray.benchmarks.job import Benchmark, Say, run_job
from valley_ray.config import Config

ROOT = Path(__file__).parents[3]


class Settings(Config):
    num_rounds: int = 3


def job(measure: Callable[[Settings, Say], Mapping[str, object]], *arguments: str) -> int:
    def opened() -> Benchmark[Settings]:
        return Settings, measure

    return run_job("benchmark_it", "How to use it.", opened, arguments)


def test_the_last_line_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    def measure(settings: Settings, say: Say) -> dict[str, object]:
        say("a round")
        return {"num_rounds": settings.num_rounds}

    assert job(measure, "num_rounds=5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a round"
    assert json.loads(lines[-1]) == {"num_rounds": 5}


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (AssertionError("token 3 is 5, generate has 7"), 1, "nothing to compare: token 3 is 5, generate has 7"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_every_other_end_is_one_line(
    raised: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(settings: Settings, say: Say) -> Any:
        raise raised

    assert job(measure) == status
    assert capsys.readouterr() == ("", f"benchmark_it: {line}\n")


def test_a_users_mistake_is_said_before_anything_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    def measure(settings: Settings, say: Say) -> Any:
        raise AssertionError("measured")

    assert job(measure, "rounds=5") == 2
    assert "did you mean 'num_rounds'" in capsys.readouterr().err


def test_every_benchmark_says_how_it_is_used_and_imports_nothing_heavy_for_that() -> None:
    jobs = sorted((ROOT / "jobs").glob("benchmark_*.py"))
    assert jobs
    for path in jobs:
        environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
        command = [sys.executable, str(path), "--help"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)
        assert f"python jobs/{path.name}" in shown.stdout
        assert "JSON object" in shown.stdout
        imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
        assert not imported & {"numpy", "torch", "ray"}, path.name
