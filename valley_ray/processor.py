"""ValleyProcessor: where media and chat meet. Frames become pixel values, conversations become token ids and labels.

Saved beside the model as processor_config.json and tokenizer files; everything that changes a token or a pixel is in
it, and `fingerprint` names it all. Importing this module loads no torch. T frames, S crop side, P patches, L tokens.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from pydantic import Field

from valley_ray.chat import encode, upstream
from valley_ray.chat.conversation import Conversation, MediaKind
from valley_ray.chat.encode import Encoded
from valley_ray.chat.templates import SYSTEM_PROMPT_V1, PromptStyle
from valley_ray.chat.tokens import Tokenizer, added_token_ids
from valley_ray.config import Config, validate_config
from valley_ray.errors import CheckpointError
from valley_ray.media.preprocess import Crop, normalize
from valley_ray.media.sampling import FrameSampling

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "processor_config.json"

_ENCODINGS = {"valley": encode, "upstream-train": upstream}
_STOP_STRINGS: dict[PromptStyle, tuple[str, ...]] = {"valley": (), "upstream-train": (upstream.ANSWER_END,)}

ENCODING_VERSION = 1
"""Raised when the code gives other tokens or pixels for the same configuration."""


class ProcessorConfig(Config):
    """Everything beside the tokenizer that decides which tokens and pixels come out."""

    num_patches: int = Field(ge=1)
    """P, patch tokens per visual block: (crop side / patch side) squared."""
    sampling: FrameSampling = FrameSampling()
    """Frames taken from a video."""
    video_crop: Crop = Crop()
    """Resizing of video frames; upstream: short side 256 bilinear, crop 224."""
    image_crop: Crop = Crop(short_side=224, resample="bicubic", corner="floored")
    """Resizing of images; upstream: CLIP's processor."""
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Per colour, of pixels scaled to 0..1; CLIP's."""
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Per colour; CLIP's."""
    prompt_style: PromptStyle = "valley"
    """Words around the turns; see chat/templates.py."""
    system_prompt: str = SYSTEM_PROMPT_V1
    """Used where a conversation brings none; an empty one leaves the header out."""
    max_length: int = Field(default=2048, ge=1)
    """Tokens that the language model takes."""

    def media_plan(
        self, kind: MediaKind, sampling: FrameSampling | None = None, *, is_folder: bool = False
    ) -> tuple[FrameSampling, Crop]:
        """How one piece of media is read: a video as `sampling` (None: this one's own) says, an image as one frame.

        A video that is a folder of frames is prepared like images, as upstream does.
        """
        if kind == "image":
            return FrameSampling(num_frames=1), self.image_crop
        return sampling or self.sampling, self.image_crop if is_folder else self.video_crop


def read_processor_config(folder: str | PathLike[str]) -> ProcessorConfig:
    """Open processor_config.json of a model folder; raises CheckpointError naming the file that does not fit."""
    path = Path(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; give a model folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a mapping, got {type(values).__name__}")
    values.pop("processor_class", None)
    return validate_config(ProcessorConfig, values, source=str(path))


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
        self.stop_strings: tuple[str, ...] = _STOP_STRINGS[config.prompt_style]
        """Text that ends an answer beside the tokens; `decode` cuts there. Empty for the style `valley`."""
        self._encoding = _ENCODINGS[config.prompt_style]

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
    def from_pretrained(cls, folder: str | PathLike[str]) -> "ValleyProcessor":
        """Open the processor of a model folder; raises CheckpointError naming the file that does not fit."""
        config = read_processor_config(folder)
        return cls(_open_tokenizer(Path(folder)), config)

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
            ConversationError, PromptTooLongError: as `chat.encode.encode_training` says.
        """
        encoded: Encoded = self._encoding.encode_training(
            self.tokenizer,
            conversation,
            system_prompt=self.system_prompt,
            num_patches=self.num_patches,
            num_frames=num_frames,
            max_length=self.max_length,
        )
        return encoded

    def encode_prompt(self, conversation: Conversation, num_frames: Sequence[int]) -> tuple[int, ...]:
        """Tokens up to the cue for the answer: the first tokens that `encode_training` gives.

        Raises:
            ConversationError, PromptTooLongError: as `chat.encode.encode_prompt` says.
        """
        prompt: tuple[int, ...] = self._encoding.encode_prompt(
            self.tokenizer,
            conversation,
            system_prompt=self.system_prompt,
            num_patches=self.num_patches,
            num_frames=num_frames,
            max_length=self.max_length,
        )
        return prompt

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of an answer: special and added tokens dropped, cut at the first stop string, stripped."""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        for stop in self.stop_strings:
            text = text.partition(stop)[0]
        return text.strip()

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with anything that changes tokens or pixels."""
        parts = {
            "version": ENCODING_VERSION,
            "config": self.config.model_dump(mode="json"),
            "tokenizer": _tokenizer_content(self.tokenizer),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _open_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer: tokenizer.json by transformers, else tokenizer.model by sentencepiece."""
    from valley_ray.chat.sentencepiece import MODEL_FILE, SentencePieceTokenizer

    if (folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        try:
            tokenizer: Tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # tokenizers raises Exception itself, transformers whatever an odd file leads to
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{folder}: the tokenizer cannot be opened ({reason}); copy its files again"
            ) from error
        return tokenizer
    if (folder / MODEL_FILE).is_file():
        return SentencePieceTokenizer(folder)
    raise CheckpointError(
        f"{folder} has neither tokenizer.json nor {MODEL_FILE}; copy the tokenizer's files beside the model"
    )


def _tokenizer_content(tokenizer: Tokenizer) -> str:
    """Text that tells two tokenizers apart: the whole of a fast one, else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return str(backend.to_str())
    return json.dumps(sorted(tokenizer.get_vocab().items()))
