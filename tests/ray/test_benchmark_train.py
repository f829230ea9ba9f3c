"""What benchmark_train says is measured over the same samples in every mode."""

from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from train_store import make_store

from valley_ray.benchmarks.train import packing, train_numbers, trainee
from valley_ray.benchmarks.train.config import TrainCost
from valley_ray.errors import ConfigError
from valley_ray.processor import ValleyProcessor
from valley_ray.train.feed import FeatureCache, Feeder, FeedSettings, SampleIndex
from valley_ray.train.plan import StagePlan


def test_packed_and_padded_batches_hold_the_same_samples_and_half_is_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "LONGEST", 64)
    monkeypatch.setattr(packing, "PACK_TOKENS", 128)
    said: list[str] = []
    numbers = packing.packing_numbers(TrainCost(num_rounds_packing=1), say=said.append)
    assert len(said) == 2, "a heading and a line per round"
    assert numbers["packed_vs_padded"] > 0
    monkeypatch.undo()
    padded = [
        16 * max(lengths) for lengths in np.split(np.array([len(s.input_ids) for s in packing.make_samples(32)]), 2)
    ]
    waste = 1 - sum(len(sample.input_ids) for sample in packing.make_samples(32)) / sum(padded)
    assert 0.4 < waste < 0.6


def test_the_loop_that_decodes_by_itself_trains_the_same_batches(
    tmp_path: Path, tiny_valley: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "store", tiny_valley, num_samples=4, window_size=4)
    processor = ValleyProcessor.from_pretrained(tiny_valley)
    plan = StagePlan(stage=0, seed=0, global_batch_size=4, micro_batch_size=2, epochs=1, max_steps=None)
    settings = FeedSettings(0, 1, processor.pad_token_id, processor.pixel_values, prefetch_steps=1, timeout_s=5.0)
    with Feeder(plan, SampleIndex(store), FeatureCache(0), settings) as feeder:
        [fed] = list(feeder)
    index = SampleIndex(store)
    index.grow(timeout_s=1.0, stop=Event())
    frames = {sample.sample_id: sample.frames[0] for sample, _ in map(index.sample, range(4))}
    monkeypatch.setattr(trainee, "reference_chain", lambda path: processor.pixel_values(frames[path.stem]).numpy())
    decoding = trainee.Decoding(plan, store, tmp_path, pad_token_id=processor.pad_token_id)
    step = next(iter(decoding))
    assert (step.num_samples, step.num_tokens, step.num_label_tokens) == (4, fed.num_tokens, fed.num_label_tokens)
    for ours, theirs in zip(fed.micro_batches, step.micro_batches, strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids)
        for one, other in zip(ours.clips, theirs.clips, strict=True):
            assert one.pixel_values is not None
            assert other.pixel_values is not None
            assert torch.equal(one.pixel_values, other.pixel_values)
    assert decoding.wait_s > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_shape_without_a_gpu_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="needs a CUDA GPU and there is none here"):
        train_numbers(TrainCost(model="llama7b-shape", device="cuda"), say=print)


@pytest.mark.slow
def test_every_number_is_there(tmp_path: Path) -> None:
    config = TrainCost(clips=tmp_path, num_rounds=1, num_rounds_packing=1, num_samples=32, num_samples_in_process=16)
    said: list[str] = []
    numbers = train_numbers(config, say=said.append)
    for name in ("packed_vs_padded", "shards_vs_in_process", "overlap_vs_in_process"):
        assert numbers[name] > 0
    for name in ("stall_share_shards", "decode_share", "padding_waste"):
        assert 0 <= numbers[name] <= 1
    assert set(numbers["tokens_per_s"]) == set(numbers["cpu_ms_per_sample"]) == {"in_process", "shards", "overlap"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["valley-stage1", "valley-stage2", "valley-stage2-lora"])
def test_a_shape_is_timed_as_it_is_on_a_gpu(stage: str) -> None:
    config = TrainCost.model_validate(
        {"model": "tiny-shape", "stage": stage, "pack_tokens": 512, "num_rows": 2, "num_steps": 1, "peak_flops": 1e12}
    )
    numbers = train_numbers(config, say=print)
    assert numbers["tokens_per_s"] > 0
    assert 0 < numbers["mfu"] < 1
