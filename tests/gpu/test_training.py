"""Training on a CUDA device: mixed precision, scaled losses, memory. One process; tests/ray/test_zero.py has two."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from zero_runs import NUM_STEPS, Case, Outcome, Run, largest_difference, run_plain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LORA = {"r": 4, "dropout": 0.0}


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one on the first device."""
    torch.cuda.set_device(0)
    path = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("nccl", init_method=f"file://{path}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def train(case: Case, model: Path, folder: Path) -> Outcome:
    from zero_runs import run_engines

    device = torch.device("cuda", 0)
    return run_engines(Run(case), model, rank=0, world=1, shared=folder, device=device)


def on_gpu(precision: str, **settings: Any) -> dict[str, Any]:
    return {"precision": precision, "use_gpu": True, **settings}


def test_float32_equals_plain_torch_on_the_cpu(tiny_valley: Path, tmp_path: Path) -> None:
    """1e-4: other kernels, and matrix products that sum in another order."""
    for stage in range(4):
        case = Case(f"fp32-{stage}", stage, settings=on_gpu("fp32"))
        plain = run_plain(Run(case), tiny_valley)
        assert largest_difference(train(case, tiny_valley, tmp_path).losses, plain.losses) < 1e-4, case.name


def test_bf16_and_fp16_follow_float32_with_and_without_offload(tiny_valley: Path, tmp_path: Path) -> None:
    """0.1 of losses between 3 and 4.5; steps that fp16 skips while its scale comes down are not made up for."""
    plain = run_plain(Run(Case("plain")), tiny_valley)
    for precision in ("bf16", "fp16"):
        for stage, offload in ((0, False), (1, False), (2, True), (3, False), (3, True)):
            case = Case(f"{precision}-{stage}-{offload}", stage, settings=on_gpu(precision, offload=offload))
            outcome = train(case, tiny_valley, tmp_path)
            if outcome.num_skipped == 0:
                assert largest_difference(outcome.losses, plain.losses) < 0.1, case.name
            assert outcome.num_skipped < NUM_STEPS / 2, case.name
            assert outcome.losses[-1] < outcome.losses[0] - 0.2, case.name
            assert all(value.dtype == torch.float32 for value in outcome.parameters.values()), case.name


def test_gradients_that_overflow_in_fp16_skip_their_step_and_the_run_goes_on(tiny_valley: Path, tmp_path: Path) -> None:
    """The scale begins at 65536 and fp16 ends at 65504: gradients above 1 overflow until it has come down."""
    outcome = train(Case("overflow", 2, settings=on_gpu("fp16")), tiny_valley, tmp_path)
    assert 0 < outcome.num_skipped < NUM_STEPS
    assert outcome.losses[-1] < outcome.losses[0]


def test_gradient_checkpointing_takes_less_memory(tiny_valley: Path, tmp_path: Path) -> None:
    peaks = []
    for is_on in (False, True):
        torch.cuda.reset_peak_memory_stats()
        settings = on_gpu("bf16", gradient_checkpointing=is_on)
        train(Case(f"memory-{is_on}", 2, settings=settings), tiny_valley, tmp_path)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_an_adapter_on_four_bits_learns(tiny_valley: Path, tmp_path: Path) -> None:
    for extra in ({}, {"use_dora": True}):
        lora = LORA | {"quantize": "nf4"} | extra
        outcome = train(Case("qlora", 2, ("projector", "lora"), lora, on_gpu("bf16")), tiny_valley, tmp_path)
        assert outcome.losses[-1] < outcome.losses[0] - 0.2
