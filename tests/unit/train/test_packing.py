"""Samples become padded or packed micro-batches; a batch without samples keeps a rank in step."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import varlen

from valley_ray.chat.conversation import Conversation, Message
from valley_ray.data.shards import Sample
from valley_ray.errors import ConfigError
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.processor import ValleyProcessor
from valley_ray.train.attention import register_varlen, use_packed_attention
from valley_ray.train.packing import Clip, MicroBatch, collate, collate_packed, make_clip, packed_mask

CPU = torch.device("cpu")


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


def test_packed_samples_stand_behind_each_other_and_count_from_zero() -> None:
    first, second = make_sample(3, 3), make_sample(2, 1)
    batch = collate_packed([first, second], [])
    assert batch.input_ids.tolist() == [[1, 2, 3, 1, 2]]
    assert batch.labels.tolist() == [[-100, 2, 3, -100, 2]], "nothing comes before the first token of a sample"
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.segment_ids is not None
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2]]
    assert batch.sample_ids == ("s3", "s2")
    assert first.labels.tolist() == [1, 2, 3], "the sample itself stays"


def test_packed_mask_lets_no_sample_see_another_or_what_comes_later() -> None:
    segments = torch.tensor([[1, 1, 2, 2, 2, 0]])
    mask = packed_mask(segments, attention="sdpa")
    assert mask.shape == (1, 1, 6, 6)
    allowed = [(0, 0), (1, 0), (1, 1), (2, 2), (3, 2), (3, 3), (4, 2), (4, 3), (4, 4), (5, 5)]
    assert [tuple(place) for place in mask[0, 0].nonzero().tolist()] == allowed
    added = packed_mask(segments, attention="eager")
    assert torch.equal(added == 0, mask)
    assert added.min() == torch.finfo(torch.float32).min


def test_flash_attention_is_told_where_samples_begin_and_takes_no_mask() -> None:
    inputs = collate_packed([make_sample(3, 1), make_sample(5, 1)], []).model_inputs(CPU, attention="flash_attention_2")
    assert "attention_mask" not in inputs
    assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == [0, 3, 8]
    assert inputs["cu_seq_lens_q"].dtype == torch.int32
    assert inputs["max_length_q"] == inputs["max_length_k"] == 5


def test_padded_inputs_are_a_plain_mask() -> None:
    inputs = collate([make_sample(5, 2), make_sample(3, 1)], [], pad_token_id=9).model_inputs(CPU, attention="sdpa")
    assert sorted(inputs) == ["attention_mask", "input_ids", "labels"]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_gradients_are_the_padded_ones(tiny_valley: Path, attention: str) -> None:
    """Videos of several lengths, a text-only sample, and a sample whose first token is learned."""
    processor = ValleyProcessor.from_pretrained(tiny_valley)
    model = ValleyForConditionalGeneration.from_pretrained(tiny_valley)
    model.core.set_attn_implementation(attention)
    samples, clips = make_media_samples(processor, model)
    padded = collate(samples, clips, pad_token_id=processor.pad_token_id)
    packed = collate_packed(samples, clips)
    losses, gradients = zip(*(gradients_of(model, batch, attention) for batch in (padded, packed)), strict=True)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] > 0
    for name, gradient in gradients[0].items():
        difference = float((gradient - gradients[1][name]).abs().max())
        assert difference <= 1e-6 * max(1.0, float(gradient.abs().max())), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_one_sample_says_changes_nothing_for_its_neighbour(tiny_valley: Path, attention: str) -> None:
    model = ValleyForConditionalGeneration.from_pretrained(tiny_valley)
    model.core.set_attn_implementation(attention)
    logits = []
    for other in (make_sample(4, 1), dataclasses.replace(make_sample(4, 1), input_ids=np.array([9, 8, 7, 6]))):
        batch = collate_packed([other, make_sample(6, 2)], [])
        inputs = batch.model_inputs(CPU, attention=attention)
        with torch.no_grad():
            logits.append(model.core(**inputs).logits[0])
    assert torch.equal(logits[0][4:], logits[1][4:])
    assert not torch.equal(logits[0][:4], logits[1][:4])


def by_hand(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    starts_k: torch.Tensor,
    longest: int,
    longest_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What torch documents of its kernel, which there is none of for CPUs: [L, H, d] in and out."""
    assert starts.dtype == torch.int32
    assert torch.equal(starts, starts_k)
    assert longest == longest_k == int(starts.diff().max())
    assert window_size == (-1, 0), "causal"
    parts = zip(*(heads.split(starts.diff().tolist()) for heads in (query, key, value)), strict=True)
    return torch.cat([_causal(*part, scale=scale, enable_gqa=enable_gqa) for part in parts])


def _causal(*part: torch.Tensor, scale: float, enable_gqa: bool) -> torch.Tensor:
    heads = [one.transpose(0, 1)[None] for one in part]
    return F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=enable_gqa)[0].transpose(0, 1)


def test_packed_gradients_through_torchs_kernels_are_the_padded_ones(
    tiny_valley: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", by_hand)
    processor = ValleyProcessor.from_pretrained(tiny_valley)
    model = ValleyForConditionalGeneration.from_pretrained(tiny_valley)
    samples, clips = make_media_samples(processor, model)
    padded = collate(samples, clips, pad_token_id=processor.pad_token_id)
    expected = gradients_of(model, padded, "sdpa")
    name = register_varlen()
    model.core.language_model.set_attn_implementation(name)
    for batch in (collate_packed(samples, clips), padded):
        loss, gradients = gradients_of(model, batch, name)
        assert loss == pytest.approx(expected[0], rel=1e-6)
        for parameter, gradient in expected[1].items():
            difference = float((gradient - gradients[parameter]).abs().max())
            assert difference <= 1e-6 * max(1.0, float(gradient.abs().max())), parameter


def test_models_whose_samples_cannot_share_a_row_are_refused(tiny_valley: Path) -> None:
    model = ValleyForConditionalGeneration.from_pretrained(tiny_valley)
    model.core.use_splice("upstream")
    with pytest.raises(ConfigError, match="splice=upstream takes one clip"):
        use_packed_attention(model.core, CPU, precision="fp32")
    model.core.use_splice("strict")
    model.core.language_model._is_stateful = True
    with pytest.raises(ConfigError, match="LlamaForCausalLM carries a state"):
        use_packed_attention(model.core, CPU, precision="fp32")


def test_a_cpu_keeps_the_attention_of_the_model(tiny_valley: Path) -> None:
    model = ValleyForConditionalGeneration.from_pretrained(tiny_valley)
    assert use_packed_attention(model.core, CPU, precision="bf16") == "sdpa"


def make_media_samples(
    processor: ValleyProcessor, model: ValleyForConditionalGeneration
) -> tuple[list[Sample], list[Clip]]:
    generator = torch.Generator().manual_seed(0)
    samples, clips = [], []
    for number, num_frames in enumerate([3, 0, 1, 4]):
        question = "<video>\nWhat is moving?" if num_frames else "How many shapes do you see?"
        conversation = Conversation((Message("user", question), Message("assistant", "A red circle moves left.")))
        encoded = processor.encode_training(conversation, [num_frames] if num_frames else [])
        labels = encoded.input_ids.copy() if number == 1 else encoded.labels
        samples.append(Sample(f"s{number}", encoded.input_ids, labels, (), encoded.num_label_tokens))
        if num_frames:
            features = torch.randn(num_frames, 1 + model.config.num_patches, 32, generator=generator)
            clips.append(Clip(number, pixel_values=None, features=features))
    return samples, clips


def gradients_of(
    model: ValleyForConditionalGeneration, batch: MicroBatch, attention: str
) -> tuple[float, dict[str, torch.Tensor]]:
    model.core.zero_grad()
    features = [clip.features for clip in batch.clips if clip.features is not None]
    inputs = batch.model_inputs(CPU, attention=attention)
    output = model.core(**inputs, features=features, loss_reduction="sum", return_logits=False)
    (output.loss / 20).backward()
    gradients = {name: one.grad.clone() for name, one in model.core.named_parameters() if one.grad is not None}
    return float(output.loss.detach()), gradients
