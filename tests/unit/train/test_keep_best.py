"""Which checkpoints of a run survive, by Ray Train's own book of them, through the ends of its controllers."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest
from asked import settings
from ray.train import Checkpoint
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport
from ray.train.v2.api.reported_checkpoint import ReportedCheckpointStatus
from ray.train.v2.api.validation_config import ValidationTaskConfig
from train_runs import make_config

from valley_ray.train.checkpoint import reported_metrics
from valley_ray.train.config import TrainConfig
from valley_ray.train.fit import checkpoint_config


class Book:
    """Ray Train's book of a run's checkpoints, opened anew for every event, as controllers that are killed would."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder

    def _open(self) -> CheckpointManager:
        storage = StorageContext(self._folder, self._config.run_name or "")
        return CheckpointManager(checkpoint_config(self._config), storage)

    def _path(self, step: int) -> Path:
        return self._folder / (self._config.run_name or "") / f"checkpoint_{step}"

    async def add(self, step: int, *, loss: float) -> None:
        """A checkpoint is committed; it is to be evaluated where the run has an evaluation."""
        self._path(step).mkdir(parents=True)
        evaluation = self._config.evaluation
        report = _TrainingReport(
            Checkpoint.from_directory(self._path(step)),
            dict(reported_metrics(step, loss, evaluation)),
            ValidationTaskConfig(fn_kwargs={"step": step}) if evaluation is not None else False,
        )
        self._open().register_checkpoint(report)
        await asyncio.sleep(0)

    async def evaluated(self, step: int, metrics: Mapping[str, float] | None) -> None:
        """Its evaluation ends; None: it fails."""
        book = self._open()
        (checkpoint,) = [one for one in book.get_pending_training_results() if Path(one.path) == self._path(step)]
        status = ReportedCheckpointStatus
        how = status.VALIDATION_FAILED if metrics is None else status.VALIDATED
        book.update_checkpoints_with_validation_result({checkpoint: (dict(metrics or {}), how)})
        await asyncio.sleep(0)

    @property
    def kept(self) -> set[int]:
        """Steps of the checkpoints on the disk."""
        return {int(path.name.partition("_")[2]) for path in self._path(0).parent.glob("checkpoint_*") if path.is_dir()}


@pytest.fixture
def config(tiny_valley: Path, tmp_path: Path) -> TrainConfig:
    return make_config(tiny_valley, tmp_path, tmp_path, "run", keep="best", keep_checkpoints=1)


def test_the_best_evaluated_checkpoint_and_the_newest_survive(config: TrainConfig, tmp_path: Path) -> None:
    evaluation = settings(tmp_path / "records.json", best="rouge_1", metrics=("rouge",))
    book = Book(config.model_copy(update={"evaluation": evaluation}), tmp_path)

    async def run() -> None:
        await book.add(4, loss=1.0)
        await book.add(8, loss=0.9)
        await book.evaluated(4, {"rouge_1": 0.2})
        await book.evaluated(8, {"rouge_1": 0.7})
        assert book.kept == {8}
        await book.add(12, loss=0.1)
        assert book.kept == {8, 12}, "one whose evaluation goes on is kept"
        await book.add(16, loss=0.1)
        await book.evaluated(12, None)
        assert book.kept == {8, 16}, "one whose evaluation failed is not the best"
        await book.evaluated(16, {"rouge_1": 0.3})
        assert book.kept == {8, 16}, "the newest stays: the run goes on from it"
        await book.add(20, loss=0.1)
        await book.evaluated(20, {"rouge_1": 0.8})

    asyncio.run(run())
    assert book.kept == {20}


def test_without_an_evaluation_the_lowest_loss_and_the_newest_survive(config: TrainConfig, tmp_path: Path) -> None:
    book = Book(config, tmp_path)

    async def run() -> None:
        for step, loss in ((4, 1.0), (8, 0.2), (12, 0.5), (16, 0.4)):
            await book.add(step, loss=loss)

    asyncio.run(run())
    assert book.kept == {8, 16}
    last = Book(config.model_copy(update={"keep": "last"}), tmp_path)
    asyncio.run(last.add(20, loss=0.9))
    assert last.kept == {20}
