"""DeepSpeed: one trainable module becomes one engine; its parameters leave it as plain tensors.

Only ValleyCore is wrapped: the frozen tower stays outside the engine, or ranks whose batch holds no video would leave
ZeRO-3's gathers waiting. The optimizer is torch's own AdamW, so nothing is compiled.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from valley_ray.train.config import TrainConfig
from valley_ray.train.stage_config import StageConfig
from valley_ray.train.stages import ParameterGroup

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ZeroEngine:
    """A DeepSpeed engine and the few things done with it; every method but `parameters` is collective."""

    engine: Any
    groups: tuple[ParameterGroup, ...]
    zero_stage: int

    def __call__(self, **inputs: Any) -> Any:
        """Forward of the wrapped module."""
        return self.engine(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients. `loss` must already be divided by whatever the global batch is normalised with:
        DeepSpeed averages over ranks, so its share is multiplied by the world size beforehand."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, scale: float) -> float:
        """Make one optimizer step at ``scale`` times every group's peak learning rate; returns the gradient norm
        (before clipping). Called once per micro-batch as DeepSpeed wants it; it acts on the last one of a step."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["peak_learning_rate"] * scale
        plain = self.zero_stage == 0 and self.engine.is_gradient_accumulation_boundary()
        norm = _norm(self.engine.module) if plain else None
        self.engine.step()
        if norm is None:
            norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def trained_parameters(self) -> dict[str, torch.Tensor]:
        """Full values of every trained parameter on the CPU, by its name in the wrapped module."""
        names = {name for group in self.groups for name in group.names}
        values = {}
        for name, parameter in self.engine.module.named_parameters():
            if name in names:
                with _gathered(parameter, self.zero_stage):
                    values[name] = parameter.detach().to("cpu", copy=True)
        return values

    def save(self, folder: Path, *, tag: str) -> None:
        """Write the trained parameters and the optimizer state, every rank its part into its own `folder`."""
        (folder / tag).mkdir(parents=True, exist_ok=True)
        self.engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path, *, tag: str) -> None:
        """Read back what `save` wrote (the parts of all ranks together in one `folder`)."""
        loaded, _ = self.engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
        assert loaded is not None, f"DeepSpeed found no checkpoint {tag} in {folder}"

    def close(self) -> None:
        """Take DeepSpeed's hooks off the module."""
        self.engine.destroy()


def build_engine(
    module: nn.Module,
    groups: tuple[ParameterGroup, ...],
    config: TrainConfig,
    stage: StageConfig,
    *,
    num_micro_batches: int,
    world: int,
) -> ZeroEngine:
    """Wrap `module` (ValleyCore, its trainable parameters marked by `requires_grad`) for one stage.

    Uses the process group that Ray Train has made.
    """
    import deepspeed  # seconds of import that only a training process should pay

    # On Linux CPUs DeepSpeed would compile this collective first: a minute, and a compiler that may not be there.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    optimizer = torch.optim.AdamW(
        [
            {
                "params": list(group.parameters),
                "weight_decay": group.weight_decay,
                "lr": group.learning_rate,
                "peak_learning_rate": group.learning_rate,
            }
            for group in groups
        ],
        betas=stage.betas,
        eps=stage.eps,
    )
    num_trained = sum(parameter.numel() for group in groups for parameter in group.parameters)
    settings = deepspeed_settings(
        config, stage, num_trained=num_trained, num_micro_batches=num_micro_batches, world=world
    )
    engine, _, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    return ZeroEngine(engine=engine, groups=groups, zero_stage=config.zero_stage)


def deepspeed_settings(
    config: TrainConfig, stage: StageConfig, *, num_trained: int, num_micro_batches: int, world: int
) -> dict[str, Any]:
    """DeepSpeed's own configuration of one stage."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches,
        "train_batch_size": config.micro_batch_size * num_micro_batches * world,
        "gradient_clipping": stage.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        # A checkpoint is written to a folder of each rank's own and merged by Ray Train.
        "checkpoint": {"use_node_local_storage": True},
        "zero_optimization": {
            "stage": config.zero_stage,
            # ZeRO-2 allocates its buckets whole: the default of 5e8 elements is 2 GB, whatever the model's size.
            "reduce_bucket_size": max(1, min(num_trained, 500_000_000)),
            "allgather_bucket_size": 2 * max(1, min(num_trained, 250_000_000)),
            "overlap_comm": config.use_gpu,
        },
    }
    if config.precision != "fp32":
        settings[config.precision] = {"enabled": True}
    return settings


@contextmanager
def _gathered(parameter: nn.Parameter, zero_stage: int) -> Iterator[None]:
    if zero_stage < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield


def _norm(module: nn.Module) -> float:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0


def load_parameters(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Put `values` (as `trained_parameters` returned them) into a module that no engine has touched yet."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
