"""The processor: saved and opened, pixels, decoding, fingerprint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_tiny_valley

from valley_ray.chat import Conversation, Message
from valley_ray.errors import CheckpointError, ConfigError
from valley_ray.media.sampling import FrameSampling
from valley_ray.processor import ValleyProcessor

CONVERSATION = Conversation((Message("user", "<video>\nWhat is moving?"), Message("assistant", "A red circle.")))


@pytest.fixture(scope="module")
def processor(tiny_valley: Path) -> ValleyProcessor:
    return ValleyProcessor.from_pretrained(tiny_valley)


def test_saved_processor_opens_to_the_same_tokens_and_fingerprint(processor: ValleyProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = ValleyProcessor.from_pretrained(tmp_path)
    assert again.config == processor.config
    assert again.fingerprint == processor.fingerprint
    first, second = processor.encode_training(CONVERSATION, [4]), again.encode_training(CONVERSATION, [4])
    np.testing.assert_array_equal(first.input_ids, second.input_ids)


@pytest.mark.parametrize(
    "change",
    [
        {"system_prompt": "Be brief."},
        {"sampling": FrameSampling(num_frames=3)},
        {"image_mean": (0.5, 0.5, 0.5)},
        {"max_length": 100},
        {"prompt_style": "upstream-train"},
        {"bos_token": "eos"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_fingerprint_changes_with_every_setting(processor: ValleyProcessor, change: dict[str, object]) -> None:
    changed = ValleyProcessor(processor.tokenizer, processor.config.model_copy(update=change))
    assert changed.fingerprint != processor.fingerprint


def test_fingerprint_changes_with_the_tokenizer(processor: ValleyProcessor, tiny_valley: Path) -> None:
    other = ValleyProcessor.from_pretrained(tiny_valley)
    other.tokenizer.add_tokens(["purple"])  # type: ignore[attr-defined]
    assert ValleyProcessor(other.tokenizer, other.config).fingerprint != processor.fingerprint


def test_pixel_values_are_normalised_per_colour(processor: ValleyProcessor) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    pixels = processor.pixel_values(frames)
    assert pixels.shape == (2, 3, 32, 32)
    assert pixels.dtype == torch.float32
    expected = (frames / 255 - np.array(processor.image_mean)) / np.array(processor.image_std)
    np.testing.assert_allclose(pixels.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-5)


def test_decoded_answer_holds_no_special_token(processor: ValleyProcessor) -> None:
    encoded = processor.encode_training(CONVERSATION, [4])
    answer = encoded.labels[encoded.labels != -100]
    assert answer[-1] in processor.stop_token_ids
    assert processor.decode([processor.added_token_ids.im_patch, *answer]) == "a red circle ."


def test_upstream_style_stops_at_the_next_turn(processor: ValleyProcessor) -> None:
    upstream = ValleyProcessor(
        processor.tokenizer, processor.config.model_copy(update={"prompt_style": "upstream-train"})
    )
    encoded = upstream.encode_training(CONVERSATION, [4])
    prompt = upstream.encode_prompt(Conversation(CONVERSATION.messages[:1]), [4])
    assert tuple(encoded.input_ids[: len(prompt)]) == prompt
    assert "###" in upstream.stop_strings
    assert upstream.decode(encoded.input_ids[len(prompt) :].tolist()) == "a red circle ."


def test_broken_processor_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*processor_config\.json"):
        ValleyProcessor.from_pretrained(tmp_path)
    folder = make_tiny_valley(tmp_path / "model")
    values = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(values | {"num_patchs": 3}))
    with pytest.raises(ConfigError, match="did you mean 'num_patches'"):
        ValleyProcessor.from_pretrained(folder)
    (folder / "processor_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="must hold a mapping, got list"):
        ValleyProcessor.from_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(values))
    tokenizer_config = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="tokenizer cannot be opened"):
        ValleyProcessor.from_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(tokenizer_config)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer cannot be opened"):
        ValleyProcessor.from_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        ValleyProcessor.from_pretrained(folder)


def test_settings_replace_fields_and_are_checked(tiny_valley: Path) -> None:
    changed = ValleyProcessor.from_pretrained(tiny_valley, settings={"stop_strings": ["x"], "max_length": 9})
    assert (changed.stop_strings, changed.max_length) == (("x",), 9)
    for settings, words in (
        ({"only_mask_system": True}, "only_mask_system belongs to prompt_style 'upstream-train'"),
        ({"stop_strings": [""]}, "stop_strings"),
        ({"bos_token": "none"}, "'own' or 'eos'"),
    ):
        with pytest.raises(ConfigError, match=words):
            ValleyProcessor.from_pretrained(tiny_valley, settings=settings)


def test_a_setting_inside_another_leaves_its_neighbours(tmp_path: Path) -> None:
    folder = make_tiny_valley(tmp_path / "model")
    path = folder / "processor_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"sampling": {"num_frames": 5, "start_s": 1.0}}))
    for setting, expected in (
        ({"folder_order": "directory"}, FrameSampling(num_frames=5, start_s=1.0, folder_order="directory")),
        ({"fps": 2}, FrameSampling(num_frames=None, fps=2, start_s=1.0)),
        ({"num_frames": 2}, FrameSampling(num_frames=2, start_s=1.0)),
    ):
        assert ValleyProcessor.from_pretrained(folder, settings={"sampling": setting}).sampling == expected
    crop = ValleyProcessor.from_pretrained(folder).image_crop
    kept = ValleyProcessor.from_pretrained(folder, settings={"image_crop": {"resample": "bilinear"}}).image_crop
    assert kept == crop.model_copy(update={"resample": "bilinear"}) != crop


def test_stop_strings_are_the_styles_own_unless_named(processor: ValleyProcessor) -> None:
    def stops(**changes: object) -> tuple[str, ...]:
        return ValleyProcessor(processor.tokenizer, processor.config.model_copy(update=changes)).stop_strings

    assert stops() == ()
    assert stops(stop_strings=("###",)) == stops(prompt_style="upstream-serve") == ("###",)
    assert stops(prompt_style="upstream-serve", stop_strings=()) == ()
