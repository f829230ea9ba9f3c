"""Model folders of random weights that a CPU trains and serves, with the nano world's tokenizer."""

from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from valley_ray.media.sampling import FrameSampling
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.nano.language import make_tokenizer
from valley_ray.nano.world import COLORS, DIRECTIONS, SHAPES
from valley_ray.processor import ProcessorConfig, ValleyProcessor

MAX_LENGTH = 512
WORDS = (*COLORS, *SHAPES, *DIRECTIONS)
"""That the tokenizer knows."""


def make_model(
    tower: CLIPVisionConfig, *, width: int, num_layers: int
) -> tuple[ValleyForConditionalGeneration, PreTrainedTokenizerBase]:
    """A tower before a LLaMA of so many layers whose heads are 64 wide."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    vision = CLIPVisionModel(tower)
    language_model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width * 43 // 16,
            num_hidden_layers=num_layers,
            num_attention_heads=width // 64,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    return ValleyForConditionalGeneration.from_backbones(vision, language_model, tokenizer), tokenizer


def save_model(model: ValleyForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the model folder; 8 frames per video."""
    model.save_pretrained(folder)
    config = ProcessorConfig(
        num_patches=model.config.num_patches, sampling=FrameSampling(num_frames=8), max_length=MAX_LENGTH
    )
    ValleyProcessor(tokenizer, config).save_pretrained(folder)
