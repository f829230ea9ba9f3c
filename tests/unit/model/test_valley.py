"""The whole model on a tiny random one: splice, loss, generation, any backbones, strict loading."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny_valley
from transformers import AutoModelForImageTextToText

from valley_ray.chat import Conversation, Message
from valley_ray.chat.tokens import ADDED_TOKENS
from valley_ray.errors import CheckpointError, ConversationError
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.config import ID_FIELD_OF_TOKEN
from valley_ray.processor import ValleyProcessor


@pytest.fixture(scope="module")
def model(tiny_valley: Path) -> ValleyForConditionalGeneration:
    return ValleyForConditionalGeneration.from_pretrained(tiny_valley)


@pytest.fixture(scope="module")
def processor(tiny_valley: Path) -> ValleyProcessor:
    return ValleyProcessor.from_pretrained(tiny_valley)


def make_batch(
    model: ValleyForConditionalGeneration, processor: ValleyProcessor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """A video of 4 frames, a text-only row and an image, right-padded: ids, mask, labels, pixel values."""
    rows = [("<video>\nWhat is moving?", [4]), ("Describe the clip", []), ("<image> how many shapes?", [1])]
    encoded = [
        processor.encode_training(Conversation((Message("user", text), Message("assistant", "A red circle."))), frames)
        for text, frames in rows
    ]
    length = max(len(row.input_ids) for row in encoded)
    input_ids = torch.full((3, length), processor.pad_token_id)
    labels = torch.full((3, length), -100)
    for index, row in enumerate(encoded):
        input_ids[index, : len(row.input_ids)] = torch.from_numpy(row.input_ids)
        labels[index, : len(row.labels)] = torch.from_numpy(row.labels)
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.randn(count, 3, 32, 32, generator=generator) for count in (4, 1)]
    return input_ids, (input_ids != processor.pad_token_id).long(), labels, pixels


def test_config_and_chat_name_the_same_tokens_in_the_same_order() -> None:
    assert tuple(ID_FIELD_OF_TOKEN) == ADDED_TOKENS


def test_features_are_the_penultimate_hidden_state_with_cls_first(model: ValleyForConditionalGeneration) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    features = model.encode_frames(pixels)
    hidden_states = model.vision_tower(pixels, output_hidden_states=True).hidden_states
    assert features.shape == (2, 17, 32)
    assert torch.equal(features, hidden_states[-2])
    assert not torch.equal(features, hidden_states[-1])
    assert not features.requires_grad


def test_visual_tokens_are_mean_patches_then_frame_tokens(model: ValleyForConditionalGeneration) -> None:
    features = torch.randn(4, 17, 32)
    tokens = model.core.visual_tokens(features)
    projected = model.core.mm_projector(features)
    assert tokens.shape == (16 + 4, 32)
    # Mean and projection commute up to float rounding.
    torch.testing.assert_close(tokens[:16], projected[:, 1:].mean(dim=0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens[16:], projected[:, 0], atol=1e-5, rtol=1e-5)


def test_visual_tokens_stand_on_their_placeholders_and_text_is_untouched(
    model: ValleyForConditionalGeneration, processor: ValleyProcessor
) -> None:
    ids = torch.tensor(processor.encode_prompt(Conversation((Message("user", "<video> one"),)), [4]))
    visual = torch.randn(20, 32)
    embeddings = model.core.embed(ids, [visual])
    is_patch, is_frame = ids == model.config.im_patch_token_id, ids == model.config.vi_frame_token_id
    assert torch.equal(embeddings[is_patch], visual[:16])
    assert torch.equal(embeddings[is_frame], visual[16:])
    text = ~(is_patch | is_frame)
    assert torch.equal(embeddings[text], model.get_input_embeddings()(ids)[text])


def test_wrong_number_of_visual_tokens_is_an_error(
    model: ValleyForConditionalGeneration, processor: ValleyProcessor
) -> None:
    ids = torch.tensor([processor.encode_prompt(Conversation((Message("user", "<video> one"),)), [4])])
    with pytest.raises(ConversationError, match="20 visual placeholders but the media give 19"):
        model(ids, pixel_values=[torch.randn(3, 3, 32, 32)])
    with pytest.raises(ConversationError, match="20 visual placeholders but the media give 0"):
        model(ids)


def test_batched_rows_equal_rows_alone(model: ValleyForConditionalGeneration, processor: ValleyProcessor) -> None:
    input_ids, mask, _, pixels = make_batch(model, processor)
    batched = model(input_ids, mask, pixel_values=pixels).logits
    for row, clips in enumerate(([pixels[0]], [], [pixels[1]])):
        length = int(mask[row].sum())
        alone = model(input_ids[row : row + 1, :length], pixel_values=clips).logits
        # Same sums in another order.
        torch.testing.assert_close(batched[row, :length], alone[0], atol=1e-4, rtol=1e-4)


def test_loss_without_logits_equals_loss_with_logits_and_so_do_gradients(
    model: ValleyForConditionalGeneration, processor: ValleyProcessor
) -> None:
    input_ids, mask, labels, pixels = make_batch(model, processor)
    features = model.encode_clips(pixels)
    results = []
    for return_logits in (True, False):
        model.zero_grad()
        output = model.core(input_ids, mask, features, labels=labels, loss_reduction="sum", return_logits=return_logits)
        output.loss.backward()
        assert (output.logits is not None) == return_logits
        results.append((output.loss.detach(), model.core.mm_projector.weight.grad.clone()))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-5)
    mean = model.core(input_ids, mask, features, labels=labels).loss
    torch.testing.assert_close(mean * (labels != -100).sum(), results[0][0], atol=1e-4, rtol=1e-5)


def test_loss_is_the_cross_entropy_of_the_next_token(
    model: ValleyForConditionalGeneration, processor: ValleyProcessor
) -> None:
    input_ids, mask, labels, pixels = make_batch(model, processor)
    output = model(input_ids, mask, pixel_values=pixels, labels=labels)
    log_probs = output.logits.log_softmax(-1)
    expected = [
        -log_probs[row, position - 1, labels[row, position]] for row, position in (labels != -100).nonzero().tolist()
    ]
    torch.testing.assert_close(output.loss, torch.stack(expected).mean())


def test_text_only_batch_gives_the_projector_a_zero_gradient(model: ValleyForConditionalGeneration) -> None:
    model.zero_grad()
    ids = torch.tensor([[1, 5, 6, 7]])
    model.core(ids, labels=ids).loss.backward()
    gradient = model.core.mm_projector.weight.grad
    assert gradient is not None
    assert not gradient.any()


def test_packed_row_with_block_mask_equals_samples_alone(
    model: ValleyForConditionalGeneration, processor: ValleyProcessor
) -> None:
    input_ids, mask, _, pixels = make_batch(model, processor)
    lengths = mask.sum(dim=1).tolist()
    packed = torch.cat([input_ids[row, :length] for row, length in enumerate(lengths)])[None]
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    segment = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    allowed = (segment[:, None] == segment[None]) & torch.ones(len(segment), len(segment), dtype=torch.bool).tril()
    packed_logits = model.core(
        packed, allowed[None, None], model.encode_clips(pixels), position_ids=position_ids, use_cache=False
    ).logits[0]
    batched = model(input_ids, mask, pixel_values=pixels).logits
    expected = torch.cat([batched[row, :length] for row, length in enumerate(lengths)])
    torch.testing.assert_close(packed_logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("given", ["pixel_values", "features"])
def test_generate_equals_step_by_step_argmax(
    model: ValleyForConditionalGeneration, processor: ValleyProcessor, given: str
) -> None:
    ids = torch.tensor([processor.encode_prompt(Conversation((Message("user", "<video> one"),)), [4])])
    pixels = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))]
    features = model.encode_clips(pixels)
    media = {"pixel_values": pixels} if given == "pixel_values" else {"features": features}
    made = model.generate(input_ids=ids, **media, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    embeddings = model.core.embed_batch(ids, features)
    for token in made:
        logits = model.core(inputs_embeds=embeddings).logits[0, -1]
        assert token == logits.argmax()
        embeddings = torch.cat([embeddings, model.get_input_embeddings()(token)[None, None]], dim=1)


def test_generate_of_a_left_padded_batch_equals_rows_alone(
    model: ValleyForConditionalGeneration, processor: ValleyProcessor
) -> None:
    questions = ((Message("user", "<video> one"), [4]), (Message("user", "How many shapes do you see?"), []))
    prompts = [list(processor.encode_prompt(Conversation((message,)), frames)) for message, frames in questions]
    features = model.encode_clips([torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(4))])
    length = max(map(len, prompts))
    input_ids = torch.tensor([[processor.pad_token_id] * (length - len(prompt)) + prompt for prompt in prompts])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    mask = (input_ids != processor.pad_token_id).long()
    batched = model.generate(input_ids=input_ids, attention_mask=mask, features=features, **options)[:, length:]
    for row, clips in enumerate((features, [])):
        prompt = torch.tensor([prompts[row]])
        alone = model.generate(input_ids=prompt, features=clips, **options)[0, prompt.shape[1] :]
        assert torch.equal(batched[row], alone)


def test_generate_stops_at_the_end_token(model: ValleyForConditionalGeneration, processor: ValleyProcessor) -> None:
    assert model.generation_config.eos_token_id in processor.stop_token_ids


def test_saved_folder_opens_to_equal_weights_also_through_auto_class(
    model: ValleyForConditionalGeneration, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    for opened in (
        ValleyForConditionalGeneration.from_pretrained(tmp_path),
        AutoModelForImageTextToText.from_pretrained(tmp_path),
    ):
        weights = opened.state_dict()
        assert isinstance(opened, ValleyForConditionalGeneration)
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
        assert not any(parameter.requires_grad for parameter in opened.vision_tower.parameters())
        assert all(parameter.requires_grad for parameter in opened.core.parameters())


def test_dtype_argument_is_kept(tiny_valley: Path) -> None:
    model = ValleyForConditionalGeneration.from_pretrained(tiny_valley, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.encode_frames(torch.randn(1, 3, 32, 32)).dtype == torch.bfloat16


def test_missing_unexpected_and_misshaped_weights_are_named(tmp_path: Path) -> None:
    folder = make_tiny_valley(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = "core.mm_projector.weight"

    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model: 1 weights missing: core\.mm_projector\.weight"):
        ValleyForConditionalGeneration.from_pretrained(folder)

    save_file(weights | {"core.extra": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected: core\.extra"):
        ValleyForConditionalGeneration.from_pretrained(folder)

    save_file(weights | {name: torch.zeros(32, 31)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"core\.mm_projector\.weight \(expected \[32, 32\], got \[32, 31\]\)"):
        ValleyForConditionalGeneration.from_pretrained(folder)


def test_folders_that_are_no_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        ValleyForConditionalGeneration.from_pretrained(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        ValleyForConditionalGeneration.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="expected model_type 'valley', got 'llama'"):
        ValleyForConditionalGeneration.from_pretrained(tmp_path)


def test_damaged_weight_file_and_unknown_pooling_are_named(tmp_path: Path) -> None:
    folder = make_tiny_valley(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pooling": "median"}))
    with pytest.raises(CheckpointError, match="pooling='median' is unknown"):
        ValleyForConditionalGeneration.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        ValleyForConditionalGeneration.from_pretrained(folder)
