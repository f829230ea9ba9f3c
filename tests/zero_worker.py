"""Runs cases of tests/zero_runs.py on two workers of Ray Train, one after another in one group."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from zero_runs import Outcome, Run, run_engines

WORLD = 2


def run_on_workers(runs: Sequence[Run], model: Path, folder: Path) -> dict[str, Outcome]:
    """What each run gave, by the name of its case; `folder` is an empty one to work in."""
    trainer = TorchTrainer(
        _work,
        train_loop_config={"runs": list(runs), "model": model, "folder": folder},
        # A hang ends as an error: longer than any step on a busy machine, shorter than pytest's limit.
        torch_config=TorchConfig(backend="gloo", timeout_s=120),
        scaling_config=ray.train.ScalingConfig(num_workers=WORLD, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(storage_path=str(folder / "ray")),
    )
    trainer.fit()
    return {run.case.name: pickle.loads((folder / f"{run.case.name}.pickle").read_bytes()) for run in runs}


def _work(values: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    rank = ray.train.get_context().get_world_rank()
    for run in values["runs"]:
        shared = values["folder"] / run.case.name
        outcome = run_engines(run, values["model"], rank=rank, world=WORLD, shared=shared)
        if rank == 0:
            shared.with_suffix(".pickle").write_bytes(pickle.dumps(outcome))
