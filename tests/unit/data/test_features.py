"""Features lie row by row beside the shards, as the tower makes them in training, under the tower's own key."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from train_store import clip_values

from valley_ray.config import validate_config
from valley_ray.data import compact
from valley_ray.data.commit import FeatureWriter, ShardWriter
from valley_ray.data.config import PrepareConfig
from valley_ray.data.feature_stage import FeatureStage, open_tower
from valley_ray.data.feature_store import FeatureSet, FeatureStore, feature_sets
from valley_ray.data.frame_store import FrameStore, read_moved, shard_paths
from valley_ray.data.schema import FAILED, OK
from valley_ray.errors import ConfigError, DataError
from valley_ray.media.frames import VideoFrames
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.frozen_tower import tower_key
from valley_ray.model.pooling import MeanPooling
from valley_ray.processor import ValleyProcessor

NUM_CLIPS = 5


def write_shard(directory: Path, number: int = 0, *, failed: int | None = None, side: int = 32) -> str:
    """Clips of 2 to 6 frames of noise; row `failed` has none."""
    directory.mkdir(exist_ok=True)
    name = f"shard-00000-{number:04d}-x.arrow"
    with ShardWriter(directory, name, fingerprint="f") as shard:
        for row in range(NUM_CLIPS):
            values = clip_values(f"{number}-{row}")
            if row == failed:
                shard.append(values | {"status": FAILED, "error_class": "media_empty", "error": "no bytes"}, None)
                continue
            pixels = np.random.default_rng([number, row]).integers(0, 256, (2 + row, side, side, 3), dtype=np.uint8)
            shard.append(values, VideoFrames(pixels, np.zeros(len(pixels))))
    return name


def key_of(model: Path) -> str:
    tower, processor = open_tower(model)
    return tower_key(tower.vision_tower, tower.config, image_mean=processor.image_mean, image_std=processor.image_std)


def run_stage(
    model: Path, directory: Path, *shards: str, form: str = "full", dtype: str = "float32", batch_frames: int = 7
) -> tuple[FeatureStore, list[dict[str, str]]]:
    features = FeatureSet(key_of(model), form, dtype)
    (directory / features.name).mkdir(exist_ok=True)
    stage = FeatureStage(model, directory, features, batch_frames=batch_frames)
    statuses = stage(pa.table({"shard": list(shards)})).to_pylist()
    return FeatureStore(directory, [features]), statuses


def expected(model: Path, directory: Path, shard: str, row: int) -> torch.Tensor:
    """What training computes from the frames."""
    valley = ValleyForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    processor = ValleyProcessor.from_pretrained(model)
    return valley.encode_clips([processor.pixel_values(FrameStore(directory).frames(shard, row))])[0]


@pytest.mark.parametrize("batch_frames", [1, 7, 1000])
def test_full_features_are_those_of_training_bit_for_bit(tmp_path: Path, tiny_valley: Path, batch_frames: int) -> None:
    name = write_shard(tmp_path)
    store, statuses = run_stage(tiny_valley, tmp_path, name, batch_frames=batch_frames)
    assert [status["status"] for status in statuses] == [OK] * NUM_CLIPS
    for row in range(NUM_CLIPS):
        features = store.features(name, row)
        assert features is not None
        assert features.shape == (2 + row, 17, 32)
        torch.testing.assert_close(torch.tensor(features), expected(tiny_valley, tmp_path, name, row), rtol=0, atol=0)


def test_pooled_features_are_the_rows_of_mean_pooling_and_half_as_large_as_float16(
    tmp_path: Path, tiny_valley: Path
) -> None:
    name = write_shard(tmp_path)
    exact, _ = run_stage(tiny_valley, tmp_path, name, form="pooled")
    half, _ = run_stage(tiny_valley, tmp_path, name, form="pooled", dtype="float16")
    for row in range(NUM_CLIPS):
        rows = MeanPooling().rows(expected(tiny_valley, tmp_path, name, row))
        features, small = exact.features(name, row), half.features(name, row)
        assert features is not None
        assert small is not None
        assert features.shape == (16 + 2 + row, 32)
        torch.testing.assert_close(torch.tensor(features), rows, rtol=0, atol=0)
        assert small.nbytes == features.nbytes // 2
        # Half the distance of two neighbours of float16.
        np.testing.assert_allclose(small.astype(np.float32), features, rtol=2**-11, atol=2**-25)
        torch.testing.assert_close(MeanPooling().rows(rows), rows, rtol=0, atol=0)


def test_failed_clips_keep_their_row_and_have_no_features(tmp_path: Path, tiny_valley: Path) -> None:
    names = [write_shard(tmp_path, 0, failed=2), write_shard(tmp_path, 1, side=16)]
    store, statuses = run_stage(tiny_valley, tmp_path, *names)
    assert [status["clip_id"] for status in statuses] == [f"{n}-{row}" for n in range(2) for row in range(NUM_CLIPS)]
    assert [status["error_class"] for status in statuses] == ["", "", "media_empty", "", ""] + ["media_error"] * 5
    assert [store.features(names[0], row) is None for row in range(NUM_CLIPS)] == [False, False, True, False, False]
    torch.testing.assert_close(
        torch.tensor(store.features(names[0], 3)), expected(tiny_valley, tmp_path, names[0], 3), rtol=0, atol=0
    )


def test_features_too_large_for_their_format_are_a_failure_with_its_class(
    tmp_path: Path, tiny_valley: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from valley_ray.model.frozen_tower import FrozenTower

    real = FrozenTower.encode_frames
    monkeypatch.setattr(FrozenTower, "encode_frames", lambda self, pixels: 1e6 * real(self, pixels))
    name = write_shard(tmp_path)
    _, statuses = run_stage(tiny_valley, tmp_path, name, dtype="float16")
    assert {status["error_class"] for status in statuses} == {"features_out_of_range"}
    _, statuses = run_stage(tiny_valley, tmp_path, name, dtype="float32")
    assert {status["status"] for status in statuses} == {OK}


def test_a_file_that_is_there_is_not_made_again(tmp_path: Path, tiny_valley: Path) -> None:
    name = write_shard(tmp_path)
    run_stage(tiny_valley, tmp_path, name)
    path = next(tmp_path.glob("features-*")) / name
    before = path.stat().st_mtime_ns
    run_stage(tiny_valley, tmp_path, name)
    assert path.stat().st_mtime_ns == before
    assert [one.name for one in path.parent.iterdir()] == [name], "nothing is left beside it"


def test_the_key_follows_weights_layer_and_colours_and_not_the_format_of_the_file(
    tmp_path: Path, tiny_valley: Path
) -> None:
    valley = ValleyForConditionalGeneration.from_pretrained(tiny_valley, dtype=torch.float32)
    processor = ValleyProcessor.from_pretrained(tiny_valley)
    colours = {"image_mean": processor.image_mean, "image_std": processor.image_std}
    key = tower_key(valley.vision_tower, valley.config, **colours)
    assert key == key_of(tiny_valley)
    valley.core.mm_projector.weight.data += 1
    assert tower_key(valley.vision_tower, valley.config, **colours) == key, "the rest of the model decides nothing"
    assert tower_key(valley.vision_tower, valley.config, **colours | {"image_mean": (0.5, 0.5, 0.5)}) != key
    valley.config.vision_layer = -1
    assert tower_key(valley.vision_tower, valley.config, **colours) != key
    valley.config.vision_layer = -2
    weight = next(valley.vision_tower.parameters())
    weight.data.view(-1)[0] = torch.nextafter(weight.data.view(-1)[0], torch.tensor(9.0))
    assert tower_key(valley.vision_tower, valley.config, **colours) != key, "one weight by one bit"
    coarse = ValleyForConditionalGeneration.from_pretrained(tiny_valley, dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        coarse.to(dtype).save_pretrained(tmp_path / str(dtype))
        processor.save_pretrained(tmp_path / str(dtype))
    assert key_of(tmp_path / "torch.bfloat16") == key_of(tmp_path / "torch.float32") != key


def test_features_merge_with_their_shards_and_are_found_by_old_and_new_names(tmp_path: Path, tiny_valley: Path) -> None:
    names = [write_shard(tmp_path, number) for number in range(3)]
    bare = write_shard(tmp_path, 9)
    reader, _ = run_stage(tiny_valley, tmp_path, *names)
    want = {(name, row): reader.features(name, row).copy() for name in names for row in range(NUM_CLIPS)}
    assert compact.compact(tmp_path).num_merged == 3, "a shard without features is not mixed with those that have some"
    assert bare in {path.name for path in shard_paths(tmp_path)}
    fresh, moved = FeatureStore(tmp_path, reader.sets), read_moved(tmp_path)
    for (name, row), features in want.items():
        merged, first_row = moved[name]
        for found in (reader.features(name, row), fresh.features(name, row), fresh.features(merged, first_row + row)):
            np.testing.assert_array_equal(found, features)
    assert fresh.features(bare, 0) is None
    assert len(list((tmp_path / reader.sets[0].name).iterdir())) == 1


def test_a_model_takes_the_exact_and_the_small_first_and_pooled_rows_only_if_it_can(tmp_path: Path) -> None:
    for key, form, dtype in (("a", "pooled", "float16"), ("a", "full", "float32"), ("b", "pooled", "float32")):
        (tmp_path / FeatureSet(key, form, dtype).name).mkdir()
    (tmp_path / "features-of-somebody-else").mkdir()
    assert len(feature_sets(tmp_path)) == 3
    found = FeatureStore.of_tower(tmp_path, "a", takes_pooled=True)
    assert found is not None
    assert [(one.form, one.dtype) for one in found.sets] == [("full", "float32"), ("pooled", "float16")]
    assert FeatureStore.of_tower(tmp_path, "b", takes_pooled=False) is None
    assert FeatureStore.of_tower(tmp_path, "c", takes_pooled=True) is None


def test_a_damaged_file_says_so(tmp_path: Path, tiny_valley: Path) -> None:
    name = write_shard(tmp_path)
    reader, _ = run_stage(tiny_valley, tmp_path, name)
    (tmp_path / reader.sets[0].name / name).write_bytes(b"short")
    with pytest.raises(DataError, match="cannot map"):
        reader.features(name, 0)


def test_features_of_no_model_are_refused() -> None:
    values = {"sources": [{"path": "x"}], "output": "y", "features": "pooled"}
    with pytest.raises(ConfigError, match="needs model"):
        validate_config(PrepareConfig, values, source="test")


def test_pooled_features_of_clip_l_take_fewer_bytes_than_its_frames(tmp_path: Path) -> None:
    num_clips, frames, patches, width = 4, 8, 256, 1024
    shapes = {"pooled": (patches + frames, width), "full": (frames, 1 + patches, width)}
    sizes = {}
    for form, shape in shapes.items():
        with FeatureWriter(tmp_path, form) as writer:
            for row in range(num_clips):
                values = {"clip_id": str(row), "status": OK, "error_class": "", "error": ""}
                writer.append(values, np.zeros(shape, np.float16))
        sizes[form] = (tmp_path / form).stat().st_size / num_clips
    in_file = 2_000  # Arrow's description of a batch, and of the file
    assert sizes["pooled"] == pytest.approx(540_672, abs=in_file)
    assert sizes["full"] == pytest.approx(4_210_688, abs=in_file)
    assert sizes["pooled"] < frames * 224 * 224 * 3 / 2
