"""A tower runs over all clips once, on actors that may die; training then takes its features and gives the same."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from data_clips import turns, write_clip, write_records
from tiny import make_tiny_valley

from valley_ray.data.config import PrepareConfig
from valley_ray.data.feature_stage import FeatureStage
from valley_ray.data.feature_store import FeatureStore, feature_sets
from valley_ray.data.features import feature_set, make_features, missing_features
from valley_ray.data.frame_store import FrameStore, shard_paths
from valley_ray.data.prepare import PrepareSummary, prepare
from valley_ray.data.shards import WindowStore
from valley_ray.errors import CheckpointError, ConfigError
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.processor import ValleyProcessor
from valley_ray.train.config import DataConfig, TrainConfig
from valley_ray.train.metrics import read_metrics
from valley_ray.train.stage_config import StageConfig
from valley_ray.train.trainer import train

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("data_cluster")]

NUM_CLIPS = 10
EXACT = {"features": "full", "features_dtype": "float32"}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten clips and a broken one, with a question each."""
    folder = tmp_path_factory.mktemp("records")
    for index in range(NUM_CLIPS):
        write_clip(folder / f"{index}.mp4", brightness=20 * index)
    (folder / "bad.mp4").write_bytes(b"not a video")
    names = [*(f"{index}.mp4" for index in range(NUM_CLIPS)), "bad.mp4"]
    values = [{"id": name, "video": name, "conversations": turns()} for name in names]
    return write_records(folder / "records.json", values)


def settings(records: Path, output: Path, model: Path, **values: Any) -> PrepareConfig:
    sources = ({"path": str(records), "media_root": str(records.parent)},)
    return PrepareConfig(sources=sources, output=output, model=model, block_size=4, window_size=4, **values)


def counts(summary: PrepareSummary) -> tuple[int, int, int]:
    return summary.features_ok, summary.features_failed, summary.features_made


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_valley: Path, records: Path) -> tuple[Path, PrepareSummary]:
    """A folder with exact features of the tiny model, and what was said of it."""
    output = tmp_path_factory.mktemp("prepared") / "out"
    return output, prepare(settings(records, output, tiny_valley, **EXACT))


def test_all_clips_have_features_or_a_reason_and_only_what_is_missing_is_made(
    tmp_path: Path, prepared: tuple[Path, PrepareSummary], tiny_valley: Path, records: Path
) -> None:
    source, made = prepared
    assert counts(made) == (NUM_CLIPS, 1, NUM_CLIPS + 1)
    assert made.rows_in == made.features_ok + made.features_failed
    assert f"features {NUM_CLIPS} ok, 1 failed; {NUM_CLIPS + 1} made" in made.text(source)
    output = tmp_path / "out"
    shutil.copytree(source, output)
    path = shard_paths(output / "shards")[0]
    (output / "shards" / str(made.features_dir) / path.name).write_bytes(b"damaged")
    merged = prepare(settings(records, output, tiny_valley, **EXACT, compact=True))
    assert (merged.clips_decoded, merged.features_ok, merged.features_failed) == (0, NUM_CLIPS, 1)
    assert 0 < merged.features_made < NUM_CLIPS, "one shard's"
    assert len(shard_paths(output / "shards")) == 1
    again = prepare(settings(records, output, tiny_valley, **EXACT))
    assert counts(again) == (NUM_CLIPS, 1, 0), "features have moved with their frames"
    assert again.windows_dir is not None
    check_features(output, again.windows_dir, tiny_valley)


def check_features(output: Path, windows_dir: str, model: Path) -> None:
    """Every clip that a window shows has the features of its own frames."""
    store, processor = WindowStore(output / windows_dir), ValleyProcessor.from_pretrained(model)
    valley = ValleyForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    features, frames = FeatureStore(store.shards_dir, feature_sets(store.shards_dir)), FrameStore(store.shards_dir)
    num_seen = 0
    for manifest in store.committed():
        for clip in (one for clips in store.read(manifest).table["clips"].to_pylist() for one in clips):
            expected = valley.encode_clips([processor.pixel_values(frames.frames(**clip))])[0]
            torch.testing.assert_close(torch.tensor(features.features(**clip)), expected, rtol=0, atol=0)
            num_seen += 1
    assert num_seen == NUM_CLIPS


def test_an_actor_that_is_killed_loses_nothing(
    prepared: tuple[Path, PrepareSummary], tiny_valley: Path, records: Path
) -> None:
    class Dying(FeatureStage):
        """Is killed once, in the middle of a shard."""

        def _encode(self, clips: Any) -> Any:
            if not (self._shards_dir / "died").exists():
                (self._shards_dir / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super()._encode(clips)

    output, _ = prepared
    config = settings(records, output, tiny_valley, features="pooled", feature_actors=1)
    features = feature_set(config)
    assert features is not None
    shards_dir = output / "shards"
    names = missing_features([path.name for path in shard_paths(shards_dir)], shards_dir, features)
    statuses = [one for part in make_features(names, shards_dir, features, config, stage=Dying) for one in part]
    assert (shards_dir / "died").exists()
    assert len(statuses) == len({one["clip_id"] for one in statuses}) == NUM_CLIPS + 1
    assert sum(one["status"] == "ok" for one in statuses) == NUM_CLIPS
    assert missing_features(names, shards_dir, features) == []


def test_another_tower_is_another_set_and_what_cannot_work_is_said_at_once(
    tmp_path: Path, prepared: tuple[Path, PrepareSummary], tiny_valley: Path, records: Path
) -> None:
    output, first = prepared
    other = make_tiny_valley(tmp_path / "other", seed=1)
    second = prepare(settings(records, output, other, features="pooled", feature_actors=1))
    assert (second.clips_decoded, *counts(second)) == (0, NUM_CLIPS, 1, NUM_CLIPS + 1)
    assert str(second.features_dir).split("-")[1] != str(first.features_dir).split("-")[1]
    with pytest.raises(ConfigError, match="feature_gpus=1, Ray has 0"):
        feature_set(settings(records, output, tiny_valley, features="pooled", feature_gpus=1))
    valley = ValleyForConditionalGeneration.from_pretrained(other)
    valley.config.pooling = "max"
    valley.save_pretrained(other)
    with pytest.raises(ConfigError, match="set features=full"):
        feature_set(settings(records, output, other, features="pooled"))
    (other / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        feature_set(settings(records, output, other, features="full"))


@pytest.mark.slow
def test_training_on_stored_features_gives_the_losses_of_training_on_frames(
    tmp_path: Path, prepared: tuple[Path, PrepareSummary], tiny_valley: Path
) -> None:
    output, summary = prepared
    runs = {}
    for features in ("computed", "stored"):
        config = TrainConfig(
            model=tiny_valley,
            output=tmp_path / f"{features}-model",
            storage=tmp_path / "runs",
            run_name=features,
            data=DataConfig(windows_dir=output / str(summary.windows_dir), features=features),
            stages=(StageConfig(name="one", trainable=("projector",), learning_rate=1e-2, epochs=2),),
            global_batch_size=4,
            micro_batch_size=2,
            num_workers=1,
            log_every=1,
            checkpoint_every=None,
            timeout_s=60.0,
        )
        runs[features] = read_metrics(train(config).metrics_path)
    computed, stored = runs["computed"], runs["stored"]
    assert [line.loss for line in stored] == [line.loss for line in computed], "bit by bit"
    assert len(stored) == 5
    assert [line.clips_encoded for line in computed] == [4, 8, 12, 16, 20], "two epochs of ten clips"
    assert {line.clips_encoded for line in stored} == {0}
