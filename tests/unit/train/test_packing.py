"""Samples become padded micro-batches; a batch without samples keeps a rank in step."""

import numpy as np
import torch

from valley_ray.data.shards import Sample
from valley_ray.train.packing import collate, make_clip


def make_sample(length: int, num_labels: int) -> Sample:
    input_ids = np.arange(1, length + 1, dtype=np.int64)
    labels = np.where(np.arange(length) >= length - num_labels, input_ids, -100)
    return Sample(f"s{length}", input_ids, labels, (), num_labels)


def test_samples_are_padded_on_the_right_without_attention_or_loss() -> None:
    batch = collate([make_sample(5, 2), make_sample(3, 1)], [], pad_token_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, -100, 4, 5], [-100, -100, 3, -100, -100]]
    assert batch.sample_ids == ("s5", "s3")


def test_no_samples_give_a_batch_of_weight_zero() -> None:
    batch = collate([], [], pad_token_id=9)
    assert batch.input_ids.shape == (1, 2)
    assert (batch.labels == -100).all()
    assert batch.attention_mask.all(), "an unattended row would make a softmax over nothing"


def test_frames_are_normalised_only_where_no_features_are_at_hand() -> None:
    frames = np.full((2, 4, 4, 3), 255, dtype=np.uint8)

    def pixel_values(frames_TSSC: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(frames_TSSC).permute(0, 3, 1, 2) / 255.0

    clip = make_clip("a", frames, pixel_values=pixel_values, features=None)
    assert clip.pixel_values is not None
    assert clip.pixel_values.shape == (2, 3, 4, 4)
    cached = make_clip("a", frames, pixel_values=pixel_values, features=torch.ones(2, 5, 8))
    assert cached.pixel_values is None
    assert cached.features is not None
