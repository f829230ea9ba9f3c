"""What a run says about itself: one JSON line per logged step, a progress line for people; trackers hear it too."""

import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from valley_ray.train.curve import plot_loss
from valley_ray.train.trackers import Tracker

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"


@dataclass(frozen=True)
class StepMetrics:
    """One logged step. Rates and shares are taken over the steps since the line before."""

    step: int
    """Steps made since the run began, all stages."""
    stage: str
    stage_step: int
    stage_steps: int
    """Planned steps of the stage (failed samples may make it shorter)."""
    loss: float
    """Mean over the label tokens of the global batch."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    samples_per_s: float
    tokens_per_s: float
    """Text tokens and visual tokens, padding excluded, of all workers (this worker's, times their number)."""
    stall_share: float
    """Share of the wall time that this worker waited for data."""
    rss_bytes: int
    """Largest resident memory of this worker so far."""
    cuda_bytes: int
    """Largest GPU memory of this worker so far; 0 without one."""
    seconds: float
    """Since the run began (this attempt)."""
    clips_encoded: int = 0
    """Clips that this worker's tower has run on so far (this attempt); 0 where all features were stored."""
    mfu: float | None = None
    """Share of the devices' peak FLOP rate that the model's own FLOP come to (`valley_ray.train.flops` says which are
    counted); None where the peak is not known."""
    skipped_steps: int = 0
    """Steps left out so far because gradients overflowed in fp16 (this attempt)."""


class Meter:
    """Counts between two logged steps."""

    def __init__(self, *, peak_flops: float | None = None) -> None:
        """`peak_flops`: of all workers' devices together, per second; None gives no MFU."""
        self._peak_flops = peak_flops
        self._began = time.perf_counter()
        self._skipped_steps = 0
        self._reset(wait_s=0.0)

    def add(self, *, samples: int, tokens: int, flops: float = 0.0, is_skipped: bool = False) -> None:
        """Count one step of all workers."""
        self._samples += samples
        self._tokens += tokens
        self._flops += flops
        self._skipped_steps += is_skipped

    def rates(self, *, wait_s: float) -> dict[str, Any]:
        """The fields of `StepMetrics` that are counted or timed here; `wait_s` is the feeder's total. Starts over."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        rates = {
            "samples_per_s": self._samples / elapsed,
            "tokens_per_s": self._tokens / elapsed,
            "stall_share": min(1.0, (wait_s - self._wait_s) / elapsed),
            "seconds": time.perf_counter() - self._began,
            "mfu": self._flops / elapsed / self._peak_flops if self._peak_flops else None,
            "skipped_steps": self._skipped_steps,
        }
        self._reset(wait_s=wait_s)
        return rates

    def start_stage(self) -> None:
        """Leave the time before now (building engines, checkpoints) out of the next rates; the feeder is a new one."""
        self._reset(wait_s=0.0)

    def _reset(self, *, wait_s: float) -> None:
        self._since = time.perf_counter()
        self._samples = 0
        self._tokens = 0
        self._flops = 0.0
        self._wait_s = wait_s


class MetricsLog:
    """Appends to ``metrics.jsonl`` in `folder`, shows a line and tells the trackers; made by rank 0 alone."""

    def __init__(self, folder: Path, *, last_step: int, trackers: Sequence[Tracker] = ()) -> None:
        """`last_step`: lines of later steps, left by an attempt that was killed, are dropped."""
        self._trackers = list(trackers)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS_FILE
        kept = [line for line in read_metrics(self.path) if line.step <= last_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(_line(metrics) for metrics in kept), encoding="utf-8")
        temporary.replace(self.path)

    def write(self, metrics: StepMetrics) -> None:
        """Append one line and print its short form (Ray forwards a worker's stdout to the driver's terminal)."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(metrics))
        sys.stdout.write(progress_line(metrics) + "\n")
        sys.stdout.flush()
        values = {name: value for name, value in asdict(metrics).items() if isinstance(value, int | float)}
        self._tell(lambda tracker: tracker.log(values, step=metrics.step))

    def close(self) -> None:
        """Let the trackers end."""
        self._tell(lambda tracker: tracker.close())
        self._trackers.clear()

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        """A tracker that fails (a lost network, a full disk) is left out from then on: it must not end a run."""
        for tracker in list(self._trackers):
            try:
                what(tracker)
            except Exception as error:
                logger.warning("%s failed and is left out: %s: %s", tracker.name, type(error).__name__, error)
                self._trackers.remove(tracker)

    def plot(self) -> Path:
        """Draw the loss over the steps, a colour per stage, as PNG beside the log; returns its path."""
        lines = read_metrics(self.path)
        points = [(line.stage, line.step, line.loss) for line in lines]
        return plot_loss(points, self.path.with_name(CURVE_FILE))


def progress_line(metrics: StepMetrics) -> str:
    """One line for a terminal."""
    line = (
        f"{metrics.stage} step {metrics.stage_step}/{metrics.stage_steps}  loss {metrics.loss:.4f}  "
        f"lr {metrics.learning_rate:.2e}  {metrics.samples_per_s:.1f} samples/s  stall {metrics.stall_share:.0%}"
    )
    line += f"  MFU {metrics.mfu:.0%}" if metrics.mfu is not None else ""
    return line + (f"  {metrics.skipped_steps} steps overflowed" if metrics.skipped_steps else "")


def read_metrics(path: Path) -> list[StepMetrics]:
    """The lines of a metrics file, [] if there is none; what is no whole line (a killed worker, a full disk) is
    dropped."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    return [metrics for line in whole.splitlines() if (metrics := _parsed(line)) is not None]


def _parsed(line: str) -> StepMetrics | None:
    try:
        return StepMetrics(**json.loads(line))
    except (ValueError, TypeError):
        return None


def peak_rss_bytes() -> int:
    """Largest resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _line(metrics: StepMetrics) -> str:
    return json.dumps(asdict(metrics)) + "\n"
