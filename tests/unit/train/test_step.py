"""One step: which micro-batch ends it, and what is no number. The engine is a stand-in; test_zero.py has real ones."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
from train_batches import BatchMaker

from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.train.feed import FeatureCache
from valley_ray.train.flops import count_flops
from valley_ray.train.step import Stepper, StepResult
from valley_ray.train.zero import Applied


class Engine:
    """Plain torch behind the engine's interface."""

    def __init__(self, model: ValleyForConditionalGeneration, applied: Applied) -> None:
        self.engine = SimpleNamespace(module=model.core)
        self.applied = applied
        self.calls: list[Any] = []

    def __call__(self, **inputs: Any) -> Any:
        return self.engine.module(**inputs)

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        self.calls.append(is_last)

    def step(self, scale: float) -> Applied:
        self.calls.append(scale)
        return self.applied


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one."""
    path = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def train(folder: Path, *, is_broken: bool = False, applied: Applied | None = None) -> tuple[StepResult, list[Any]]:
    """One step of three micro-batches."""
    model = ValleyForConditionalGeneration.from_pretrained(folder)
    if is_broken:
        with torch.no_grad():
            model.core.mm_projector.bias[0] = float("nan")
    engine = Engine(model, applied or Applied(grad_norm=2.0, is_skipped=False))
    options: dict[str, Any] = {"device": torch.device("cpu"), "rank": 0, "world": 1, "seed": 0}
    stepper = Stepper(model, engine, FeatureCache(0), flops=count_flops(model), **options)  # type: ignore[arg-type]
    maker = BatchMaker(folder)
    slots = [[maker.sample(kind, (0, row))] for row, kind in enumerate(("video", "text", "image"))]
    return stepper.train(maker.step(slots), step=0, scale=0.5), engine.calls


def test_the_last_micro_batch_ends_the_step(tiny_valley: Path) -> None:
    result, calls = train(tiny_valley)
    assert calls == [False, False, True, 0.5]
    assert result.is_finite
    assert (result.grad_norm, result.is_skipped) == (2.0, False)
    assert result.flops > 1e6


def test_a_loss_that_is_no_number_makes_no_step(tiny_valley: Path) -> None:
    result, calls = train(tiny_valley, is_broken=True)
    assert math.isnan(result.loss)
    assert not result.is_finite
    assert calls == [False, False, True]


def test_gradients_that_overflow_end_a_run_except_where_fp16_allows_for_it(tiny_valley: Path) -> None:
    infinite, _ = train(tiny_valley, applied=Applied(grad_norm=float("inf"), is_skipped=False))
    assert math.isfinite(infinite.loss)
    assert not infinite.is_finite
    skipped, _ = train(tiny_valley, applied=Applied(grad_norm=float("nan"), is_skipped=True))
    assert skipped.is_skipped
    assert skipped.is_finite
