"""ValleyProcessor: where media and chat meet. Frames become pixel values, conversations become token ids and labels.

Saved beside the model as processor_config.json and tokenizer files; everything that changes a token or a pixel is in
it, and `fingerprint` names it all. Importing this module loads no torch. T frames, S crop side, P patches, L tokens.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from valley_ray.chat.conversation import Conversation
from valley_ray.chat.style import Encoded, PromptOptions
from valley_ray.chat.styles import STYLES
from valley_ray.chat.templates import PromptStyle
from valley_ray.chat.tokens import Tokenizer, added_token_ids
from valley_ray.errors import CheckpointError
from valley_ray.media.preprocess import Crop, normalize
from valley_ray.media.sampling import FrameSampling
from valley_ray.processor.config import ProcessorConfig
from valley_ray.processor.reading import CONFIG_FILE, open_tokenizer, read_processor_config

if TYPE_CHECKING:
    import torch

ENCODING_VERSION = 1
"""Raised when the code gives other tokens or pixels for the same configuration."""


class ValleyProcessor:
    """Turns frames and conversations into what the model reads, and token ids back into text."""

    def __init__(self, tokenizer: Tokenizer, config: ProcessorConfig) -> None:
        """Raises CheckpointError where `tokenizer` lacks one of the seven added tokens or an end token."""
        self.tokenizer = tokenizer
        self.config = config
        self.added_token_ids = added_token_ids(tokenizer)
        if tokenizer.eos_token_id is None:
            raise CheckpointError(
                "the tokenizer has no end token, by which answers end; set eos_token on the tokenizer"
            )
        self.stop_token_ids: tuple[int, ...] = (tokenizer.eos_token_id,)
        """Any of them ends an answer."""
        self._style = STYLES[config.prompt_style]
        own = self._style.STOP_STRINGS
        self.stop_strings: tuple[str, ...] = own if config.stop_strings is None else config.stop_strings
        """Text that ends an answer beside the tokens; `decode` cuts there."""

    @property
    def sampling(self) -> FrameSampling:
        """Frames taken from a video."""
        return self.config.sampling

    @property
    def video_crop(self) -> Crop:
        """Resizing of video frames."""
        return self.config.video_crop

    @property
    def image_crop(self) -> Crop:
        """Resizing of images."""
        return self.config.image_crop

    @property
    def num_patches(self) -> int:
        """P, patch tokens per visual block."""
        return self.config.num_patches

    @property
    def image_mean(self) -> tuple[float, float, float]:
        """Per colour, of pixels scaled to 0..1."""
        return self.config.image_mean

    @property
    def image_std(self) -> tuple[float, float, float]:
        """Per colour."""
        return self.config.image_std

    @property
    def prompt_style(self) -> PromptStyle:
        """Words around the turns."""
        return self.config.prompt_style

    @property
    def system_prompt(self) -> str:
        """Used where a conversation brings none."""
        return self.config.system_prompt

    @property
    def max_length(self) -> int:
        """Tokens that the language model takes."""
        return self.config.max_length

    @property
    def pad_token_id(self) -> int:
        """Id of [PAD], which fills short rows of a batch."""
        return self.added_token_ids.pad

    @classmethod
    def from_pretrained(
        cls, folder: str | PathLike[str], *, settings: Mapping[str, Any] | None = None
    ) -> "ValleyProcessor":
        """Open the processor of a model folder, one of upstream's released layout included.

        `settings` replace fields of its ProcessorConfig, for example ``{"prompt_style": "upstream-serve"}``. Raises
        CheckpointError naming the file that does not fit, ConfigError naming the setting.
        """
        config = read_processor_config(folder, settings=settings)
        return cls(open_tokenizer(Path(folder)), config)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write processor_config.json and the tokenizer's files into `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        values = {"processor_class": type(self).__name__, **self.config.model_dump(mode="json")}
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")

    def pixel_values(self, frames_THWC: npt.NDArray[np.uint8]) -> "torch.Tensor":
        """Cropped frames uint8 [T, S, S, 3] → float32 [T, 3, S, S], normalised."""
        import torch

        return torch.from_numpy(normalize(frames_THWC, mean=self.image_mean, std=self.image_std))

    def encode_training(self, conversation: Conversation, num_frames: Sequence[int]) -> Encoded:
        """Tokens and labels of a conversation whose media marks stand for `num_frames` frames each.

        Raises:
            ConversationError, PromptTooLongError: as the `encode_training` of the prompt style says.
            ConfigError: the prompt style has no training form.
        """
        return self._style.encode_training(self.tokenizer, conversation, self.prompt_options(num_frames))

    def encode_prompt(self, conversation: Conversation, num_frames: Sequence[int]) -> tuple[int, ...]:
        """Tokens up to where the answer begins.

        Raises:
            ConversationError, PromptTooLongError: as the `encode_prompt` of the prompt style says.
        """
        return self._style.encode_prompt(self.tokenizer, conversation, self.prompt_options(num_frames))

    def prompt_text(self, conversation: Conversation, num_frames: Sequence[int]) -> str:
        """The prompt as text, visual blocks spelled out; raises ConversationError as `encode_prompt`."""
        return self._style.prompt_text(conversation, self.prompt_options(num_frames))

    def prompt_options(self, num_frames: Sequence[int]) -> PromptOptions:
        """What the prompt style is told about this model and `num_frames` frames per media mark."""
        return PromptOptions(
            system_prompt=self.system_prompt,
            num_patches=self.num_patches,
            num_frames=num_frames,
            max_length=self.max_length,
            bos_token=self.config.bos_token,
            only_mask_system=self.config.only_mask_system,
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a whole answer: cut at the first stop string, then as `clean_answer`."""
        text = self.decode_raw(token_ids)
        if not self.config.stop_skips_first_token:
            for stop in self.stop_strings:
                text = text.partition(stop)[0]
        return self.clean_answer(text)

    def decode_raw(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special and added ones dropped; neither cut nor stripped."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def clean_answer(self, text: str) -> str:
        """What is shown of an answer's text: the prompt style's rule, at least without white space around it."""
        return self._style.clean_answer(text)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with anything that changes tokens or pixels."""
        parts = {
            "version": ENCODING_VERSION,
            "config": self.config.model_dump(mode="json"),
            "tokenizer": _tokenizer_content(self.tokenizer),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _tokenizer_content(tokenizer: Tokenizer) -> str:
    """Text that tells two tokenizers apart: the whole of a fast one, else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return str(backend.to_str())
    return json.dumps(sorted(tokenizer.get_vocab().items()))
