"""What a run may change between two attempts, and what it is told where it may not."""

from pathlib import Path

import torch
from train_runs import make_config

from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.train.identity import differences, run_identity


def test_workers_micro_batches_and_intervals_may_change(tiny_valley: Path, tmp_path: Path) -> None:
    config = make_config(tiny_valley, tmp_path, tmp_path, "a")
    other = make_config(
        tiny_valley, tmp_path, tmp_path, "b", num_workers=(1, 4), micro_batch_size=6, log_every=3, checkpoint_every=5
    )
    assert run_identity(config, "store") == run_identity(other, "store")


def test_what_differs_is_named_with_both_values(tiny_valley: Path, tmp_path: Path) -> None:
    config = make_config(tiny_valley, tmp_path, tmp_path, "a")
    stages = (config.stages[0].model_copy(update={"learning_rate": 0.5}), config.stages[1])
    other = make_config(tiny_valley, tmp_path, tmp_path, "a", seed=1, global_batch_size=8, stages=stages)
    found = differences(run_identity(config, "store"), run_identity(other, "other"))
    assert sorted(found) == [
        "data=store (now other)",
        "global_batch_size=12 (now 8)",
        "seed=0 (now 1)",
        "stages.0.learning_rate=0.01 (now 0.5)",
    ]


def test_another_model_is_another_run(tiny_valley: Path, tmp_path: Path) -> None:
    config = make_config(tiny_valley, tmp_path, tmp_path, "a")
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_bytes((tiny_valley / name).read_bytes())
    copied = config.model_copy(update={"model": tmp_path / "model"})
    assert run_identity(copied, "store") == run_identity(config, "store")
    model = ValleyForConditionalGeneration.from_pretrained(tiny_valley)
    torch.nn.init.constant_(model.core.mm_projector.bias, 0.5)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_bytes((tiny_valley / "config.json").read_bytes())
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tiny_valley, tmp_path / "model")]
    assert sizes[0] == sizes[1], "a stage 1 that was run again"
    (changed,) = differences(run_identity(config, "store"), run_identity(copied, "store"))
    assert changed.startswith("model=")
