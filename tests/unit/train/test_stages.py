"""What a stage trains, and how fast."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from valley_ray.errors import ConfigError
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.train.stage_config import StageConfig
from valley_ray.train.stages import learning_rate_scale, prepare_stage


def make_stage(**changes: Any) -> StageConfig:
    values = {"name": "s", "trainable": ("projector",), "learning_rate": 1e-3, "max_steps": 100}
    return StageConfig(**{**values, **changes})


def test_warm_up_grows_linearly_and_the_cosine_falls_to_zero() -> None:
    stage = make_stage(warmup_ratio=0.1)
    scales = [learning_rate_scale(step, 100, stage) for step in range(101)]
    assert scales[0] == pytest.approx(1 / 11)
    assert scales[9] == pytest.approx(10 / 11)
    assert scales[10] == 1.0
    assert scales[55] == pytest.approx(0.5)
    assert scales[100] == pytest.approx(0.0)
    assert all(a > b for a, b in itertools.pairwise(scales[10:]))


def test_constant_schedule_stays_at_the_peak_and_no_warm_up_starts_there() -> None:
    stage = make_stage(schedule="constant", warmup_ratio=0.0)
    assert {learning_rate_scale(step, 10, stage) for step in range(10)} == {1.0}


def test_the_first_stage_trains_the_projector_alone(tiny_valley: Path) -> None:
    core = ValleyForConditionalGeneration.from_pretrained(tiny_valley).core
    (group,) = prepare_stage(core, make_stage(weight_decay=0.0))
    assert set(group.names) == {"mm_projector.weight", "mm_projector.bias"}
    assert {name for name, parameter in core.named_parameters() if parameter.requires_grad} == set(group.names)


def test_the_second_stage_trains_everything_with_rates_per_part_and_no_decay_on_vectors(tiny_valley: Path) -> None:
    core = ValleyForConditionalGeneration.from_pretrained(tiny_valley).core
    stage = make_stage(trainable=("projector", "language_model"), learning_rates={"projector": 5e-3}, weight_decay=0.1)
    groups = prepare_stage(core, stage)
    assert {name for group in groups for name in group.names} == {name for name, _ in core.named_parameters()}
    rates = {name: group.learning_rate for group in groups for name in group.names}
    assert rates["mm_projector.weight"] == 5e-3
    assert rates["language_model.lm_head.weight"] == 1e-3
    decays = {name: group.weight_decay for group in groups for name in group.names}
    assert decays["mm_projector.bias"] == 0.0
    assert decays["language_model.model.norm.weight"] == 0.0
    assert decays["language_model.lm_head.weight"] == 0.1


def test_new_embeddings_leave_the_other_rows_as_they_were(tiny_valley: Path) -> None:
    core = ValleyForConditionalGeneration.from_pretrained(tiny_valley).core
    groups = prepare_stage(core, make_stage(trainable=("new_embeddings",), weight_decay=0.1))
    before = core.get_input_embeddings().weight.detach().clone()
    optimizer = torch.optim.AdamW(
        [{"params": list(group.parameters), "weight_decay": group.weight_decay} for group in groups], lr=0.1
    )
    input_ids = torch.tensor([[1, 5, core.config.im_start_token_id, 7, 8]])
    core(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), labels=input_ids).loss.backward()
    optimizer.step()
    changed = (core.get_input_embeddings().weight != before).any(dim=1).nonzero().squeeze(-1).tolist()
    assert changed == [core.config.im_start_token_id]


def test_a_part_that_the_model_lacks_is_named(tiny_valley: Path) -> None:
    core = ValleyForConditionalGeneration.from_pretrained(tiny_valley).core
    with pytest.raises(ConfigError, match="trains temporal, which this model does not have"):
        prepare_stage(core, make_stage(trainable=("projector", "temporal")))


def test_parts_of_the_language_model_are_named_one_by_one(tiny_valley: Path) -> None:
    core = ValleyForConditionalGeneration.from_pretrained(tiny_valley).core
    (group,) = prepare_stage(core, make_stage(trainable=("lm_head",)))
    assert group.names == ("language_model.lm_head.weight",)
    (group,) = prepare_stage(core, make_stage(trainable=("layers",)))
    everything = {name for name, _ in core.named_parameters() if name.startswith("language_model.")}
    assert everything - set(group.names) == {
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
    }


def test_a_narrow_part_has_its_rate_within_a_wide_one(tiny_valley: Path) -> None:
    core = ValleyForConditionalGeneration.from_pretrained(tiny_valley).core
    stage = make_stage(trainable=("language_model", "lm_head"), learning_rates={"lm_head": 7e-3})
    rates = {name: group.learning_rate for group in prepare_stage(core, stage) for name in group.names}
    assert rates["language_model.lm_head.weight"] == 7e-3
    assert rates["language_model.model.embed_tokens.weight"] == 1e-3


def test_presets_train_what_the_original_scripts_train(tiny_valley: Path) -> None:
    core = ValleyForConditionalGeneration.from_pretrained(tiny_valley).core
    (group,) = prepare_stage(core, make_stage(trainable="valley-stage1"))
    embedding = "language_model.model.embed_tokens.weight"
    assert set(group.names) == {"mm_projector.weight", "mm_projector.bias", embedding}
    (group,) = prepare_stage(core, make_stage(trainable="valley-stage2"))
    assert {name for name, _ in core.named_parameters()} - set(group.names) == {"language_model.lm_head.weight"}
    with pytest.raises(ConfigError, match="trains lora, which this model does not have"):
        prepare_stage(core, make_stage(trainable="valley-stage2-lora"))


def test_rows_of_a_table_that_is_trained_whole_are_refused() -> None:
    with pytest.raises(ValueError, match="new_embeddings are rows of the table that language_model trains whole"):
        make_stage(trainable=("new_embeddings", "language_model"))
