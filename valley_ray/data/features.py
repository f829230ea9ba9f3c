"""Shards → features of their clips beside them, on a pool of actors that hold the tower: once for every training.

A shard is the unit of work: its file of features is there whole or not at all, so a lost actor costs at most the
shards under way and a stopped run is gone on with. Needs a connected Ray; laid out as feature_store.py says.
"""

import collections
import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayError

from valley_ray.data.config import PrepareConfig
from valley_ray.data.execution import error_of_user
from valley_ray.data.feature_stage import FeatureStage, open_tower
from valley_ray.data.feature_store import FeatureSet, read_statuses
from valley_ray.data.frame_store import map_table
from valley_ray.data.metrics import DecodeProgress
from valley_ray.data.schema import FAILED, OK
from valley_ray.data.windows import Outcome
from valley_ray.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

Statuses = Sequence[dict[str, Any]]
"""clip_id, status and error_class of each clip of a shard."""


@dataclasses.dataclass(frozen=True)
class FeatureCounts:
    """What came of the clips of a run; all of them are in `ok` or `failed`."""

    dir: str | None = None
    """Folder of the set, in that of the shards; None where none was asked for."""
    ok: int = 0
    failed: int = 0
    made: int = 0
    """Rows of features that this run made."""


def features_of_clips(
    outcomes: Mapping[str, Outcome], shards_dir: Path, features: FeatureSet | None, config: PrepareConfig
) -> FeatureCounts:
    """Make what is missing of the features of decoded clips (`outcomes` by clip_id), and count. Raises as below."""
    if features is None:
        return FeatureCounts()
    places = {clip_id: (outcome["shard"], outcome["row"]) for clip_id, outcome in outcomes.items()}
    shards = list(dict.fromkeys(shard for shard, _ in places.values() if shard is not None))
    missing = missing_features(shards, shards_dir, features)
    num_made, num_rows = 0, sum(map_table(shards_dir / shard).num_rows for shard in missing)
    progress = DecodeProgress(num_rows, 0, what="features")
    with contextlib.closing(progress), contextlib.closing(make_features(missing, shards_dir, features, config)) as made:
        for statuses in made:
            num_made += len(statuses)
            progress.count(statuses)
    found = collections.Counter(status_of_clips(places, shards_dir, features).values())
    return FeatureCounts(features.name, found[OK], found[FAILED], num_made)


def feature_set(config: PrepareConfig) -> FeatureSet | None:
    """The set that `config` asks for, after its tower was opened in a worker; None where it asks for none.

    Raises:
        CheckpointError: the model folder cannot be opened, or its processor does not fit.
        ConfigError: pooled features for another pooling than mean, or more GPUs than there are.
    """
    if config.features == "off":
        return None
    assert config.model is not None, "features are of a model's tower"
    if (have := ray.cluster_resources().get("GPU", 0.0)) < config.feature_gpus:
        raise ConfigError(f"feature_gpus={config.feature_gpus:g}, Ray has {have:g}; set it to 0 for the CPU")
    task = ray.remote(_key_of).options(num_cpus=config.feature_cpus, max_retries=config.task_retries)
    try:
        key = ray.get(task.remote(config.model.absolute(), config.features))
    except RayError as error:
        raise error_of_user(error, settings="sandbox.memory_bytes") or error from None
    return FeatureSet(key, config.features, config.features_dtype)


def missing_features(shards: Iterable[str], shards_dir: Path, features: FeatureSet) -> list[str]:
    """Those of `shards` without a whole file of features; what a writer left that did not end by itself is removed."""
    directory = shards_dir / features.name
    directory.mkdir(exist_ok=True)
    for path in directory.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    return [name for name in shards if not _is_there(directory / name, shards_dir / name)]


def make_features(
    shards: Sequence[str],
    shards_dir: Path,
    features: FeatureSet,
    config: PrepareConfig,
    *,
    stage: type[FeatureStage] = FeatureStage,
) -> Generator[Statuses, None, None]:
    """Make the files of features of `shards`; yields what came of each one's clips, about in order.

    Raises:
        StorageError: a worker could not write.
        DataError: actors died, or nodes ran out of memory, more often than they may.
    """
    if not shards:
        return
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with ray.data.DataContext.current(context), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        made = ray.data.from_blocks([pa.table({"shard": [name]}) for name in shards]).map_batches(
            stage,
            fn_constructor_args=(config.model, shards_dir.absolute(), features),
            fn_constructor_kwargs={
                "batch_frames": config.feature_batch_frames,
                "device": "cuda" if config.feature_gpus else "cpu",
            },
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=config.feature_cpus,
            num_gpus=config.feature_gpus,
            compute=ray.data.ActorPoolStrategy(size=_num_actors(config, len(shards))),
            max_task_retries=config.task_retries,
        )
    try:
        for batch in made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield batch.to_pylist()
    except RayError as error:
        raise error_of_user(error, settings="feature_actors or feature_batch_frames") or error from None


def status_of_clips(
    places: Mapping[str, tuple[str | None, int]], shards_dir: Path, features: FeatureSet
) -> dict[str, str]:
    """clip_id → status of its features, for clips at `places` (shard, row); failed for those that have no place."""
    found, files = {}, {}
    for clip_id, (shard, row) in places.items():
        if shard is None:
            found[clip_id] = FAILED
            continue
        if shard not in files:
            files[shard] = read_statuses(shards_dir / features.name / shard)
        assert files[shard]["clip_id"][row] == clip_id, f"row {row} of {features.name}/{shard} is not {clip_id}"
        found[clip_id] = files[shard]["status"][row]
    return found


def _key_of(model: Path, form: str) -> str:
    """The key of a model folder's tower, if features of that form are of use to it."""
    from valley_ray.answering import check_fit
    from valley_ray.model.frozen_tower import tower_key

    tower, processor = open_tower(model)
    check_fit(tower.config, processor)
    if form == "pooled" and tower.config.pooling != "mean":
        raise ConfigError(f"features=pooled is for mean pooling, {model} has {tower.config.pooling}; set features=full")
    return tower_key(tower.vision_tower, tower.config, image_mean=processor.image_mean, image_std=processor.image_std)


def _is_there(path: Path, shard: Path) -> bool:
    """Whether the features of a shard are, whole; a damaged file is set aside and made again."""
    if not path.exists():
        return False
    try:
        if len(read_statuses(path)["clip_id"]) == map_table(shard).num_rows:
            return True
        reason = "it has not as many rows as its shard"
    except DataError as error:
        reason = str(error)
    logger.warning("set aside as %s.damaged: %s", path.name, reason)
    path.rename(path.with_name(f"{path.name}.damaged"))
    return False


def _num_actors(config: PrepareConfig, num_shards: int) -> int:
    if config.feature_actors is not None:
        return min(config.feature_actors, num_shards)
    have = ray.cluster_resources()
    kind, each = ("GPU", config.feature_gpus) if config.feature_gpus else ("CPU", config.feature_cpus)
    return max(1, min(int(have.get(kind, 0.0) / each), num_shards))
