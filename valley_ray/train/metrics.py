"""What a run says about itself: one JSON line per logged step, a progress line for people, a PNG of the curve."""

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

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


class Meter:
    """Counts between two logged steps."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._reset(wait_s=0.0)

    def add(self, *, samples: int, tokens: int) -> None:
        """Count one step."""
        self._samples += samples
        self._tokens += tokens

    def rates(self, *, wait_s: float) -> dict[str, float]:
        """samples_per_s, tokens_per_s, stall_share and seconds; `wait_s` is the feeder's total. Starts over."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        rates = {
            "samples_per_s": self._samples / elapsed,
            "tokens_per_s": self._tokens / elapsed,
            "stall_share": min(1.0, (wait_s - self._wait_s) / elapsed),
            "seconds": time.perf_counter() - self._began,
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
        self._wait_s = wait_s


class MetricsLog:
    """Appends to ``metrics.jsonl`` in `folder` and shows a line; made by rank 0 alone."""

    def __init__(self, folder: Path, *, last_step: int) -> None:
        """`last_step`: lines of later steps, left by an attempt that was killed, are dropped."""
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

    def plot(self) -> Path:
        """Draw the loss over the steps, a colour per stage, as PNG beside the log; returns its path."""
        return plot_loss(read_metrics(self.path), self.path.with_name(CURVE_FILE))


def progress_line(metrics: StepMetrics) -> str:
    """One line for a terminal."""
    return (
        f"{metrics.stage} step {metrics.stage_step}/{metrics.stage_steps}  loss {metrics.loss:.4f}  "
        f"lr {metrics.learning_rate:.2e}  {metrics.samples_per_s:.1f} samples/s  stall {metrics.stall_share:.0%}"
    )


def read_metrics(path: Path) -> list[StepMetrics]:
    """The lines of a metrics file, [] if there is none; a half-written last one (killed worker) is dropped."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return [StepMetrics(**json.loads(line)) for line in whole.splitlines()]


def plot_loss(lines: list[StepMetrics], path: Path) -> Path:
    """Write a PNG of loss over step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for stage in dict.fromkeys(line.stage for line in lines):
        of_stage = [line for line in lines if line.stage == stage]
        axes.plot([line.step for line in of_stage], [line.loss for line in of_stage], label=stage, linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (per label token)")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(frameon=False)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=130, format="png")
    temporary.replace(path)
    return path


def peak_rss_bytes() -> int:
    """Largest resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _line(metrics: StepMetrics) -> str:
    return json.dumps(asdict(metrics)) + "\n"
