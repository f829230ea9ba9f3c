"""The original's experiment YAML (valley/configs/experiment/*.yaml) → a training configuration of ours.

Every key ends in the configuration, among what was changed, or among what was ignored, with the reason: none is lost
silently. Where a key is missing, transformers' default counts, as it does in the original. Knows no torch and no Ray.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from valley_ray.config import validate_config
from valley_ray.errors import ConfigError
from valley_ray.train.config import TrainConfig
from valley_ray.train.upstream_keys import IGNORED_KEYS, Keys

NUM_WORKERS = 8
"""GPUs where nobody says how many: as many as the original's models were trained on."""

SCHEDULES = {"cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
TRACKERS = ("tensorboard", "wandb", "mlflow")


@dataclass(frozen=True)
class Conversion:
    """A configuration of ours and what was made of the keys."""

    values: dict[str, Any]
    """As a YAML file of ours has them; they are valid."""
    changed: tuple[tuple[str, str], ...]
    """Keys that mean something else here, with what became of them."""
    ignored: tuple[tuple[str, str], ...]
    """Keys without effect here, with the reason."""

    def text(self) -> str:
        """The two lists for a terminal."""
        lines = []
        for title, notes in (("changed", self.changed), ("ignored", self.ignored)):
            lines.append(f"{title}:" if notes else f"{title}: nothing")
            width = max((len(key) for key, _ in notes), default=0)
            lines.extend(f"  {key:<{width}}  {reason}" for key, reason in notes)
        return "\n".join(lines)


def convert_upstream(values: Mapping[str, Any], *, source: Path, num_workers: int = NUM_WORKERS) -> Conversion:
    """Convert the keys of one experiment, read from the file `source`, to be run on `num_workers` GPUs.

    Raises:
        ConfigError: a key that must be there is missing, a value is of the wrong kind or cannot be met here, or a key
            looks misspelt.
    """
    keys = Keys.of(values, source)
    stage, run_name = _stage(keys), _run_name(keys)
    ours = {
        "model": keys.text("model_name_or_path"),
        "output": keys.text("output_dir"),
        **({"run_name": run_name} if run_name is not None else {}),
        "data": {"mode": "overlap", "pipeline": _pipeline(keys, run_name or stage["name"])},
        "stages": [stage],
        **_batches(keys, num_workers),
        **_engine(keys),
        **_reporting(keys),
    }
    if stage["name"] == "stage1":
        keys.change(
            "model_name_or_path",
            "must be a Valley folder; from a plain language model: valley-ray compose "
            f"--tower {keys.values.get('vision_tower') or 'TOWER'} --language-model {ours['model']} --output FOLDER",
        )
    validate_config(TrainConfig, ours, source=f"what {source} becomes")
    ignored = [(key, IGNORED_KEYS[key]) for key in values if key in IGNORED_KEYS]
    return Conversion(ours, tuple(keys.changed), (*ignored, *keys.ignored))


def _run_name(keys: Keys) -> str | None:
    """Here it names a folder."""
    if not keys.has("run_name"):
        return None
    given = keys.text("run_name")
    name = re.sub(r"[/\\]+", "-", given).strip(" .-")
    if name != given:
        keys.change("run_name", f"{given} → {name}, the name of the run's folder")
    return name


def _stage(keys: Keys) -> dict[str, Any]:
    lora = keys.flag("lora") or keys.flag("lora_enable")
    freezes, tunes, frozen_projector = map(
        keys.flag, ("freeze_backbone", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter")
    )
    if lora and freezes:
        keys.ignore("freeze_backbone", "with lora the original freezes the language model anyway")
    name = "stage2-lora" if lora else "stage1" if freezes else "stage2"
    stage = {
        "name": name,
        "trainable": _trainable(lora=lora, freezes=freezes, tunes=tunes, frozen_projector=frozen_projector),
        "learning_rate": keys.number("learning_rate", 5e-5),
        **_duration(keys),
        "warmup_ratio": keys.number("warmup_ratio", 0.0),
        "schedule": _schedule(keys),
        "weight_decay": keys.number("weight_decay", 0.0),
        "betas": [keys.number("adam_beta1", 0.9), keys.number("adam_beta2", 0.999)],
        "eps": keys.number("adam_epsilon", 1e-8),
        "max_grad_norm": keys.number("max_grad_norm", 1.0) or None,
    }
    if stage["trainable"] == ["lm_head"]:
        keys.change("tune_mm_mlp_adapter", "off beside freeze_backbone, the original trains the output head alone")
    if frozen_projector and not lora and not freezes:
        keys.change("freeze_mm_mlp_adapter", "add the part temporal where the model's pooling has weights")
    if not keys.has("learning_rate"):
        keys.change("learning_rate", "missing: transformers' default, 5e-05")
    return stage


def _trainable(*, lora: bool, freezes: bool, tunes: bool, frozen_projector: bool) -> list[str]:
    """What the original's switches leave with a gradient (parity note 21), as a preset or as parts."""
    preset = "valley-stage2-lora" if lora else "valley-stage1" if freezes else "valley-stage2"
    if tunes and not frozen_projector:
        return [preset]
    if lora:
        return ["embeddings", "lora"] if tunes else ["lora"]
    if freezes:
        return ["embeddings"] if tunes else ["lm_head"]
    head = [] if tunes else ["lm_head"]
    return ["embeddings", "layers", *head] if frozen_projector else [preset, *head]


def _duration(keys: Keys) -> dict[str, int]:
    if keys.flag("fast_epoch"):
        keys.change("fast_epoch", "ten records for a trial: set max_steps of the stage instead of epochs")
    if (max_steps := keys.whole("max_steps", -1, least=-1)) > 0:
        if keys.has("num_train_epochs"):
            keys.ignore("num_train_epochs", "max_steps says how long")
        return {"max_steps": max_steps}
    return {"epochs": keys.whole("num_train_epochs", 3)}


def _schedule(keys: Keys) -> str:
    name = str(keys.values.get("lr_scheduler_type", "linear"))
    if name not in SCHEDULES:
        keys.change("lr_scheduler_type", f"{name} → cosine; there are cosine and constant")
    elif name == "constant" and keys.number("warmup_ratio", 0.0) > 0:
        keys.change("lr_scheduler_type", "constant: warmup_ratio counts here, transformers' constant has no warm-up")
    return SCHEDULES.get(name, "cosine")


def _pipeline(keys: Keys, name: str) -> dict[str, Any]:
    records, roots = [], []
    for path_key, folder_key in (("data_path", "image_folder"), ("video_data_path", "video_folder")):
        if not keys.has(path_key):
            if keys.has(folder_key):
                keys.ignore(folder_key, f"there is no {path_key}")
            continue
        records.append(keys.text(path_key))
        if keys.has(folder_key):
            roots.append(keys.text(folder_key))
        else:
            roots.append(str(Path(records[-1]).parent))
            keys.change(folder_key, f"missing: media are looked for beside {path_key}")
    if not records:
        raise ConfigError(f"{keys.source}: neither data_path nor video_data_path is set; there is nothing to train on")
    return {"records": records, "media_root": roots, "windows_dir": f"runs/windows/{name}"}


def _batches(keys: Keys, num_workers: int) -> dict[str, Any]:
    size = keys.whole("per_device_train_batch_size", 8)
    accumulated = keys.whole("gradient_accumulation_steps", 1)
    total = size * accumulated * num_workers
    keys.change(
        "per_device_train_batch_size",
        f"{size} on each of {num_workers} GPUs, accumulated {accumulated}: global_batch_size={total}, which stays the "
        "same for any num_workers; --num-workers says how many GPUs the file was written for",
    )
    return {"global_batch_size": total, "micro_batch_size": size, "num_workers": num_workers, "use_gpu": True}


def _engine(keys: Keys) -> dict[str, Any]:
    if keys.flag("fp16") and keys.flag("bf16"):
        raise ConfigError(f"{keys.source}: fp16 and bf16 are both on; switch one of them off")
    values: dict[str, Any] = {
        "precision": "fp16" if keys.flag("fp16") else "bf16" if keys.flag("bf16") else "fp32",
        "gradient_checkpointing": keys.flag("gradient_checkpointing"),
    }
    if not keys.has("deepspeed"):
        keys.change("deepspeed", "missing: zero_stage=0, plain data parallelism as torchrun's")
        return {"zero_stage": 0} | values
    zero = _deepspeed(keys)
    if isinstance(zero.get("offload_optimizer"), Mapping) and zero["offload_optimizer"].get("device") == "cpu":
        values["offload"] = True
    if "offload_param" in zero:
        keys.change("deepspeed", "offload_param: weights stay on the GPU; optimizer state alone is offloaded")
    return {"zero_stage": zero.get("stage", 0)} | values


def _deepspeed(keys: Keys) -> Mapping[str, Any]:
    """`zero_optimization` of the file that `deepspeed` names, or what its name tells where it is out of reach."""
    name = keys.text("deepspeed")
    for folder in (Path(), *keys.source.absolute().parents):
        path = folder / name
        if path.is_file():
            try:
                zero = json.loads(path.read_text(encoding="utf-8")).get("zero_optimization", {})
            except (ValueError, AttributeError) as error:
                raise ConfigError(f"{path}: expected a DeepSpeed configuration as JSON ({error})") from error
            keys.change("deepspeed", "zero_stage and offload are taken over; sizes of buckets are chosen here")
            return zero if isinstance(zero, Mapping) else {}
    found = re.search(r"zero_?([0-3])", Path(name).name)
    if found is None:
        raise ConfigError(f"{keys.source}: deepspeed={name!r} is not there, and its name does not tell the ZeRO stage")
    keys.change("deepspeed", f"zero_stage={found[1]}, as the file's name says; the file itself is not there")
    return {"stage": int(found[1])}


def _reporting(keys: Keys) -> dict[str, Any]:
    values: dict[str, Any] = {"log_every": keys.whole("logging_steps", 500)}
    strategy = str(keys.values.get("save_strategy", "steps")).lower()
    if strategy in ("no", "false"):
        values["checkpoint_every"] = None
        if keys.has("save_steps"):
            keys.ignore("save_steps", f"save_strategy is {strategy}: no checkpoints; set checkpoint_every to have some")
    else:
        values["checkpoint_every"] = keys.whole("save_steps", 500)
        if strategy == "epoch":
            keys.change("save_strategy", f"epoch: every {values['checkpoint_every']} steps (save_steps)")
    if keys.has("save_total_limit"):
        values["keep_checkpoints"] = keys.whole("save_total_limit", 2)
    given = keys.values.get("report_to") or ()
    names = [str(one) for one in ([given] if isinstance(given, str) else given)]
    values["trackers"] = [name for name in names if name in TRACKERS]
    if unknown := [name for name in names if name not in (*TRACKERS, "none")]:
        keys.ignore("report_to", f"{', '.join(unknown)}: there are {', '.join(TRACKERS)}")
    if keys.has("seed"):
        values["seed"] = keys.whole("seed", 0, least=0)
    if keys.flag("group_by_length") or keys.flag("group_by_modality_length"):
        values["length_grouping"] = True
    return values
