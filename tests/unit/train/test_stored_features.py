"""Training from features beside the shards gives what training from frames gives, and never runs the tower."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from train_store import make_store

from valley_ray.data.feature_stage import FeatureStage
from valley_ray.data.feature_store import FeatureSet, FeatureStore
from valley_ray.data.frame_store import shard_paths
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.processor import ValleyProcessor
from valley_ray.train.feed import FeatureCache, Feeder, FeedSettings, SampleIndex
from valley_ray.train.plan import StagePlan

FIRST_LOSS_TOLERANCE = 1e-4
"""Relative. float16 rounds each feature by at most 2**-11 = 5e-4 of itself, in both directions; measured 2e-5."""

LATER_LOSS_TOLERANCE = 4e-3
"""AdamW's first steps have the sign of the gradient and little of its size, which lets differences grow; measured 8e-4
after seven steps at a large learning rate."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_valley: Path) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "store", tiny_valley, num_samples=20, failed=(3,))


def make_stored(store: Path, model: Path, form: str, dtype: str, *, num_shards: int | None = None) -> FeatureStore:
    features = FeatureSet("a", form, dtype)
    (store / features.name).mkdir(exist_ok=True)
    stage = FeatureStage(model, store, features, batch_frames=16)
    stage(pa.table({"shard": [path.name for path in shard_paths(store)[:num_shards]]}))
    return FeatureStore(store, [features])


def train(store: Path, folder: Path, stored: FeatureStore | None, *, pooling: str = "mean") -> tuple[list[float], int]:
    """Losses of two epochs of the projector and the language model, and the clips that the tower has seen."""
    processor = ValleyProcessor.from_pretrained(folder)
    model = ValleyForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    if pooling == "max":
        from valley_ray.model.pooling import MaxPooling

        model.core.pooling = MaxPooling()
    plan = StagePlan(stage=0, seed=0, global_batch_size=6, micro_batch_size=3, epochs=2, max_steps=None)
    settings = FeedSettings(
        rank=0,
        world=1,
        pad_token_id=processor.pad_token_id,
        pixel_values=processor.pixel_values,
        prefetch_steps=2,
        timeout_s=5.0,
        stored=stored,
    )
    optimizer = torch.optim.AdamW(model.core.parameters(), lr=1e-2)
    losses, num_encoded = [], 0
    with Feeder(plan, SampleIndex(store), FeatureCache(0), settings) as feeder:
        for step in feeder:
            total = 0.0
            for batch in step.micro_batches:
                pixels = [clip.pixel_values for clip in batch.clips if clip.pixel_values is not None]
                num_encoded += len(pixels)
                encoded = iter(model.encode_clips(pixels) if pixels else ())
                features = [clip.features if clip.features is not None else next(encoded) for clip in batch.clips]
                output = model.core(batch.input_ids, batch.attention_mask, features, labels=batch.labels)
                output.loss.backward()
                total += float(output.loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
    return losses, num_encoded


@pytest.mark.parametrize("form", ["full", "pooled"])
def test_features_in_float32_give_the_same_losses_bit_for_bit(store: Path, tiny_valley: Path, form: str) -> None:
    from_frames, num_encoded = train(store, tiny_valley, None)
    assert num_encoded == 2 * 15, "19 samples, 4 of them text alone"
    assert from_frames[-1] < from_frames[0] / 2
    assert train(store, tiny_valley, make_stored(store, tiny_valley, form, "float32")) == (from_frames, 0)


def test_features_in_float16_give_nearly_the_same_losses(store: Path, tiny_valley: Path) -> None:
    from_frames, _ = train(store, tiny_valley, None)
    losses, num_encoded = train(store, tiny_valley, make_stored(store, tiny_valley, "pooled", "float16"))
    assert num_encoded == 0
    assert losses != from_frames
    assert losses[0] == pytest.approx(from_frames[0], rel=FIRST_LOSS_TOLERANCE)
    assert losses == pytest.approx(from_frames, rel=LATER_LOSS_TOLERANCE)


def test_full_features_serve_other_poolings(store: Path, tiny_valley: Path) -> None:
    from_frames, _ = train(store, tiny_valley, None, pooling="max")
    stored = make_stored(store, tiny_valley, "full", "float32")
    assert train(store, tiny_valley, stored, pooling="max") == (from_frames, 0)


def test_clips_without_stored_features_go_through_the_tower(tmp_path: Path, tiny_valley: Path) -> None:
    store = make_store(tmp_path / "store", tiny_valley, num_samples=20, failed=(3,))
    stored = make_stored(store, tiny_valley, "pooled", "float32", num_shards=1)
    losses, num_encoded = train(store, tiny_valley, stored)
    assert 0 < num_encoded < 2 * 15
    assert losses == train(store, tiny_valley, None)[0]
