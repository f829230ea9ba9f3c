"""The nano language model: a small LLaMA with its own tokenizer, taught to read before it sees anything.

It is trained on questions about scenes it knows only in words: each visual token is stood in for by the sum of the
embeddings of the words that describe its frame. What it has learned is what a projector can then speak to: stage 1 has
a model to align with, as Valley's has in Vicuna. Knows no pixels. P patches, T frames, V words, D hidden width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from valley_ray.chat.conversation import Conversation, Message
from valley_ray.chat.tokens import IGNORE_INDEX
from valley_ray.config import Config
from valley_ray.model.valley import ValleyForConditionalGeneration
from valley_ray.nano.questions import COLUMNS, NUMBERS, PHRASINGS, ROWS, Question, conversations_about, place_words
from valley_ray.nano.world import COLORS, DIRECTIONS, SHAPES, SIDE, VISIBLE, Scene, SceneKind, sample_scene
from valley_ray.processor import ValleyProcessor

SYSTEM_PROMPT = "Answer questions about the video."
MAX_LENGTH = 256


class LanguageConfig(Config):
    """Size of the language model and of its reading lessons."""

    hidden_size: int = Field(default=96, ge=8)
    """Width; an even multiple of `num_heads`."""
    intermediate_size: int = Field(default=192, ge=8)
    """Width of the feed-forward layers."""
    num_layers: int = Field(default=4, ge=1)
    """Transformer layers."""
    num_heads: int = Field(default=4, ge=1)
    """Attention heads."""
    num_steps: int = Field(default=220, ge=2)
    """Optimizer steps."""
    batch_size: int = Field(default=48, ge=1)
    """Conversations per step."""
    learning_rate: float = Field(default=1.5e-3, gt=0)
    """Peak of a one-cycle schedule."""
    noise: float = Field(default=0.3, ge=0)
    """Noise on the stand-ins, in standard deviations: a projector's tokens will not be exact words either."""
    seed: int = Field(default=0, ge=0)
    """Weights, scenes and order."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size must be an even multiple of num_heads, got {self.hidden_size=} {self.num_heads=}"
            )
        return self


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over everything the nano world can say."""
    sentences = [
        SYSTEM_PROMPT,
        "### Human: ### Assistant:",
        "a moves and first then",
        *(phrasing for phrasings in PHRASINGS.values() for phrasing in phrasings),
        " ".join((*COLORS, *SHAPES, *DIRECTIONS, *NUMBERS, *COLUMNS, *ROWS)),
    ]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def new_language_model(config: LanguageConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A LLaMA with random weights (torch's global generator)."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            # LLaMA's base of 10000 leaves most of a small head's frequencies flat over so short a sequence.
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            # Wider than LLaMA's 0.02, which a model this narrow takes long to grow out of.
            initializer_range=0.05,
            tie_word_embeddings=False,
        )
    )


def teach_reading(
    model: ValleyForConditionalGeneration,
    processor: ValleyProcessor,
    config: LanguageConfig,
    *,
    on_step: Callable[[int, int, float], None] | None = None,
) -> None:
    """Train `model.core.language_model` in place on scenes in words; tower and projector stay as they are.

    `on_step` gets (step, num_steps, loss).
    """
    torch.manual_seed(config.seed)
    rng = np.random.default_rng([config.seed, 2])
    language_model = model.core.language_model
    optimizer = torch.optim.AdamW(
        language_model.parameters(), lr=config.learning_rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.num_steps, pct_start=0.1
    )
    language_model.train()
    kinds: tuple[SceneKind, ...] = ("single", "single", "single", "sequence")
    vocabulary = processor.tokenizer.get_vocab()
    for step in range(config.num_steps):
        scenes = [
            sample_scene(config.seed + 1000, step * config.batch_size + row, kinds[row % len(kinds)])
            for row in range(config.batch_size)
        ]
        loss = _reading_loss(model, processor, vocabulary, scenes, rng, noise=config.noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(language_model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step + 1, config.num_steps, float(loss.detach()))
    language_model.eval()


def _reading_loss(
    model: ValleyForConditionalGeneration,
    processor: ValleyProcessor,
    vocabulary: Mapping[str, int],
    scenes: Sequence[Scene],
    rng: np.random.Generator,
    *,
    noise: float,
) -> torch.Tensor:
    num_frames = processor.sampling.num_frames
    assert num_frames is not None, "the nano processor samples a fixed number of frames"
    rows, words = [], []
    for scene in scenes:
        conversations = conversations_about(scene, rng)
        messages = _messages(conversations[int(rng.integers(len(conversations)))])
        rows.append(processor.encode_training(Conversation(messages), [num_frames]))
        words.append(_words_seen(scene, vocabulary, num_patches=processor.num_patches, num_frames=num_frames))
    length = max(len(row.input_ids) for row in rows)
    input_ids = torch.full((len(rows), length), processor.pad_token_id)
    labels = torch.full((len(rows), length), IGNORE_INDEX)
    for number, row in enumerate(rows):
        input_ids[number, : len(row.input_ids)] = torch.from_numpy(row.input_ids)
        labels[number, : len(row.labels)] = torch.from_numpy(row.labels)
    table_VD: Any = model.core.get_input_embeddings().weight
    stand_ins = torch.stack(words) @ table_VD
    stand_ins = stand_ins + torch.randn_like(stand_ins) * noise * stand_ins.detach().std()
    embeddings = model.core.embed(input_ids.flatten(), list(stand_ins)).view(len(rows), length, -1)
    mask = (input_ids != processor.pad_token_id).long()
    loss: torch.Tensor = model.core(None, mask, inputs_embeds=embeddings, labels=labels, return_logits=False).loss
    return loss


def _messages(questions: Sequence[Question]) -> tuple[Message, ...]:
    first, *others = (Message("user", question.text) for question in questions)
    asked = [Message("user", f"<video>\n{first.content}"), *others]
    answered = (Message("assistant", question.answer) for question in questions)
    return tuple(message for turn in zip(asked, answered, strict=True) for message in turn)


def _words_seen(scene: Scene, vocabulary: Mapping[str, int], *, num_patches: int, num_frames: int) -> torch.Tensor:
    """Word counts [P + T, V]: a patch token gets what passes over it, averaged over time, a frame token all it shows.

    A word counts once per shape that it describes.
    """
    side = round(num_patches**0.5)
    counts = np.zeros((num_patches + num_frames, len(vocabulary)), dtype=np.float32)
    for actor in scene.actors:
        look = [vocabulary[actor.color], vocabulary[actor.shape]]
        for frame, progress in enumerate(np.linspace(0, 1, num_frames)):
            x, y = (place - (SIDE - VISIBLE) / 2 for place in actor.center(float(progress)))
            column, row = (min(side - 1, max(0, int(place / VISIBLE * side))) for place in (x, y))
            counts[row * side + column, look] += 1 / num_frames
            counts[num_patches + frame, look] += 1
            for word in place_words(x, y, VISIBLE).split():
                counts[num_patches + frame, vocabulary[word]] += 1
    return torch.from_numpy(counts)
