"""Poolings with weights: against sums by hand and torch's own layers, in training, bfloat16 and on ragged clips."""

from functools import partial

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from valley_ray.errors import CheckpointError, SamplingError
from valley_ray.model import ValleyConfig
from valley_ray.model.core import ValleyCore
from valley_ray.model.pooling import DeltaPooling, ImportancePooling, MaxPooling, build_pooling, sinusoids

WIDTH, NUM_PATCHES = 16, 4


def clips(*num_frames: int, seed: int = 0) -> list[torch.Tensor]:
    """Projected patches [T, P, D] of several clips."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, NUM_PATCHES, WIDTH, generator=generator) for count in num_frames]


def delta(dropout: float = 0.0) -> DeltaPooling:
    torch.manual_seed(0)
    return DeltaPooling(hidden_size=WIDTH, dropout=dropout)


@torch.no_grad()
def test_importance_is_a_softmax_over_frames_of_a_score_per_frame() -> None:
    pooling = ImportancePooling(num_patches=NUM_PATCHES, hidden_size=WIDTH)
    (clip,) = clips(3)
    weights = torch.stack([pooling.score(frame.flatten()) for frame in clip]).softmax(dim=0)
    expected = sum(weight * frame for weight, frame in zip(weights, clip, strict=True))
    torch.testing.assert_close(pooling.pool([clip])[0], expected)


@torch.no_grad()
def test_delta_is_the_mean_plus_the_last_step_of_the_encoder_on_positions() -> None:
    pooling = delta().eval()
    (clip,) = clips(5)
    layer = pooling.encoder.layers[0]
    for patch in range(NUM_PATCHES):
        steps = (clip[:, patch] + pooling.position_encoding[:5])[None]
        attended = layer.norm1(steps + layer.self_attn(steps, steps, steps)[0])
        encoded = layer.norm2(attended + layer.linear2(layer.linear1(attended).relu()))
        expected = clip[:, patch].mean(dim=0) + encoded[0, -1]
        torch.testing.assert_close(pooling.pool([clip])[0][patch], expected, atol=1e-5, rtol=1e-5)


def test_clips_of_a_batch_do_not_see_each_other_in_training_and_out_of_it() -> None:
    """Also: torch's fused inference path and its training path agree, with and without padding."""
    for pooling in (delta(), ImportancePooling(num_patches=NUM_PATCHES, hidden_size=WIDTH), MaxPooling()):
        batch = clips(1, 5, 3)
        pooling.train()
        together = pooling.pool(batch)
        for training in (True, False):
            pooling.train(training)
            with torch.set_grad_enabled(training):
                for clip, expected in zip(batch, together, strict=True):
                    torch.testing.assert_close(pooling.pool([clip])[0], expected, atol=1e-5, rtol=1e-5)
                for again, expected in zip(pooling.pool(batch), together, strict=True):
                    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_as_near_as_its_rounding() -> None:
    pooling = delta().eval()
    batch = clips(2, 5)
    exact = pooling.pool(batch)
    for training in (True, False):
        rounded = pooling.to(torch.bfloat16).train(training)
        with torch.set_grad_enabled(training):
            coarse = rounded.pool([clip.bfloat16() for clip in batch])
        for one, other in zip(coarse, exact, strict=True):
            assert one.dtype == torch.bfloat16
            # Eight bits of fraction, through two norms and three sums of numbers up to 4.
            torch.testing.assert_close(one.float(), other, atol=0.15, rtol=0.05)


def test_dropout_acts_in_training_alone() -> None:
    pooling = delta(dropout=0.5)
    batch = clips(4)
    pooling.train()
    assert not torch.equal(pooling.pool(batch)[0], pooling.pool(batch)[0])
    pooling.eval()
    assert torch.equal(pooling.pool(batch)[0], pooling.pool(batch)[0])


def test_positions_are_sines_and_cosines_by_turns() -> None:
    table = sinusoids(3, 4)
    angles = [2.0, 2.0 / 10000**0.5]
    expected = [value for angle in angles for value in (torch.tensor(angle).sin(), torch.tensor(angle).cos())]
    torch.testing.assert_close(table[2], torch.stack(expected))
    assert sinusoids(3, 5).shape == (3, 5)


def test_a_clip_beyond_the_position_table_is_refused() -> None:
    with pytest.raises(SamplingError, match="a clip of 2049 frames, but delta pooling knows 2048 positions"):
        delta().pool([torch.zeros(2049, 1, WIDTH)])


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(CheckpointError, match="multiple of 8, got 12"):
        build_pooling(make_config("delta"), hidden_size=12)


def test_every_weight_of_every_pooling_gets_a_gradient_with_and_without_media() -> None:
    for name in ("mean", "max", "importance", "delta"):
        core = ValleyCore(make_config(name))
        for features in ([], [torch.randn(2, 1 + NUM_PATCHES, 24)]):
            core.zero_grad()
            placeholders = [40] * NUM_PATCHES + [41] * 2 if features else []
            ids = torch.tensor([[1, *placeholders, 5, 6]])
            core(ids, features=features, labels=ids).loss.backward()
            gradients = {n: p.grad for n, p in core.named_parameters() if n.startswith(("pooling", "mm_projector"))}
            assert None not in gradients.values(), name
            if not features:
                assert not any(gradient.any() for gradient in gradients.values()), name


def test_weights_are_called_once_per_batch_whatever_its_clips() -> None:
    """ZeRO-3 gathers a module's weights whenever it is called: unequal numbers of calls would hang."""
    for name, weighted in (("importance", "pooling.score"), ("delta", "pooling.encoder")):
        core = ValleyCore(make_config(name))
        calls: list[str] = []
        for module in (weighted, "mm_projector", "language_model.model.embed_tokens"):
            core.get_submodule(module).register_forward_pre_hook(partial(note, calls, module))
        orders = []
        for counts in ((), (2,), (1, 3, 2)):
            calls.clear()
            ids = [token for count in counts for token in [40] * NUM_PATCHES + [41] * count]
            core.embed_batch(torch.tensor([[1, *ids]]), [torch.randn(c, 1 + NUM_PATCHES, 24) for c in counts])
            orders.append(tuple(calls))
        assert set(orders) == {("mm_projector", weighted, "language_model.model.embed_tokens")}


def note(calls: list[str], module: str, *_: object) -> None:
    calls.append(module)


def make_config(pooling: str) -> ValleyConfig:
    small = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ValleyConfig(
        text_config=LlamaConfig(vocab_size=50, hidden_size=WIDTH, **small),
        vision_config=CLIPVisionConfig(hidden_size=24, image_size=16, patch_size=8, **small),
        pooling=pooling,
        im_patch_token_id=40,
        vi_frame_token_id=41,
        im_start_token_id=42,
        im_end_token_id=43,
        vi_start_token_id=44,
        vi_end_token_id=45,
    )
