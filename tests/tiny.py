"""A tiny random Valley for tests: real architecture, real tokenizer, made in well under a second.

Crop 32, patch 8 (P = 16), tower width 32 with 3 layers, LLaMA with hidden 32 and 2 layers, a word-level tokenizer.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from valley_ray.media.preprocess import Crop
from valley_ray.media.sampling import FrameSampling
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.processor import ProcessorConfig, ValleyProcessor

IMAGE_SIZE = 32
PATCH_SIZE = 8
SENTENCES = (
    "Answer about the video.",
    "### Human: What is moving?",
    "### Assistant: A red circle moves left.",
    "Which colour, shape and direction? A blue square moves right, then a green triangle moves up and down.",
    "How many shapes do you see? One two three. Describe the clip: yes no.",
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the sentences above with <s>, </s> and <unk>."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def make_tiny_valley(folder: Path, *, seed: int = 0, head_dim: int = 8) -> Path:
    """Write a model folder with random weights; the same seed gives the same bytes. vLLM serves heads from 32 on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = make_tokenizer()
        vision_tower = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=IMAGE_SIZE,
                patch_size=PATCH_SIZE,
            )
        )
        language_model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=head_dim,
                max_position_embeddings=512,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                initializer_range=0.2,
            )
        )
        model = ValleyForConditionalGeneration.from_backbones(vision_tower, language_model, tokenizer)
        # A projector with a bias of zeros is one that no stage has trained.
        torch.nn.init.normal_(model.core.mm_projector.bias, std=0.02)
    crop = Crop(size=IMAGE_SIZE, short_side=IMAGE_SIZE)
    config = ProcessorConfig(
        num_patches=model.config.num_patches,
        sampling=FrameSampling(num_frames=4),
        video_crop=crop,
        image_crop=crop.model_copy(update={"resample": "bicubic"}),
        system_prompt="Answer about the video.",
        max_length=512,
    )
    model.save_pretrained(folder)
    ValleyProcessor(tokenizer, config).save_pretrained(folder)
    return folder
