"""Metrics survive a killed run and a tracker that fails; the curve is a PNG."""

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from valley_ray.train.curve import smoothed
from valley_ray.train.metrics import Meter, MetricsLog, StepMetrics, progress_line, read_metrics

LINE = StepMetrics(
    step=1,
    stage="stage1",
    stage_step=1,
    stage_steps=9,
    loss=2.0,
    learning_rate=1e-3,
    grad_norm=0.5,
    samples_per_s=120.0,
    tokens_per_s=4000.0,
    stall_share=0.04,
    rss_bytes=1,
    cuda_bytes=0,
    seconds=1.0,
)


def test_lines_after_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, last_step=0)
    for step in range(1, 6):
        log.write(replace(LINE, step=step))
    with log.path.open("a") as file:
        file.write('{"step": 6, "sta')
    resumed = MetricsLog(tmp_path, last_step=3)
    resumed.write(replace(LINE, step=4, loss=1.0))
    lines = read_metrics(resumed.path)
    assert [line.step for line in lines] == [1, 2, 3, 4]
    assert lines[-1].loss == 1.0


def test_a_line_that_cannot_be_read_is_dropped_and_the_run_goes_on(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, last_step=0)
    log.write(LINE)
    with log.path.open("a") as file:
        file.write('{"step": 2, "sta\n[]\n{"step": 2}\n\n')
    log.write(replace(LINE, step=3))
    assert [line.step for line in read_metrics(log.path)] == [1, 3]
    resumed = MetricsLog(tmp_path, last_step=3)
    assert len(resumed.path.read_text().splitlines()) == 2


def test_a_progress_line_tells_step_loss_rate_and_stall() -> None:
    assert progress_line(LINE) == "stage1 step 1/9  loss 2.0000  lr 1.00e-03  120.0 samples/s  stall 4%"


def test_the_curve_is_a_png(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, last_step=0)
    log.write(LINE)
    log.write(replace(LINE, step=2, stage="stage2", loss=1.5))
    assert log.plot().read_bytes().startswith(b"\x89PNG")


def test_rates_count_what_was_added_since_the_line_before() -> None:
    meter = Meter(peak_flops=1e6)
    time.sleep(0.01)
    meter.add(samples=4, tokens=100, flops=1e3)
    meter.add(samples=4, tokens=100, flops=1e3, is_skipped=True)
    rates = meter.rates(wait_s=0.0)
    assert rates["samples_per_s"] * 25 == pytest.approx(rates["tokens_per_s"])
    assert rates["mfu"] == pytest.approx(2e3 / 200 * rates["tokens_per_s"] / 1e6)
    later = meter.rates(wait_s=0.0)
    assert (later["tokens_per_s"], later["mfu"], later["skipped_steps"]) == (0.0, 0.0, 1)
    assert Meter().rates(wait_s=0.0)["mfu"] is None


def test_a_progress_line_tells_mfu_and_overflow_where_there_are_some() -> None:
    line = progress_line(replace(LINE, mfu=0.451, skipped_steps=2))
    assert line.endswith("stall 4%  MFU 45%  2 steps overflowed")


class Broken:
    """A tracker that loses its connection after one step."""

    name = "broken"

    def __init__(self) -> None:
        self.told: list[Mapping[str, float]] = []

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        if self.told:
            raise ConnectionError("gone")
        self.told.append(values)

    def close(self) -> None:
        raise AssertionError("it was left out")


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = Broken()
    log = MetricsLog(tmp_path, last_step=0, trackers=[broken])
    with caplog.at_level(logging.WARNING):
        for step in range(1, 4):
            log.write(replace(LINE, step=step))
        log.close()
    assert [line.step for line in read_metrics(log.path)] == [1, 2, 3]
    assert broken.told[0]["loss"] == 2.0
    assert "mfu" not in broken.told[0], "what is not known is not told"
    assert [record.getMessage() for record in caplog.records] == [
        "broken failed and is left out: ConnectionError: gone"
    ]


def test_the_smoothed_line_follows_the_losses_without_their_noise() -> None:
    noisy = [4.0 - step / 50 + (0.5 if step % 2 else -0.5) for step in range(100)]
    line = smoothed(noisy)
    assert line[0] == pytest.approx(noisy[0])
    assert max(abs(line[step] - (4.0 - step / 50)) for step in range(20, 100)) < 0.3
    assert smoothed([2.0, float("nan"), 2.0]) == pytest.approx([2.0, 2.0, 2.0])
