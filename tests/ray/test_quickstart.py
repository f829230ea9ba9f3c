"""The quickstart as `make quickstart` runs it: small for every test run, at full size for the slow one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

SMALL = (
    "world.num_train=24",
    "world.num_held_out=8",
    "world.num_train_harder=4",
    "world.num_held_out_harder=2",
    "nano.tower.num_steps=6",
    "nano.tower.num_scenes=80",
    "nano.language.num_steps=3",
    "global_batch_size=8",
    "num_served=4",
)
STAGES = (
    "stages=[{name: stage1, trainable: [projector], learning_rate: 1.0e-3, max_steps: 2},"
    " {name: stage2, trainable: [projector, language_model], learning_rate: 1.0e-3, max_steps: 3}]"
)


def run(folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "quickstart.py"), *options], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "runs" / "quickstart" / "report.json").read_text()), done.stdout


@pytest.mark.ray
def test_every_part_of_the_road_runs_and_reports(tmp_path: Path) -> None:
    report, output = run(tmp_path, *SMALL, STAGES)
    assert set(report["accuracy"]) == set(report["chance"]) == {"color", "shape", "direction", "caption"}
    assert all(0 <= value <= 1 for value in (*report["accuracy"].values(), *report["chance"].values()))
    assert set(report["harder"]) == {"two_shapes", "sequence", "count"}
    assert report["num_held_out"] == 8
    assert report["served"] == {"num": 4, "num_equal": 4}
    parts = {"data", "backbones", "stage1", "stage2", "evaluate", "serve", "total"}
    assert set(report["seconds"]) == parts
    assert all(seconds > 0 for seconds in report["seconds"].values())
    assert report["num_steps"] == 5
    assert (tmp_path / "runs" / "quickstart" / "train" / "loss.png").stat().st_size > 1000
    assert (tmp_path / "models" / "nano" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "runs"]
    assert "truth:" in output
    assert "Next:" in output


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_quickstart_reaches_its_goals(tmp_path: Path) -> None:
    report, _ = run(tmp_path)
    assert report["num_held_out"] >= 256
    assert min(report["accuracy"][kind] for kind in ("color", "shape", "direction")) >= 0.95
    assert report["accuracy"]["caption"] >= 0.90
    assert report["served"]["num_equal"] == report["served"]["num"] >= 32


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_shuffled_answers_are_answered_at_chance(tmp_path: Path) -> None:
    report, _ = run(tmp_path, "world.shuffle_answers=true", "num_served=0")
    for kind, accuracy in report["accuracy"].items():
        # Four standard deviations of 256 guesses at the rate of the most frequent answer.
        chance = max(report["chance"][kind], 1 / 256)
        assert accuracy <= chance + 4 * (chance * (1 - chance) / 256) ** 0.5, (kind, accuracy, chance)
