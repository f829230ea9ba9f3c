"""Metrics survive a killed run; the curve is a PNG."""

from dataclasses import replace
from pathlib import Path

from valley_ray.train.metrics import MetricsLog, StepMetrics, progress_line, read_metrics

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


def test_a_progress_line_tells_step_loss_rate_and_stall() -> None:
    assert progress_line(LINE) == "stage1 step 1/9  loss 2.0000  lr 1.00e-03  120.0 samples/s  stall 4%"


def test_the_curve_is_a_png(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, last_step=0)
    log.write(LINE)
    log.write(replace(LINE, step=2, stage="stage2", loss=1.5))
    assert log.plot().read_bytes().startswith(b"\x89PNG")
