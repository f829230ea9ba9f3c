"""A model folder and a held-out split → metrics, predictions and a page to look at.

`evaluate` works on a connected Ray with a pool of actors; `evaluate_checkpoint` in the calling process without Ray,
for a validation task of a training.
"""

import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from valley_ray.errors import CheckpointError, ConfigError, DataError
from valley_ray.evaluate.answers import ANSWERS_DIR, AnswerSet, answer
from valley_ray.evaluate.check import check_answers, check_sources
from valley_ray.evaluate.config import EvaluationConfig
from valley_ray.evaluate.metrics import COLUMNS
from valley_ray.evaluate.predictions import (
    JUDGED_FILE,
    METRICS_FILE,
    PAGE_FILE,
    PREDICTIONS_FILE,
    finite,
    measure,
    summary_of,
    write_predictions,
)

EVALUATION_FILE = "evaluation.jsonl"
EVALUATION_DIR = "evaluation"


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation gives."""

    summary: dict[str, Any]
    """What metrics.json holds."""
    predictions_path: Path
    metrics_path: Path
    page_path: Path

    def text(self) -> str:
        """The table and paths that a user reads."""
        summary = self.summary
        classes = ", ".join(f"{name} {count}" for name, count in summary["by_error_class"].items())
        lines = [
            f"rows         {summary['rows_in']:,}: {summary['ok']:,} answered, {summary['failed']:,} failed"
            f"{f' ({classes})' if classes else ''}",
            *_table(summary),
            f"metrics      {self.metrics_path}",
            f"predictions  {self.predictions_path}",
            f"page         {self.page_path}",
        ]
        return "\n".join(lines)


def evaluate(settings: EvaluationConfig) -> EvaluationResult:
    """Answer the held-out split with `settings.model` on the connected Ray, and measure; write `settings.output`.

    A run that was stopped is gone on with: no answer, and no verdict of a judge, is asked for twice.

    Raises:
        ConfigError: model or output are missing, or cannot be used.
        ValleyError: as `answers.answer`, or nothing was answered.
    """
    check_evaluation(settings)
    model, output = settings.model, settings.output
    assert model is not None, "checked just now"
    assert output is not None, "checked just now"
    output = output.absolute()
    answers = answer(settings, model, output, on_ray=True, shows_progress=True)
    return _measured(answers, settings, output, kept=output / JUDGED_FILE, title=f"Answers of {model.name}")


def check_evaluation(settings: EvaluationConfig) -> None:
    """Raise, before Ray starts, for what an evaluation alone cannot work with; `evaluate` does so too.

    Raises:
        ConfigError: model or output are missing.
        CheckpointError: a model folder that is none.
        DataError: a source that is not there or whose format cannot be told, or clips that nobody asks about.
    """
    check_answers(settings, what="an evaluation alone")
    check_split(settings)


def check_split(settings: EvaluationConfig) -> None:
    """The same for an evaluation while training, which has the training's model and output."""
    check_sources(settings)
    if settings.bertscore_model is not None and not (settings.bertscore_model / "config.json").is_file():
        raise CheckpointError(f"bertscore_model={str(settings.bertscore_model)!r} is no model folder")


def evaluate_checkpoint(
    folder: Path, settings: EvaluationConfig, *, output: Path | None = None, step: int | None = None
) -> dict[str, float]:
    """Answer the held-out split with the model of `folder` in this process, and measure.

    A validation task calls it: ``ray.train.report(..., validation=...)`` → export the checkpoint to a model folder →
    this. It needs `settings.resources`; its clips are decoded by the first call and read from `output`/shards (or
    settings.shards_dir) by later ones. One call at a time per `output`. Nothing of it stops a training: whoever calls
    it in a validation task lets what it raises end that task.

    Args:
        folder: a model folder, complete (`valley_ray.train.export.export_model` writes one).
        settings: its `model` is ignored; `every_checkpoints`, `timeout_s` and `best` are the caller's.
        output: folder of the run; None: settings.output. A line is appended to its ``evaluation.jsonl`` (`step`,
            the metrics, `seconds`); predictions and page go to its ``evaluation/step-<step>``.
        step: optimizer steps behind the model; a line of the same step that is there is replaced.

    Returns:
        finite numbers only, by name, larger is better: those of exact_match, qa_accuracy, bleu, rouge_1, rouge_2,
        rouge_l, bertscore, judge_score, judge_accuracy that were asked for and could be computed, and `answered`, the
        share of rows with an answer. `settings.best` is one of them.

    Raises:
        ValleyError: the folder or the sources cannot be read, nothing was answered, or `settings.best` could not be
            computed (a judge that never replied).
    """
    output = output if output is not None else settings.output
    if output is None:
        raise ConfigError("evaluation of a checkpoint needs a folder to write to; set evaluation.output")
    work = output / EVALUATION_DIR
    answers = answer(settings, folder, work, on_ray=False)
    into = work / (f"step-{step:08d}" if step is not None else "latest")
    title = "Answers" if step is None else f"Answers after step {step:,}"
    try:
        summary = _measured(answers, settings, into, kept=work / JUDGED_FILE, title=title).summary
    finally:
        # Another export of the same checkpoint is another folder: nobody comes back to these.
        shutil.rmtree(work / ANSWERS_DIR, ignore_errors=True)
    metrics = finite(summary["metrics"])
    if settings.best not in metrics:
        raise DataError(f"{settings.best} could not be computed, and it makes the best checkpoint; see {into}")
    _write_line(output / EVALUATION_FILE, {"step": step, **metrics, "seconds": summary["seconds"]})
    return metrics


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """The lines of an evaluation.jsonl, in the order of their steps; [] if there is none."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(lines, key=lambda line: line["step"] if line["step"] is not None else -1)


def _measured(
    answers: AnswerSet, settings: EvaluationConfig, output: Path, *, kept: Path, title: str
) -> EvaluationResult:
    from valley_ray.evaluate.page import write_page

    if not answers.by_status["ok"]:
        classes = ", ".join(f"{name} {count}" for name, count in answers.by_error_class.most_common(3))
        reason = next(one for one in answers.table["error"].to_pylist() if one)
        raise DataError(f"none of {answers.rows_in} questions was answered ({classes}); the first: {reason}")
    rows = measure(answers, settings, kept)
    summary = summary_of(rows, answers)
    write_predictions(rows, summary, output)
    write_page(rows, summary, answers.shards_dir, output / PAGE_FILE, title=title, seed=settings.seed)
    return EvaluationResult(summary, output / PREDICTIONS_FILE, output / METRICS_FILE, output / PAGE_FILE)


def _table(summary: dict[str, Any]) -> list[str]:
    """The numbers of the whole, then by source and by kind where there are several."""
    groups = {"all": {"rows": float(summary["rows_in"]), **summary["metrics"]}}
    for of in ("by_source", "by_kind"):
        if len(summary[of]) > 1:
            groups |= {name or "(unnamed)": values for name, values in summary[of].items()}
    names = [name for name in ("rows", "answered", *COLUMNS) if any(name in values for values in groups.values())]
    width = max(map(len, groups))
    lines = [" ".join([" " * width, *(f"{name:>11}" for name in names)])]
    for group, values in groups.items():
        cells = (_cell(name, values[name]) if name in values else "" for name in names)
        lines.append(" ".join([f"{group:<{width}}", *(f"{cell:>11}" for cell in cells)]))
    return lines


def _cell(name: str, value: float) -> str:
    return f"{value:,.0f}" if name == "rows" else f"{value:.1%}" if name == "answered" else f"{value:.4g}"


def _write_line(path: Path, line: dict[str, Any]) -> None:
    lines = [one for one in read_evaluations(path) if one["step"] != line["step"]]
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.write_text("".join(json.dumps(one) + "\n" for one in [*lines, line]), encoding="utf-8")
    os.replace(temporary, path)
