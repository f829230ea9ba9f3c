"""The training jobs as users run them: written out, and submitted to a cluster of two nodes with a token."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from two_nodes import ROOT, Nodes, start_two_nodes, submit

from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.nano.make import WorldConfig, make_clips
from valley_ray.train.metrics import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SMALL = (
    "global_batch_size=8",
    "micro_batch_size=4",
    "stages.0.max_steps=3",
    "log_every=1",
    "data.pipeline.window_size=16",
)
WORLD = WorldConfig(num_train=24, num_held_out=2, num_train_harder=0, num_held_out_harder=0)


def small_world(storage: Path, model: Path) -> None:
    """Clips and a model where the nano configurations look for theirs."""
    make_clips(storage / "runs" / "nano" / "data", WORLD, say=print)
    shutil.copytree(model, storage / "runs" / "nano" / "backbones")


def test_stage_2_goes_on_from_what_pretrain_leaves_over_the_same_clips(tmp_path: Path, tiny_valley: Path) -> None:
    small_world(tmp_path, tiny_valley)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)

    def run(name: str, *words: str) -> str:
        command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *SMALL, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    assert "models/nano-pretrained" in run("pretrain", "run_name=first")
    second = "stages=[{name: two, trainable: valley-stage2, learning_rate: 1.0e-3, max_steps: 3}]"
    run("finetune", second, "model=models/nano-pretrained", "run_name=second")
    (first,) = (tmp_path / "runs" / "pretrain").glob("first/metrics.jsonl")
    assert [line.stage for line in read_metrics(first)] == ["stage1"] * 3
    model = ValleyForConditionalGeneration.from_pretrained(tmp_path / "models" / "nano-finetuned")
    before = ValleyForConditionalGeneration.from_pretrained(tmp_path / "models" / "nano-pretrained")
    assert not model.core.mm_projector.weight.equal(before.core.mm_projector.weight)
    assert model.core.language_model.lm_head.weight.equal(before.core.language_model.lm_head.weight)


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[Nodes]:
    with start_two_nodes(tmp_path) as nodes:
        yield nodes


def test_a_submitted_job_trains_on_two_nodes(two_nodes: Nodes, tmp_path: Path, tiny_valley: Path) -> None:
    """Two workers of 0.75 CPUs fit two nodes of one CPU each, and no one of them."""
    storage = tmp_path / "storage"
    small_world(storage, tiny_valley)
    words = [*SMALL, "stages.1.max_steps=3", "cpus_per_worker=0.75", "data.pipeline.decode_cpus=0.25", "run_name=two"]
    said = submit(two_nodes, "finetune", words, storage=storage)
    assert f"storage: {storage}" in said
    lines = read_metrics(storage / "runs" / "finetune" / "two" / "metrics.jsonl")
    assert [line.stage for line in lines] == ["stage1"] * 3 + ["stage2"] * 3
    ValleyForConditionalGeneration.from_pretrained(storage / "models" / "nano-finetuned")
