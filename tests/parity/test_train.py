"""What the original's stages train, and three optimizer steps of each recorded run."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from parity_model import has_variant, load_arrays, open_variant, stored_clips
from parity_set import ROOT, load_json

from valley_ray.model import ValleyConfig, ValleyCore
from valley_ray.model.checkpoint import DEAD_LAYER, UPSTREAM_BUFFERS, our_name
from valley_ray.model.lora import LoraSettings, add_lora, load_adapter
from valley_ray.train.stage_config import StageConfig
from valley_ray.train.stages import prepare_stage

ATOL, RTOL = 1e-3, 1e-4
"""Of the loss at step 1 (the set's README)."""

LATER_ATOL = 5e-3
"""Of losses and of what steps lead to, after step 1 (the set's README)."""

PEFT_PREFIX = "base_model.model."


def test_stages_train_what_the_original_trains() -> None:
    for name, stages in load_json("trainable.json").items():
        if not has_variant(name):
            continue
        for stage, recorded in stages.items():
            core = open_variant(name).core
            if recorded["flags"].get("lora"):
                add_lora(core, LoraSettings())
            groups = prepare_stage(core, stage_of(recorded["flags"], core))
            trained = {plain_name(name) for group in groups for name in group.names}
            marked = {plain_name(name) for name, parameter in core.named_parameters() if parameter.requires_grad}
            frozen = {plain_name(name) for name, parameter in core.named_parameters()} - marked
            assert trained == marked == core_names(recorded["trainable"]), (name, stage)
            assert frozen == core_names(recorded["frozen"]) - {"pooling.position_encoding"}, (name, stage)


def test_three_steps_give_the_recorded_losses_gradients_and_weights() -> None:
    after = load_arrays("train.npz")
    for run, recorded in load_json("train.json").items():
        if "optimizer" not in recorded or not has_variant(recorded["checkpoint"]):
            continue
        core, features = prepared_core(recorded)
        batch = {"input_ids": torch.from_numpy(after["input_ids"]).long(), "features": features}
        batch |= {"attention_mask": padding_mask(core.config, batch["input_ids"])}
        batch |= {"labels": torch.from_numpy(after["labels"]).long()}
        theirs = recorded["optimizer"]
        stage = stage_of(flags_of(recorded), core, learning_rate=theirs["lr"])
        groups = prepare_stage(core, stage)
        optimizer = torch.optim.AdamW(
            [parameter for group in groups for parameter in group.parameters],
            **{key: theirs[key] for key in ("lr", "betas", "eps", "weight_decay")},
        )
        core.train()
        for step, loss in enumerate(losses(core, batch, optimizer, num_steps=theirs["steps"])):
            expected = [*recorded["loss_per_step"], recorded["loss_after_step3"]][step]
            np.testing.assert_allclose(loss, expected, atol=LATER_ATOL if step else ATOL, rtol=RTOL, err_msg=run)
            if step == theirs["steps"]:
                break
            total = recorded["total_grad_norm_per_step"][step]
            assert_norms(core, recorded["grad_norms_step1"] if not step else {}, total, context=f"{run} step {step}")
        assert_weights(core, recorded["final_params"], context=run)
        projector = core.mm_projector.weight.detach().numpy()
        np.testing.assert_allclose(projector, after[f"{run}.mm_projector.weight_after"], atol=LATER_ATOL, err_msg=run)


def losses(
    core: ValleyCore, batch: dict[str, Any], optimizer: torch.optim.Optimizer, *, num_steps: int
) -> Iterator[float]:
    """The loss before each step, its gradients in place, and the one after the last step."""
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = core(**batch).loss
        loss.backward()
        yield loss.item()
        optimizer.step()
    with torch.no_grad():
        yield core(**batch).loss.item()


def stage_of(flags: dict[str, bool], core: ValleyCore, *, learning_rate: float = 1e-3) -> StageConfig:
    """The original's flags as parts: a preset where one is meant, else written out."""
    if flags.get("lora"):
        parts: tuple[str, ...] = ("valley-stage2-lora",)
    elif flags["freeze_backbone"]:
        parts = ("valley-stage1",) if flags["tune_adapter"] else ("lm_head",)
        parts = ("embeddings",) if flags.get("freeze_adapter") else parts
    else:
        parts = ("valley-stage2",) if flags["tune_adapter"] else ("valley-stage2", "lm_head")
    return StageConfig(name="recorded", trainable=parts, learning_rate=learning_rate, max_steps=3)


def flags_of(recorded: dict[str, Any]) -> dict[str, bool]:
    """Flags of a run's stage, as trainable.json gives them."""
    flags: dict[str, bool] = load_json("trainable.json")[recorded["checkpoint"]][recorded["stage"]]["flags"]
    return flags


def prepared_core(recorded: dict[str, Any]) -> tuple[ValleyCore, list[torch.Tensor]]:
    """The core that a run starts from, without dropout, and the features of its batch."""
    model = open_variant(recorded["checkpoint"])
    clips = stored_clips(recorded["checkpoint"])
    features = model.encode_clips([clips[shape[0]] for shape in recorded["batch"]["image_shapes"]])
    if flags_of(recorded).get("lora"):
        load_adapter(model.core, ROOT / "checkpoints" / "lora-init")
    for module in model.core.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    return model.core, features


def padding_mask(config: ValleyConfig, input_ids: torch.Tensor) -> torch.Tensor:
    return (input_ids != config.pad_token_id).long()


def core_name(name: str) -> str:
    """Name in the core of the original's parameter `name`."""
    return our_name(name.removeprefix(PEFT_PREFIX)).removeprefix("core.")


def plain_name(name: str) -> str:
    """A name in the core without what peft puts in."""
    return name.replace(".base_layer.", ".")


def core_names(names: list[str]) -> set[str]:
    """Names of the original as names in the core, which has no tower, no buffers and no dead layer (its encoder works
    on a copy of that layer, so that nothing trains it)."""
    kept = [name for name in names if DEAD_LAYER not in name and not name.endswith(UPSTREAM_BUFFERS)]
    return {ours for ours in map(core_name, kept) if not ours.startswith("vision_tower.")}


def assert_norms(core: ValleyCore, expected: dict[str, float], total: float, *, context: str) -> None:
    gradients = {name: parameter.grad for name, parameter in core.named_parameters() if parameter.grad is not None}
    for name, norm in expected.items():
        if DEAD_LAYER in name:
            continue
        np.testing.assert_allclose(gradients[core_name(name)].norm(), norm, atol=ATOL, rtol=RTOL, err_msg=context)
    whole = torch.nn.utils.get_total_norm(gradients.values())
    np.testing.assert_allclose(whole, total, atol=ATOL if expected else LATER_ATOL, rtol=RTOL, err_msg=context)


def assert_weights(core: ValleyCore, expected: dict[str, list[float]], *, context: str) -> None:
    """[sum, L2 norm] of every parameter; a sum may drift by the steps' rounding in each of its terms."""
    weights = dict(core.named_parameters())
    for name, (total, norm) in expected.items():
        if DEAD_LAYER in name:
            continue
        weight = weights[core_name(name)].detach().double()
        message = f"{context} {name}"
        np.testing.assert_allclose(weight.norm(), norm, atol=LATER_ATOL, err_msg=message)
        np.testing.assert_allclose(weight.sum(), total, atol=LATER_ATOL, rtol=0, err_msg=message)
