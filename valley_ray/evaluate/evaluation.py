"""A model folder and a held-out split → metrics, predictions and a page to look at.

`evaluate` works on a connected Ray with a pool of actors; `evaluate_checkpoint` in the calling process without Ray,
for a validation task of a training.
"""

from pathlib import Path

from valley_ray.evaluate.config import EvaluationConfig

EVALUATION_FILE = "evaluation.jsonl"


def evaluate_checkpoint(
    folder: Path, settings: EvaluationConfig, *, output: Path | None = None, step: int | None = None
) -> dict[str, float]:
    """Answer the held-out split with the model of `folder` in this process, and measure.

    A validation task calls it: ``ray.train.report(..., validation=...)`` → export the checkpoint to a model folder →
    this. It needs `settings.resources`; its clips are decoded by the first call and read from `output`/shards (or
    settings.shards_dir) by later ones. One call at a time per `output`. Nothing of it stops a training: whoever calls
    it in a validation task lets what it raises end that task.

    Args:
        folder: a model folder, complete (`valley_ray.train.checkpoint.export_model` writes one).
        settings: its `model` is ignored; `every_checkpoints`, `timeout_s` and `best` are the caller's.
        output: folder of the run; None: settings.output. A line is appended to its ``evaluation.jsonl`` (`step`,
            the metrics, `seconds`); predictions and page go to its ``evaluation/step-<step>``.
        step: optimizer steps behind the model; a line of the same step that is there is replaced.

    Returns:
        finite numbers only, by name, larger is better: those of exact_match, qa_accuracy, bleu, rouge_1, rouge_2,
        rouge_l, bertscore, judge_score, judge_accuracy that were asked for and could be computed, and `answered`, the
        share of rows with an answer. `settings.best` is one of them, or ConfigError is raised.

    Raises:
        ValleyError: the folder or the sources cannot be read, or nothing was answered.
    """
    raise NotImplementedError
