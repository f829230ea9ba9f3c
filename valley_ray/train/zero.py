"""DeepSpeed: one trainable module becomes one engine; its parameters leave it as plain tensors.

A frozen tower stays outside, or ranks whose batch holds no video would leave ZeRO-3's gathers waiting; a trained one
comes in as part of a module that runs it on every batch (trainable.py). The optimizer is torch's own AdamW, so nothing
is compiled.
"""

import logging
import warnings
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
class Applied:
    """What one optimizer step did."""

    grad_norm: float
    """Before clipping; nan where the step was left out."""
    is_skipped: bool
    """Whether gradients overflowed in fp16: no weight was changed, and the next loss is scaled less."""


@dataclass(frozen=True)
class ZeroEngine:
    """A DeepSpeed engine and the few things done with it; every method is collective."""

    engine: Any
    groups: tuple[ParameterGroup, ...]
    zero_stage: int

    def __call__(self, **inputs: Any) -> Any:
        """Forward of the wrapped module."""
        return self.engine(**inputs)

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Accumulate gradients; `is_last` says that `step` comes next, whatever the number of calls before.

        `loss` must already be divided by whatever the global batch is normalised with: DeepSpeed averages over ranks,
        so its share is multiplied by the world size beforehand.
        """
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, scale: float) -> Applied:
        """Make one optimizer step at ``scale`` times every group's peak learning rate, after the last `backward`."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["peak_learning_rate"] * scale
        # Plain torch is wrapped in nothing that keeps a norm.
        is_plain = isinstance(self.engine.optimizer, torch.optim.Optimizer)
        norm = _norm(self.engine.module) if is_plain else None
        self.engine.step()
        if not self.engine.was_step_applied():
            return Applied(grad_norm=float("nan"), is_skipped=True)
        if norm is None:
            norm = self.engine.get_global_grad_norm()
        return Applied(grad_norm=float(norm) if norm is not None else float("nan"), is_skipped=False)

    def trained_parameters(self) -> dict[str, torch.Tensor]:
        """Full values of every trained parameter on the CPU, by its name; float32 ones also in mixed precision."""
        return {
            name: self._full_value(parameter)
            for group in self.groups
            for name, parameter in zip(group.names, group.parameters, strict=True)
        }

    def save(self, folder: Path, *, tag: str) -> None:
        """Write the trained parameters and the optimizer state, every rank its part into its own `folder`."""
        (folder / tag).mkdir(parents=True, exist_ok=True)
        self.engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path, *, tag: str, universal: bool = False) -> None:
        """Read back what `save` wrote (the parts of all ranks together in one `folder`), or, with `universal`, what
        `universal.universal_form` made of it for another number of ranks."""
        groups = self.engine.optimizer.param_groups
        settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        self.engine._config.load_universal_checkpoint = universal
        loaded, _ = self.engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
        assert loaded is not None, f"DeepSpeed found no checkpoint {tag} in {folder}"
        # From the universal form ZeRO-3 gives every group the learning rate and weight decay of the first one, and one
        # step counter for all, which the groups would each count up.
        for group, of_group in zip(self.engine.optimizer.param_groups, settings, strict=True):
            group.update(of_group)
        for state in self.engine.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    def close(self) -> None:
        """Take DeepSpeed's hooks off the module."""
        self.engine.destroy()

    def _full_value(self, parameter: nn.Parameter) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        if parameter.dtype != torch.float32:
            shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
            full: torch.Tensor = safe_get_full_fp32_param(parameter)
            return full.detach().view(shape).to("cpu", copy=True)
        with _gathered(parameter, self.zero_stage):
            return parameter.detach().to("cpu", copy=True)


def build_engine(
    module: nn.Module, groups: tuple[ParameterGroup, ...], config: TrainConfig, stage: StageConfig, *, world: int
) -> ZeroEngine:
    """Wrap `module`, its trainable parameters marked by `requires_grad`, for one stage.

    Uses the process group that Ray Train has made.
    """
    import deepspeed  # seconds of import that only a training process should pay

    # Pages about buckets and memory, once per worker and stage, would bury the progress lines.
    deepspeed.utils.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
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
    settings = deepspeed_settings(config, stage, num_trained=num_trained, world=world)
    engine, _, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    return ZeroEngine(engine=engine, groups=groups, zero_stage=settings["zero_optimization"]["stage"])


def deepspeed_settings(config: TrainConfig, stage: StageConfig, *, num_trained: int, world: int) -> dict[str, Any]:
    """DeepSpeed's own configuration of one stage."""
    is_mixed = config.precision != "fp32"
    zero: dict[str, Any] = {
        # DeepSpeed 0.19's own ZeRO 0 rounds sums of gradients to bf16, counts one step of AdamW too many, and does
        # not scale the loss of fp16.
        "stage": max(config.zero_stage, int(is_mixed)),
        # ZeRO-2 allocates its buckets whole: the default of 5e8 elements is 2 GB, whatever the model's size.
        "reduce_bucket_size": max(1, min(num_trained, 500_000_000)),
        "allgather_bucket_size": 2 * max(1, min(num_trained, 250_000_000)),
        "overlap_comm": config.use_gpu,
    }
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        # Steps have different numbers of micro-batches; the stepper says which one is the last.
        "gradient_accumulation_steps": 1,
        "train_batch_size": config.micro_batch_size * world,
        "gradient_clipping": stage.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        # A checkpoint is written to a folder of each rank's own and merged by Ray Train.
        "checkpoint": {"use_node_local_storage": True},
        "zero_optimization": zero,
    }
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": config.use_gpu}
        settings["zero_force_ds_cpu_optimizer"] = False
    if is_mixed:
        settings[config.precision] = {"enabled": True}
        # Gradients are summed in float32 over micro-batches and ranks: each rounding of a sum would stay in it.
        settings["communication_data_type"] = "fp32"
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def load_parameters(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Put `values` (as `trained_parameters` returned them) into a module that no engine has touched yet."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


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
