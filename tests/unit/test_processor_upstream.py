"""Processors of folders in upstream's layout, which say nothing about pixels and prompts themselves."""

import json
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceTrainer
from tiny import SENTENCES, make_tokenizer
from transformers import AddedToken, CLIPVisionConfig

from valley_ray.chat.sentencepiece import SentencePieceTokenizer
from valley_ray.chat.templates import SYSTEM_PROMPT_CHINESE, SYSTEM_PROMPT_V1
from valley_ray.chat.tokens import ADDED_TOKENS
from valley_ray.errors import CheckpointError
from valley_ray.media.preprocess import Crop
from valley_ray.processor import ValleyProcessor

CLIP = {
    "do_center_crop": True,
    "crop_size": {"height": 28, "width": 28},
    "size": {"shortest_edge": 32},
    "resample": 3,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}
STRETCHED = CLIP | {"do_center_crop": False, "size": {"height": 28, "width": 28}, "resample": 2}


def make_folder(root: Path, preprocessor: dict[str, Any] | None, *, tower: str = "towers/some-clip") -> Path:
    """`root`/models/valley beside the tower that it names; the sizes are 28 and 7, so P is 16."""
    CLIPVisionConfig(image_size=28, patch_size=7).save_pretrained(root / tower)
    if preprocessor is not None:
        (root / tower / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in ADDED_TOKENS])
    folder = root / "models" / "valley"
    tokenizer.save_pretrained(folder)
    config = {"model_type": "valley", "mm_vision_tower": tower, "max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_pixels_are_those_of_the_tower_and_prompts_those_of_its_training(tmp_path: Path) -> None:
    processor = ValleyProcessor.from_pretrained(make_folder(tmp_path, CLIP))
    assert processor.num_patches == 16
    assert processor.image_crop == Crop(size=28, short_side=32, resample="bicubic", corner="floored")
    assert processor.video_crop == Crop(size=28, short_side=32, resample="bilinear")
    assert (processor.image_mean, processor.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (processor.prompt_style, processor.stop_strings) == ("upstream-train", ("###",))
    assert processor.system_prompt == SYSTEM_PROMPT_V1
    assert processor.max_length == 256, "the model's context is shorter than the tokenizer's 512"


def test_a_chinese_tower_stretches_and_has_a_system_prompt_of_its_own(tmp_path: Path) -> None:
    processor = ValleyProcessor.from_pretrained(make_folder(tmp_path, STRETCHED, tower="towers/chinese-clip"))
    assert processor.image_crop == Crop(size=28, fit="stretch", resample="bilinear")
    assert processor.system_prompt == SYSTEM_PROMPT_CHINESE


def test_without_a_preprocessor_file_the_kind_of_tower_decides(tmp_path: Path) -> None:
    plain = ValleyProcessor.from_pretrained(make_folder(tmp_path / "a", None))
    assert plain.image_crop == Crop(size=28, short_side=28, resample="bicubic", corner="floored")
    chinese = ValleyProcessor.from_pretrained(make_folder(tmp_path / "b", None, tower="chinese"))
    assert chinese.image_crop == Crop(size=28, fit="stretch", resample="bicubic")


def test_old_files_that_give_sizes_as_numbers_are_read(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, CLIP | {"size": 28, "crop_size": 28})
    assert ValleyProcessor.from_pretrained(folder).image_crop.short_side == 28


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"height": 28, "width": 30}},
        {"size": {"longest_edge": 30}},
        {"crop_size": 24},
        {"do_center_crop": False},
        {"resample": 1},
    ],
    ids=str,
)
def test_image_settings_that_the_tower_cannot_take_are_named(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json of towers/some-clip has size=") as caught:
        ValleyProcessor.from_pretrained(make_folder(tmp_path, CLIP | change))
    assert "\n" not in str(caught.value)


def test_a_lora_folder_takes_the_tokenizer_of_its_base(tmp_path: Path) -> None:
    base = make_folder(tmp_path, CLIP)
    lora = tmp_path / "models" / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "models/valley"}))
    assert ValleyProcessor.from_pretrained(lora).fingerprint == ValleyProcessor.from_pretrained(base).fingerprint
    shutil.copy(base / "config.json", lora)
    assert ValleyProcessor.from_pretrained(lora).fingerprint == ValleyProcessor.from_pretrained(base).fingerprint
    shutil.move(base, tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"no tokenizer, and the base .* is out of reach"):
        ValleyProcessor.from_pretrained(lora)


def test_an_adapter_on_a_base_of_our_layout_takes_its_processor(tiny_valley: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_valley)}))
    base, opened = ValleyProcessor.from_pretrained(tiny_valley), ValleyProcessor.from_pretrained(tmp_path)
    assert (opened.config, opened.fingerprint) == (base.config, base.fingerprint)


def test_lora_folders_that_name_each_other_as_base_are_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, CLIP)
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "other"}))
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    with pytest.raises(CheckpointError, match="out of reach"):
        ValleyProcessor.from_pretrained(folder)


def test_a_folder_of_neither_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"processor_config\.json"):
        ValleyProcessor.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        ValleyProcessor.from_pretrained(tmp_path)


def test_a_tokenizer_without_the_added_tokens_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, CLIP)
    for file in folder.glob("*token*"):
        file.unlink()
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(CheckpointError, match="lacks the added tokens"):
        ValleyProcessor.from_pretrained(folder)


def test_the_sentencepiece_file_counts_where_a_fast_tokenizer_lies_beside_it(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, CLIP)
    assert not isinstance(ValleyProcessor.from_pretrained(folder).tokenizer, SentencePieceTokenizer)
    model = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, vocab_size=60, model_type="bpe", minloglevel=2
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    assert not isinstance(ValleyProcessor.from_pretrained(folder).tokenizer, SentencePieceTokenizer)
    added = {token: 60 + index for index, token in enumerate(ADDED_TOKENS)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    processor = ValleyProcessor.from_pretrained(folder)
    assert isinstance(processor.tokenizer, SentencePieceTokenizer)
    ids = [*processor.tokenizer.encode("A red circle", add_special_tokens=False), added["[PAD]"], added["<im_patch>"]]
    assert processor.decode_raw(ids) == "A red circle <im_patch>"
    assert processor.decode_raw([*ids, 67, 10**6, -1]) == "A red circle <im_patch>"  # rows of a padded table
