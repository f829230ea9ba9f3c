"""Any vision tower and causal language model: opened, put together, trained and asked, all of them tiny and random."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer
from transformers import (
    ChineseCLIPConfig,
    ChineseCLIPModel,
    ChineseCLIPTextConfig,
    ChineseCLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from valley_ray.chat import Conversation, Message
from valley_ray.chat.tokens import ADDED_TOKENS
from valley_ray.engine.engine import Prompt, SamplingParams
from valley_ray.engine.slots import SlotEngine
from valley_ray.errors import CheckpointError
from valley_ray.media.preprocess import Crop
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.backbones import open_backbones
from valley_ray.processor import ProcessorConfig, ValleyProcessor
from valley_ray.train.stage_config import StageConfig
from valley_ray.train.stages import prepare_stage


def test_new_token_rows_follow_upstream() -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    num_old = len(tokenizer)
    language_model = tiny_qwen(num_old, tie=False)
    old = language_model.get_input_embeddings().weight.detach().clone()
    old_head = language_model.lm_head.weight.detach().clone()
    model = ValleyForConditionalGeneration.from_backbones(tiny_siglip(), language_model, tokenizer)
    for before, weight in (
        (old, model.get_input_embeddings().weight),
        (old_head, model.get_output_embeddings().weight),
    ):
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ADDED_TOKENS}
        assert list(ids.values()) == list(range(num_old, num_old + 7))
        assert torch.equal(weight[:num_old], before)
        torch.testing.assert_close(weight[num_old], before.mean(dim=0))
        torch.testing.assert_close(weight[ids["<im_start>"]], weight[: num_old + 5].mean(dim=0))
        torch.testing.assert_close(weight[ids["<im_end>"]], weight[: num_old + 5].mean(dim=0))


def test_any_tower_and_language_model_go_together(tmp_path: Path) -> None:
    """SigLIP has no CLS token and Qwen2 ties its head to its embedding."""
    tokenizer = make_tokenizer()
    model = ValleyForConditionalGeneration.from_backbones(tiny_siglip(), tiny_qwen(len(tokenizer), tie=True), tokenizer)
    pixels = torch.randn(2, 3, 32, 32)
    features = model.encode_frames(pixels)
    assert features.shape == (2, 17, 24)
    torch.testing.assert_close(features[:, 0], features[:, 1:].mean(dim=1))
    ids = model.config
    prompt = [1, 4, *[ids.im_patch_token_id] * 16, *[ids.vi_frame_token_id] * 2, 5]
    made = model.generate(input_ids=torch.tensor([prompt]), features=[features], max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path)
    again = ValleyForConditionalGeneration.from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(
        made, again.generate(input_ids=torch.tensor([prompt]), features=[features], max_new_tokens=4, do_sample=False)
    )


def test_siglip_and_qwen2_from_folders_are_trained_and_answer(tmp_path: Path) -> None:
    for pooling in ("mean", "importance", "delta"):
        assert_trains_and_answers(save_backbones(tmp_path / pooling, tiny_siglip(), tiny_qwen), pooling)


def test_chinese_clip_from_a_folder_is_trained_and_answers(tmp_path: Path) -> None:
    assert_trains_and_answers(save_backbones(tmp_path, tiny_chinese_clip(), tiny_llama), "mean")


def test_what_is_no_backbone_is_named(tmp_path: Path) -> None:
    tower, language = save_backbones(tmp_path, tiny_siglip(), tiny_qwen)
    with pytest.raises(CheckpointError, match=r"vision tower .*/language: its config.json has no image_size"):
        open_backbones(language, language)
    with pytest.raises(CheckpointError, match=r"language model .*/tower does not open \(Unrecognized configuration"):
        open_backbones(tower, tower)
    with pytest.raises(CheckpointError, match=r"vision tower .*/none: there is no such folder"):
        open_backbones(tmp_path / "none", language)
    for file in language.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"language model .*: its tokenizer does not open"):
        open_backbones(tower, language)


def test_a_backbone_without_some_of_its_weights_is_refused(tmp_path: Path) -> None:
    tower, language = save_backbones(tmp_path, tiny_siglip(), tiny_qwen)
    weights = load_file(language / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, language / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"language model .*: 1 weights missing: model\.norm\.weight"):
        open_backbones(tower, language)


def assert_trains_and_answers(folders: tuple[Path, Path], pooling: str) -> None:
    """Some steps on one clip lower the loss; then the engine says what `generate` says."""
    torch.manual_seed(0)
    tower, language, tokenizer = open_backbones(*folders)
    model = ValleyForConditionalGeneration.from_backbones(tower, language, tokenizer, pooling=pooling)
    processor = make_processor(tokenizer, model)
    pixels = [torch.randn(count, 3, 32, 32) for count in (3, 1)]
    losses = train(model, processor, pixels)
    assert losses[-1] < 0.5 * losses[0], (pooling, losses)
    features = model.encode_clips(pixels[:1])
    prompt = processor.encode_prompt(Conversation((Message("user", "<video>\nWhat is moving?"),)), [3])
    answer = model.generate(
        input_ids=torch.tensor([prompt]), features=features, do_sample=False, max_new_tokens=12, eos_token_id=None
    )[0, len(prompt) :]
    engine = SlotEngine(model.core, max_length=128)
    with torch.no_grad():
        tokens = model.core.visual_tokens(features[0])
    engine.add(Prompt(tuple(prompt), (tokens,)), SamplingParams(max_tokens=12))
    said = []
    while engine.num_unfinished:
        said += [event.token_id for event in engine.step()]
    assert said == answer.tolist()


def train(model: ValleyForConditionalGeneration, processor: ValleyProcessor, pixels: list[torch.Tensor]) -> list[float]:
    """Losses of a few steps of stage 2 on a video and an image."""
    turns = (Message("user", "<video>\nWhat is moving?"), Message("assistant", "A red circle moves left."))
    rows = [processor.encode_training(Conversation(turns), [len(clip)]) for clip in pixels]
    length = max(len(row.input_ids) for row in rows)
    input_ids = torch.full((len(rows), length), processor.pad_token_id)
    labels = torch.full((len(rows), length), -100)
    for index, row in enumerate(rows):
        input_ids[index, : len(row.input_ids)] = torch.from_numpy(row.input_ids)
        labels[index, : len(row.labels)] = torch.from_numpy(row.labels)
    stage = StageConfig(name="all", trainable="valley-stage2", learning_rate=1e-2, max_steps=30)
    parameters = [parameter for group in prepare_stage(model.core, stage) for parameter in group.parameters]
    optimizer = torch.optim.AdamW(parameters, lr=stage.learning_rate)
    features, losses = model.encode_clips(pixels), []
    model.core.train()
    for _ in range(30):
        optimizer.zero_grad()
        mask = (input_ids != processor.pad_token_id).long()
        loss = model.core(input_ids, mask, features, labels=labels, return_logits=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def make_processor(tokenizer: PreTrainedTokenizerFast, model: ValleyForConditionalGeneration) -> ValleyProcessor:
    crop = Crop(size=model.config.image_size, short_side=model.config.image_size)
    config = ProcessorConfig(
        num_patches=model.config.num_patches,
        video_crop=crop,
        image_crop=crop,
        system_prompt="Answer about the video.",
        max_length=128,
    )
    return ValleyProcessor(tokenizer, config)


def save_backbones(folder: Path, tower: Any, make_language: Any) -> tuple[Path, Path]:
    """Folders of a tower and of a language model with its tokenizer."""
    tokenizer = make_tokenizer()
    tower.save_pretrained(folder / "tower")
    make_language(len(tokenizer)).save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    return folder / "tower", folder / "language"


def tiny_qwen(vocab_size: int, *, tie: bool = True) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab_size, num_key_value_heads=1, tie_word_embeddings=tie, **SMALL))


def tiny_llama(vocab_size: int) -> LlamaForCausalLM:
    """Wide weights, because stage 2 leaves the head as it is."""
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, initializer_range=0.2, **SMALL))


def tiny_siglip() -> SiglipVisionModel:
    return SiglipVisionModel(SiglipVisionConfig(image_size=32, patch_size=8, **SMALL_TOWER))


def tiny_chinese_clip() -> ChineseCLIPModel:
    """Both halves, as on the hub."""
    text = ChineseCLIPTextConfig(vocab_size=20, **SMALL)
    vision = ChineseCLIPVisionConfig(image_size=32, patch_size=8, **SMALL_TOWER)
    return ChineseCLIPModel(ChineseCLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL_TOWER = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
