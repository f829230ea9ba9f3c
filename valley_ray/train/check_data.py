"""What is said of a run's data before any worker starts: files and windows that are not there, batches and weights that
they cannot fill. Reads files of the store and no record; knows no Ray."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from valley_ray.config import validate_config
from valley_ray.data.config import PipelineConfig
from valley_ray.data.shards import STORE_FILE, WindowManifest, WindowStore
from valley_ray.errors import ConfigError
from valley_ray.train.config import TrainConfig
from valley_ray.train.order import check_weights
from valley_ray.train.plan import StagePlan

if TYPE_CHECKING:
    from valley_ray.processor import ValleyProcessor


def check_data(config: TrainConfig, processor: "ValleyProcessor") -> None:
    """Refuse data that cannot be trained on, by the names of their settings.

    Raises:
        ConfigError: with the setting, what came and the fix.
        DataError: a window is damaged.
    """
    settings = pipeline_config(config)
    if settings is None:
        _check_store(config, processor)
        return
    from valley_ray.media.preprocess import check_one_size

    check_one_size(video_crop=processor.video_crop, image_crop=processor.image_crop)
    for path in settings.records:
        if not path.is_file():
            raise ConfigError(f"data.pipeline.records: {path} is not there; check the path")
    for folder in settings.media_root:
        if not folder.is_dir():
            raise ConfigError(f"data.pipeline.media_root: {folder} is no folder; check the path")
    check_weights(config.data.weights, dict.fromkeys(settings.source_names, 0))


def pipeline_config(config: TrainConfig) -> PipelineConfig | None:
    """The settings of the data pipeline beside the training; None in mode shards.

    Raises:
        ConfigError: a setting that the pipeline does not know or take, or another model than the training's.
    """
    if config.data.mode != "overlap":
        return None
    values = {"model": config.model, **(config.data.pipeline or {})}
    settings = validate_config(PipelineConfig, values, source="data.pipeline")
    if settings.model.resolve() != config.model.resolve():
        raise ConfigError(f"data.pipeline.model={str(values['model'])!r} differs from {config.model=!s}; leave it out")
    return settings


def check_batch(config: TrainConfig, num_samples: int, *, what: str) -> None:
    """Refuse a batch that is larger than the data; `what` says what the samples are."""
    if not num_samples:
        raise ConfigError(f"there is nothing to train on: 0 {what}; give data")
    if num_samples < config.global_batch_size:
        raise ConfigError(
            f"global_batch_size={config.global_batch_size} is larger than the data, {num_samples} {what}; lower it"
        )


def check_draws(config: TrainConfig, sources: Mapping[str, int]) -> None:
    """Refuse weights by which a stage draws no sample at all from so many rows of each source."""
    for number, stage in enumerate(config.stages):
        if sources and not StagePlan.of_stage(config, number).num_steps(sources):
            raise ConfigError(
                f"data.weights draw no sample in {stage.epochs} epochs of stage {stage.name}; raise one of the two"
            )


def _check_store(config: TrainConfig, processor: "ValleyProcessor") -> None:
    folder = config.data.windows_dir
    assert folder is not None, "mode shards has a windows_dir"
    store = WindowStore(folder)
    manifests = store.committed()
    if not manifests or not manifests[-1].is_last:
        raise ConfigError(
            f"data.windows_dir={str(folder)!r} holds {len(manifests)} windows and no last one; run the data pipeline "
            f"to its end, or set data.mode=overlap{_stores_below(folder)}"
        )
    info = store.info()
    if info is None:
        raise ConfigError(f"data.windows_dir={str(folder)!r} has lost its {STORE_FILE}; run the data pipeline again")
    if info.parts.get("processor") != processor.fingerprint:
        raise ConfigError(
            f"the windows in {str(folder)!r} were made with another processor than that of {str(config.model)!r}; run "
            "the data pipeline with this model"
        )
    there = os.listdir(store.shards_dir) if store.shards_dir.is_dir() else ()
    lost = {name for manifest in manifests for name in manifest.shards} - set(there)
    if lost:
        raise ConfigError(
            f"{len(lost)} shards of the windows in {str(folder)!r} are gone ({min(lost)} is one); run the data "
            "pipeline again"
        )
    check_weights(config.data.weights, info.sources)
    check_draws(config, info.sources)
    _check_samples(config, store, manifests)


def _check_samples(config: TrainConfig, store: WindowStore, manifests: Sequence[WindowManifest]) -> None:
    num_ok = sum(manifest.num_ok for manifest in manifests)
    if not num_ok:
        reasons = sum((Counter(manifest.by_error_class) for manifest in manifests), Counter[str]())
        said = ", ".join(f"{count} {name}" for name, count in reasons.most_common(3)) or "none is named"
        raise ConfigError(f"no sample of {store.directory} is usable: {said}; prepare the data again")
    check_batch(config, num_ok, what="ok samples")
    if config.pack_tokens is None:
        return
    tokens = np.concatenate([window.num_tokens[window.is_ok] for window in map(store.read, manifests)])
    if tokens.min() > config.pack_tokens:
        raise ConfigError(f"the shortest sample has {tokens.min()} tokens, pack_tokens={config.pack_tokens}; raise it")
    num_short = int((tokens <= config.pack_tokens).sum())
    check_batch(config, num_short, what=f"samples of at most pack_tokens={config.pack_tokens} tokens")


def _stores_below(folder: Path) -> str:
    """Names a store where the folder of a prepared data set was given instead."""
    found = sorted(path.parent for path in folder.glob("windows/*/store.json"))
    return f"; did you mean {str(found[-1])!r}?" if found else ""
