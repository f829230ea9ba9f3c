"""Keys of the original's experiment YAML: which ones count here, why the others do not, and how they are read.

They are fields of its argument classes (valley/train/train.py), keys of its later experiments, and the settings of
transformers' TrainingArguments that its experiments use or that people add to them.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from valley_ray.errors import ConfigError

CONVERTED_KEYS = frozenset(
    (
        *("model_name_or_path", "output_dir", "run_name", "data_path", "video_data_path", "image_folder"),
        *("video_folder", "freeze_backbone", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "lora", "lora_enable"),
        *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay"),
        *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "per_device_train_batch_size", "fast_epoch"),
        *("gradient_accumulation_steps", "fp16", "bf16", "deepspeed", "gradient_checkpointing", "logging_steps"),
        *("save_strategy", "save_steps", "save_total_limit", "report_to", "seed", "group_by_length"),
        "group_by_modality_length",
    )
)
"""Keys that decide something here."""

_MODEL = "the model folder says it"
_PROCESSOR = "the model folder says it, in processor_config.json"
_NEVER_READ = "the original's training never reads it"
_EVALUATION = "evaluation is set under `evaluation`, and by jobs/evaluate.py"
_SPEED = "a setting of its data loader or launcher; here: num_workers, cpus_per_worker, prefetch_steps"
_LOOK = "how transformers' Trainer reports; metrics are always written as JSON lines and a curve"
_HUB = "upload the model folder with the hub's own client"
_PRODUCT = "belongs to a product data set that was never released"

IGNORED_KEYS: dict[str, str] = {
    "mm_vision_select_layer": f"{_MODEL}: vision_layer in config.json",
    "mm_vision_select_feature": _MODEL,
    "mm_use_im_start_end": "always on, as in every released model",
    "mm_use_im_patch_token": _MODEL,
    "vision_tower": "the tower is in the model folder",
    "pretrain_mm_mlp_adapter": "a model folder holds its projector; start from the folder that stage 1 left",
    "model_class": _MODEL,
    "llm_name": _MODEL,
    "version": f"{_PROCESSOR}: prompt_style",
    "prompt_version": f"{_PROCESSOR}: system_prompt",
    "conv_mode": f"{_PROCESSOR}: system_prompt, and prompt_style (upstream-train for its exact prompts)",
    "language": _MODEL,
    "model_max_length": f"{_PROCESSOR}: max_length",
    "only_mask_system": "has no effect in the original's training (parity note 4)",
    "is_multimodal": "always so",
    "lazy_preprocess": "samples are always read as they are needed",
    "image_aspect_ratio": f"{_PROCESSOR}: image_crop",
    "multi_image": "lists of images are always read whole",
    "multi_image_mode": _NEVER_READ,
    "num_image": _NEVER_READ,
    "sep_image_conv_front": _NEVER_READ,
    "image_token_len": "follows from the tower",
    "tune_llm_layer": _NEVER_READ,
    "force_fsdp": _NEVER_READ,
    "lora_lr": _NEVER_READ,
    "lora_save_strategy": "the adapter is in every checkpoint, and in the model folder at the end",
    "use_fashion": _PRODUCT,
    "is_fashion_data": _PRODUCT,
    "fashion_data_path": _PRODUCT,
    "fashion_image_folder": _PRODUCT,
    "max_img_num": _PRODUCT,
    "project_name": "export WANDB_PROJECT where the tracker wandb is on",
    "cache_dir": "models come from folders; nothing is fetched",
    "tf32": "as torch is set up on the machine",
    "optim": "AdamW always",
    "warmup_steps": "warm-up is a share of the steps here: warmup_ratio",
    "evaluation_strategy": _EVALUATION,
    "eval_strategy": _EVALUATION,
    "eval_steps": _EVALUATION,
    "eval_num": _EVALUATION,
    "per_device_eval_batch_size": _EVALUATION,
    "prediction_file_name": _EVALUATION,
    "predict_with_generate": _EVALUATION,
    "prediction_loss_only": _EVALUATION,
    "use_legacy_prediction_loop": _EVALUATION,
    "generation_max_length": _EVALUATION,
    "do_train": _EVALUATION,
    "do_eval": _EVALUATION,
    "do_predict": _EVALUATION,
    "remove_unused_columns": _SPEED,
    "dataloader_num_workers": _SPEED,
    "dataloader_pin_memory": _SPEED,
    "dataloader_drop_last": "no sample is ever dropped",
    "ddp_find_unused_parameters": _SPEED,
    "ddp_timeout": "timeout_s",
    "local_rank": _SPEED,
    "logging_dir": _LOOK,
    "logging_strategy": _LOOK,
    "logging_first_step": "the first step of a stage is always logged",
    "disable_tqdm": _LOOK,
    "log_level": _LOOK,
    "resume_from_checkpoint": "a run_name that was there before is gone on with",
    "overwrite_output_dir": "a model folder in `output` is replaced, anything else is refused",
    "load_best_model_at_end": "the best checkpoint is chosen under `evaluation`",
    "push_to_hub": _HUB,
    "hub_model_id": _HUB,
    "fsdp": "DeepSpeed's ZeRO is what divides a model here: zero_stage",
    "fsdp_config": "DeepSpeed's ZeRO is what divides a model here: zero_stage",
}
"""Reason by key."""


@dataclass
class Keys:
    """Typed reading of the keys, and what was noted on the way."""

    values: Mapping[str, Any]
    source: Path
    changed: list[tuple[str, str]] = field(default_factory=list)
    ignored: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, values: Mapping[str, Any], source: Path) -> Self:
        """The keys of one experiment; raises ConfigError for a key that the original refuses too."""
        if "model" in values and "stages" in values:
            raise ConfigError(f"{source} is a configuration of ours already; run it: python jobs/finetune.py {source}")
        known = [*CONVERTED_KEYS, *IGNORED_KEYS]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
                raise ConfigError(
                    f"{source}: the original knows no key {key!r}; did you mean {near[0]!r}? Else leave it out"
                )
        return cls(values, source)

    def change(self, key: str, text: str) -> None:
        """Note what became of `key`."""
        self.changed.append((key, text))

    def ignore(self, key: str, text: str) -> None:
        """Note why `key` has no effect."""
        self.ignored.append((key, text))

    def has(self, key: str) -> bool:
        """Whether it is there and not null."""
        return self.values.get(key) is not None

    def text(self, key: str) -> str:
        """A text that must be there."""
        value = self.values.get(key)
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(
                f"{self.source}: expected {key} to be a path or a name, got {value!r}; write it into the file"
            )
        return value.strip()

    def number(self, key: str, default: float) -> float:
        """A finite number; `2e-3` is a text to YAML and a number to the original."""
        value = self.values.get(key, default)
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(f"{self.source}: expected {key} to be a number, got {value!r}")
        return number

    def whole(self, key: str, default: int, *, least: int = 1) -> int:
        """A whole number."""
        number = self.number(key, default)
        if number != int(number) or number < least:
            raise ConfigError(f"{self.source}: expected {key} to be a whole number of at least {least}, got {number:g}")
        return int(number)

    def flag(self, key: str) -> bool:
        """A switch, off where it is missing."""
        value = self.values.get(key)
        known = {None: False, "true": True, "false": False}
        if not isinstance(value, bool | None) and str(value).lower() not in known:
            raise ConfigError(f"{self.source}: expected {key} to be true or false, got {value!r}")
        return value if isinstance(value, bool) else known[None if value is None else str(value).lower()]
