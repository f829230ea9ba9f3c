"""Bytes of all tensors of a process that has trained one step and gone backward in a second: for the forecast's test.

python tests/engine_memory.py MODEL ZERO_STAGE PRECISION PARTS   prints the bytes; one worker, on the CPU.
"""

import gc
import os
import sys
import tempfile
from pathlib import Path

import torch

from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.train.config import DataConfig, TrainConfig
from valley_ray.train.stage_config import StageConfig
from valley_ray.train.stages import prepare_stage
from valley_ray.train.zero import build_engine


def config_of(model: Path, zero_stage: int, precision: str, parts: str) -> TrainConfig:
    """One stage that trains `parts` (commas between them)."""
    stage = StageConfig(name="one", trainable=tuple(parts.split(",")), learning_rate=1e-3, max_steps=2)
    run = {"model": model, "output": "out", "data": DataConfig(windows_dir="windows"), "stages": (stage,)}
    return TrainConfig(**run, num_workers=1, zero_stage=zero_stage, precision=precision)


def tensor_bytes() -> int:
    """Of every tensor that is reachable, storages counted once."""
    gc.collect()
    found: dict[int, int] = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor) and one.device.type == "cpu":
            for tensor in (one, one.grad if one.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def main(model: Path, zero_stage: int, precision: str, parts: str) -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        config = config_of(model, zero_stage, precision, parts)
        opened = ValleyForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
        opened.core.train()
        groups = prepare_stage(opened.core, config.stages[0], tower=opened.vision_tower)
        engine = build_engine(opened.core, groups, config, config.stages[0], world=1)
        ids = torch.arange(5, 35)[None]
        for step in range(2):
            engine.backward(engine(input_ids=ids, labels=ids, return_logits=False).loss, is_last=True)
            if step == 0:
                engine.step(1.0)
        return tensor_bytes()


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]))
