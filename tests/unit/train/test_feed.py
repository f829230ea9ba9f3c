"""Windows become the micro-batches of a rank, ahead of the loop; an end of the data is an end and never a hang."""

import dataclasses
import json
import logging
import threading
import time
from pathlib import Path

import pytest
import torch
from train_store import make_store

from valley_ray.data import commit
from valley_ray.data.shards import WindowStore
from valley_ray.errors import DataError
from valley_ray.processor import ValleyProcessor
from valley_ray.train.feed import FeatureCache, Feeder, FeedSettings, RunEndedError, SampleIndex
from valley_ray.train.plan import StagePlan

PLAN = StagePlan(stage=0, seed=0, global_batch_size=6, micro_batch_size=2, epochs=2, max_steps=None)


def make_feeder(
    directory: Path,
    model: Path,
    *,
    rank: int = 0,
    world: int = 1,
    first_step: int = 0,
    plan: StagePlan = PLAN,
    plan_hash: str | None = None,
) -> Feeder:
    processor = ValleyProcessor.from_pretrained(model)
    settings = FeedSettings(
        rank=rank,
        world=world,
        pad_token_id=processor.pad_token_id,
        pixel_values=processor.pixel_values,
        prefetch_steps=2,
        timeout_s=5.0,
        plan_hash=plan_hash,
    )
    index = SampleIndex(directory, pack_tokens=plan.pack_tokens)
    return Feeder(plan, index, FeatureCache(0), settings, first_step=first_step)


@pytest.fixture
def store(tmp_path: Path, tiny_valley: Path) -> Path:
    return make_store(tmp_path / "store", tiny_valley, num_samples=20, failed=(3, 8))


def ids_of(feeder: Feeder) -> list[list[str]]:
    with feeder:
        return [[name for batch in step.micro_batches for name in batch.sample_ids] for step in feeder]


def test_ranks_share_the_steps_and_failed_rows_are_left_out(store: Path, tiny_valley: Path) -> None:
    alone = ids_of(make_feeder(store, tiny_valley))
    shared = [ids_of(make_feeder(store, tiny_valley, rank=rank, world=2)) for rank in range(2)]
    assert len(alone) == len(shared[0]) == len(shared[1]) == 6
    for whole, first, second in zip(alone, *shared, strict=True):
        assert sorted(whole) == sorted(first + second)
    names = [name for step in alone for name in step]
    assert sorted(names) == sorted([f"sample-{number}" for number in range(20) if number not in (3, 8)] * 2)


def test_every_rank_divides_by_the_label_tokens_of_the_whole_batch(store: Path, tiny_valley: Path) -> None:
    per_rank = []
    for rank in range(2):
        with make_feeder(store, tiny_valley, rank=rank, world=2) as feeder:
            steps = list(feeder)
        per_rank.append([step.num_label_tokens for step in steps])
        own = [sum(int((batch.labels != -100).sum()) for batch in step.micro_batches) for step in steps]
        per_rank.append(own)
    assert per_rank[0] == per_rank[2] == [a + b for a, b in zip(per_rank[1], per_rank[3], strict=True)]


def test_a_resumed_feeder_goes_on_with_the_same_batches(store: Path, tiny_valley: Path) -> None:
    assert ids_of(make_feeder(store, tiny_valley, first_step=2)) == ids_of(make_feeder(store, tiny_valley))[2:]


def test_a_resumed_feeder_stops_where_the_data_are_others(store: Path, tmp_path: Path, tiny_valley: Path) -> None:
    with make_feeder(store, tiny_valley) as feeder:
        hashes = [step.plan_hash for step in feeder]
    with make_feeder(store, tiny_valley, first_step=2, plan_hash=hashes[1]) as feeder:
        assert [step.plan_hash for step in feeder] == hashes[2:]
    other = make_store(tmp_path / "other", tiny_valley, num_samples=20, failed=(3, 9))
    with (
        make_feeder(other, tiny_valley, first_step=2, plan_hash=hashes[1]) as feeder,
        pytest.raises(RunEndedError, match="others than those"),
    ):
        next(iter(feeder))


PACKED = dataclasses.replace(PLAN, pack_tokens=64)


def test_packed_ranks_share_the_rows_of_the_same_batches(store: Path, tiny_valley: Path) -> None:
    padded, packed = (ids_of(make_feeder(store, tiny_valley, plan=plan)) for plan in (PLAN, PACKED))
    assert [sorted(step) for step in packed] == [sorted(step) for step in padded]
    per_rank = []
    for rank in range(2):
        with make_feeder(store, tiny_valley, plan=PACKED, rank=rank, world=2) as feeder:
            per_rank.append(list(feeder))
    for whole, *parts in zip(packed, *per_rank, strict=True):
        assert sorted(whole) == sorted(
            name for part in parts for batch in part.micro_batches for name in batch.sample_ids
        )
        assert len({len(part.micro_batches) for part in parts}) == 1
        sizes = [batch.input_ids.numel() for part in parts for batch in part.micro_batches if batch.sample_ids]
        assert sum(sizes) == parts[0].num_tokens, "no padding"
        assert max(sizes) <= 64


def test_a_sample_that_is_too_long_to_pack_is_left_out_and_listed(
    store: Path, tmp_path: Path, tiny_valley: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = SampleIndex(store)
    while not whole.known.complete:
        whole.grow(timeout_s=1.0, stop=threading.Event())
    budget = int(whole.known.num_tokens.max()) - 1
    index = SampleIndex(store, pack_tokens=budget)
    with caplog.at_level(logging.WARNING):
        while not index.known.complete:
            index.grow(timeout_s=1.0, stop=threading.Event())
    num_long = int((whole.known.num_tokens > budget).sum())
    assert num_long > 0
    assert "too long" in caplog.text
    assert len(index.known) == len(whole.known) - num_long
    assert len(index.known) + len(index.left_out) == 20
    index.write_left_out(tmp_path / "run" / "left_out.jsonl")
    listed = [json.loads(line) for line in (tmp_path / "run" / "left_out.jsonl").read_text().splitlines()]
    assert sorted(one["error_class"] for one in listed) == ["media_corrupt"] * 2 + ["prompt_too_long"] * num_long
    assert all(f"pack_tokens={budget}" in one["error"] for one in listed if one["error_class"] == "prompt_too_long")
    assert {one["sample_id"] for one in listed} >= {"sample-3", "sample-8"}


def test_weights_decide_how_often_the_samples_of_a_source_come(tmp_path: Path, tiny_valley: Path) -> None:
    directory = make_store(tmp_path / "store", tiny_valley, num_samples=24, sources=("a.json", "b.json"))
    plan = dataclasses.replace(PLAN, weights={"a.json": 2, "b.json": 0.5})
    names = [name for step in ids_of(make_feeder(directory, tiny_valley, plan=plan)) for name in step]
    assert sorted(names) == sorted(
        [f"sample-{number}" for number in range(24) for _ in range(4 if number % 2 == 0 else 1)]
    )


def test_training_waits_for_windows_and_starts_on_the_first(tmp_path: Path, tiny_valley: Path) -> None:
    source = make_store(tmp_path / "all", tiny_valley, num_samples=20)
    growing = tmp_path / "growing"
    growing.mkdir()
    for path in source.iterdir():
        if not path.name.startswith("window-0000") or path.name.startswith("window-00000"):
            (growing / path.name).write_bytes(path.read_bytes())
    with make_feeder(growing, tiny_valley) as feeder:
        steps = iter(feeder)
        assert next(steps).micro_batches[0].sample_ids[0] == "sample-0"
        for index in (1, 2):
            for path in sorted(source.glob(f"window-{index:05d}.*"), key=lambda path: path.suffix == ".json"):
                (growing / path.name).write_bytes(path.read_bytes())
        assert len(list(steps)) == 6


def test_a_store_in_the_making_gives_the_batches_of_the_finished_one(tmp_path: Path, tiny_valley: Path) -> None:
    """Overlap and shards: with everything on that looks further than one sample, and a window at a time."""
    sources = ("a.json", "b.json", "c.json")
    source = make_store(tmp_path / "all", tiny_valley, num_samples=60, window_size=6, failed=(7,), sources=sources)
    plan = dataclasses.replace(PACKED, length_grouping=True, weights={"a.json": 2, "b.json": 0.4})
    with make_feeder(source, tiny_valley, plan=plan) as feeder:
        finished = [(step.plan_hash, [batch.sample_ids for batch in step.micro_batches]) for step in feeder]
    growing = tmp_path / "growing"
    growing.mkdir()
    (growing / "store.json").write_bytes((source / "store.json").read_bytes())
    for path in source.glob("shard-*"):
        (growing / path.name).write_bytes(path.read_bytes())
    steps = []
    with make_feeder(growing, tiny_valley, plan=plan) as feeder:
        iterator = iter(feeder)
        for index in range(10):
            for path in sorted(source.glob(f"window-{index:05d}.*"), key=lambda path: path.suffix == ".json"):
                (growing / path.name).write_bytes(path.read_bytes())
            if index == 8:
                steps.append(next(iterator))
        steps += list(iterator)
    assert [(step.plan_hash, [batch.sample_ids for batch in step.micro_batches]) for step in steps] == finished


def test_a_failed_pipeline_ends_the_run_with_its_reason_after_its_last_window(
    tmp_path: Path, tiny_valley: Path
) -> None:
    directory = make_store(tmp_path / "store", tiny_valley, num_samples=20)
    (directory / "window-00001.json").unlink()
    commit.mark_failed(directory, DataError("the disk is full"))
    with make_feeder(directory, tiny_valley) as feeder:
        steps = iter(feeder)
        assert next(steps).num_samples == 6, "the first window holds one whole step"
        with pytest.raises(RunEndedError, match="the disk is full"):
            next(steps)


def test_a_store_without_ok_samples_is_said(tmp_path: Path, tiny_valley: Path) -> None:
    directory = make_store(tmp_path / "store", tiny_valley, num_samples=2, failed=(0, 1))
    index = SampleIndex(directory)
    with pytest.raises(RunEndedError, match=r"no sample .* is usable: 2 media_corrupt"):
        index.grow(timeout_s=1.0, stop=threading.Event())


def test_weights_that_draw_nothing_are_said(tmp_path: Path, tiny_valley: Path) -> None:
    directory = make_store(tmp_path / "store", tiny_valley, num_samples=4)
    plan = dataclasses.replace(PLAN, weights={"records.json": 0.1})
    with make_feeder(directory, tiny_valley, plan=plan) as feeder, pytest.raises(RunEndedError, match="draw no sample"):
        next(iter(feeder))


def test_leaving_early_stops_the_thread(store: Path, tiny_valley: Path) -> None:
    with make_feeder(store, tiny_valley) as feeder:
        next(iter(feeder))
    assert not feeder._thread.is_alive()


def test_waiting_for_a_window_that_never_comes_is_stopped_by_leaving(tmp_path: Path, tiny_valley: Path) -> None:
    directory = make_store(tmp_path / "store", tiny_valley, num_samples=20)
    (directory / "window-00000.json").unlink()
    start = time.monotonic()
    with make_feeder(directory, tiny_valley) as feeder:
        assert feeder._thread.is_alive()
    assert time.monotonic() - start < 3.0
    assert WindowStore(directory).committed() == []


def test_the_feature_cache_keeps_the_newest_within_its_limit() -> None:
    cache = FeatureCache(2 * 40)
    for key in "abc":
        cache.put(key, torch.zeros(10))
    assert cache.get("a") is None
    assert cache.get("b") is not None
    cache.put("d", torch.zeros(10))
    assert cache.get("c") is None, "b was used after c"
    assert cache.get("d") is not None
