"""The loss over a run's steps as a PNG: what was logged, and a line through its noise."""

import math
from collections.abc import Sequence
from pathlib import Path

Point = tuple[str, int, float]
"""Stage, step, loss."""

FEW = 8
"""Up to so many points of a stage are shown as points and not smoothed."""

WIDE = 8.0
"""From this ratio of largest to smallest loss on, the axis is logarithmic."""


def plot_loss(points: Sequence[Point], path: Path) -> Path:
    """Write a PNG to `path`: per stage a colour, the logged losses pale and their moving average strong."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, stage in enumerate(dict.fromkeys(stage for stage, _, _ in points)):
        steps = [step for of_stage, step, _ in points if of_stage == stage]
        losses = [loss for of_stage, _, loss in points if of_stage == stage]
        colour = f"C{number}"
        if len(losses) <= FEW:
            axes.plot(steps, losses, color=colour, label=stage, linewidth=1.2, marker="o", markersize=4)
            continue
        axes.plot(steps, losses, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(steps, smoothed(losses), color=colour, label=f"{stage} (smoothed)", linewidth=1.6)
    finite = [loss for _, _, loss in points if math.isfinite(loss) and loss > 0]
    if finite and max(finite) >= WIDE * min(finite):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("loss (per label token)")
    axes.grid(alpha=0.3, which="major")
    if points:
        axes.legend(frameon=False)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=130, format="png")
    temporary.replace(path)
    return path


def smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential moving average over about a twentieth of the points (at least five), without the pull of its start.

    What is not finite is left out of it.
    """
    keep = 1.0 - 2.0 / (max(5, len(losses) // 20) + 1)
    values, total, weight = [], 0.0, 0.0
    for loss in losses:
        if math.isfinite(loss):
            total, weight = keep * total + (1 - keep) * loss, keep * weight + (1 - keep)
        values.append(total / weight if weight else math.nan)
    return values
