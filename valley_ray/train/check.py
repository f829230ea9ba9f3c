"""What is said before any worker starts: configurations that cannot work, each with its fix, and warnings.

Reads files of the model folder and of the data, never a whole weight; knows no Ray. `--check` of the training jobs
(report.py) says more.
"""

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from valley_ray.config import validate_config
from valley_ray.errors import CheckpointError, ConfigError
from valley_ray.train.check_data import check_batch as check_batch
from valley_ray.train.check_data import check_data
from valley_ray.train.check_data import check_draws as check_draws
from valley_ray.train.check_data import pipeline_config as pipeline_config
from valley_ray.train.config import TrainConfig
from valley_ray.train.places import check_places
from valley_ray.train.stage_config import StageConfig

if TYPE_CHECKING:
    from valley_ray.model.config import ValleyConfig
    from valley_ray.processor import ValleyProcessor

MODEL_FILE = "config.json"
PROJECTOR = "core.mm_projector."

LANGUAGE_PARTS = frozenset(("layers", "language_model", "lm_head", "lora"))
"""Parts by which a stage is a second one: it teaches the language model to read what the projector says."""


def check_run(config: TrainConfig) -> tuple[str, ...]:
    """Refuse what cannot work on this machine's files; returns warnings.

    Raises:
        ConfigError: with the setting, what came and the fix.
        CheckpointError: the model folder, its tower or its processor cannot be opened.
    """
    check_folders(config)
    check_places(config)
    if config.trackers:
        from valley_ray.train.trackers import check_trackers

        check_trackers(config.trackers)
    model_config = _check_model(config)
    processor = _check_processor(config)
    check_data(config, processor)
    check_parts(config, model_config)
    if config.evaluation is not None:
        from valley_ray.evaluate.evaluation import check_split

        check_split(config.evaluation)
    return (*_check_projector(config), *_adapter_warnings(config))


def check_folders(config: TrainConfig) -> None:
    """Refuse a model folder that is none, and an output that would be lost."""
    if not (config.model / MODEL_FILE).is_file():
        raise ConfigError(
            f"model={str(config.model)!r} is no model folder (no {MODEL_FILE} in it); make or copy one there"
        )
    if config.output.resolve() == config.model.resolve():
        raise ConfigError(f"output and model are the same folder {str(config.model)!r}; name another output")
    if config.output.is_file():
        raise ConfigError(f"output={str(config.output)!r} is a file; name a folder")
    if config.output.exists() and not (config.output / MODEL_FILE).is_file() and any(config.output.iterdir()):
        raise ConfigError(f"output={str(config.output)!r} holds something else than a model; name another folder")


def check_parts(config: TrainConfig, model_config: "ValleyConfig") -> None:
    """Refuse stages that train what the model does not have, adapters that fit neither it nor ZeRO, and packing of
    samples that cannot share a row."""
    if any("lora" in stage.parts for stage in config.stages):
        _check_adapter(config)
    from valley_ray.train.attention import check_packable
    from valley_ray.train.forecast import meta_model, trained_groups

    for stage in config.stages:
        model = meta_model(model_config, config, stage)
        trained_groups(model, stage)
        if config.pack_tokens is not None:
            check_packable(model.core)


def _check_adapter(config: TrainConfig) -> None:
    from valley_ray.model.lora import LoraSettings

    settings = validate_config(LoraSettings, config.lora or {}, source="lora")
    if settings.quantize is None:
        return
    quantized = f"lora.quantize={settings.quantize}"
    if config.zero_stage == 3:
        raise ConfigError(
            f"{quantized} does not go with zero_stage=3, which divides weights that are numbers, not 4-bit codes; take "
            "zero_stage=2, or leave quantize out"
        )
    for stage in config.stages:
        if "lora" in stage.parts and (under := sorted(stage.parts & {"layers", "language_model"})):
            raise ConfigError(
                f"stage {stage.name} trains {', '.join(under)}, whose weights {quantized} rounds; leave one of them out"
            )
    if not has_package("bitsandbytes"):
        raise ConfigError(f"{quantized} needs bitsandbytes, which is not installed; pip install 'valley-ray[qlora]'")


def _adapter_warnings(config: TrainConfig) -> Iterator[str]:
    if not any("lora" in stage.parts for stage in config.stages):
        return
    for stage in config.stages:
        if outside := sorted(stage.parts & {"layers", "lm_head", "language_model", "tower"}):
            yield (
                f"no adapter folder is written, the model folder alone: stage {stage.name} trains "
                f"{', '.join(outside)}, which an adapter does not hold"
            )
            return


def has_package(name: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(name) is not None


def _check_model(config: TrainConfig) -> "ValleyConfig":
    from valley_ray.model.checkpoint import read_model_config

    try:
        model_config = read_model_config(config.model)
    except CheckpointError as error:
        if "no Valley model folder" not in str(error):
            raise
        raise CheckpointError(
            f"{error}; put it and a tower together: valley-ray compose --tower TOWER --language-model {config.model} "
            "--output FOLDER, and train FOLDER"
        ) from error
    if model_config.splice != "strict":
        raise ConfigError(
            f"{config.model / MODEL_FILE}: splice={model_config.splice!r} puts clips into the wrong rows of a batch "
            "(docs/upstream.md, rows 11 and 12) and is for answering only; set it to 'strict' to train"
        )
    return model_config


def _check_processor(config: TrainConfig) -> "ValleyProcessor":
    from valley_ray.chat.conversation import Conversation, Message
    from valley_ray.processor import ValleyProcessor

    processor = ValleyProcessor.from_pretrained(config.model)
    try:
        processor.encode_training(Conversation((Message("user", "?"), Message("assistant", "!"))), [])
    except ConfigError as error:
        raise ConfigError(f"{config.model / 'processor_config.json'}: {error}") from error
    return processor


def _check_projector(config: TrainConfig) -> tuple[str, ...]:
    """Stage 2 reads what stage 1 taught the projector to say.

    A fresh projector has a bias of zeros, which its first step changes: that is how one is told from a trained one,
    whoever made the folder. One with torch's own fresh numbers can only be guessed.
    """
    stage = _first_language_stage(config)
    if stage is None or config.allow_random_projector:
        return ()
    from valley_ray.model.checkpoint import read_weight

    bias = read_weight(config.model, f"{PROJECTOR}bias")
    if bias is None:
        return ()
    if not bias.any():
        raise ConfigError(
            f"stage {stage.name} trains {', '.join(sorted(stage.parts & LANGUAGE_PARTS))} on a projector that no stage "
            f"has trained ({config.model}); train the projector first, in a stage before it or with jobs/pretrain.py, "
            "or set allow_random_projector=true"
        )
    weight: Any = read_weight(config.model, f"{PROJECTOR}weight")
    limit = weight.shape[1] ** -0.5
    if 0.99 * limit < float(weight.abs().max()) <= limit:
        return (
            f"the projector of {config.model} has numbers as torch draws them: if no stage has trained it, put one "
            f"before {stage.name}",
        )
    return ()


def _first_language_stage(config: TrainConfig) -> StageConfig | None:
    """The first stage that trains the language model, unless a stage before it trains the projector."""
    for stage in config.stages:
        if stage.parts & LANGUAGE_PARTS:
            return stage
        if "projector" in stage.parts:
            return None
    return None
