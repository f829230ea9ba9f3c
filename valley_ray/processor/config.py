"""ProcessorConfig: everything beside the tokenizer that decides which tokens and pixels come out.

Importing this module loads no torch.
"""

from typing import Annotated

from pydantic import Field, model_validator

from valley_ray.chat.conversation import MediaKind
from valley_ray.chat.style import BosToken
from valley_ray.chat.templates import SYSTEM_PROMPT_V1, PromptStyle
from valley_ray.config import Config
from valley_ray.media.preprocess import Crop
from valley_ray.media.sampling import FrameSampling

NonEmptyText = Annotated[str, Field(min_length=1)]


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
    stop_strings: tuple[NonEmptyText, ...] | None = None
    """Text that ends an answer beside the end token. None: the style's own ("###" of the upstream ones)."""
    stop_skips_first_token: bool = False
    """Upstream's rule: an answer's first token is not searched for `stop_strings`, and what they end is not cut."""
    only_mask_system: bool = False
    """`upstream-train` alone: learn the user's turns too. Upstream's switch of that name never takes effect."""
    bos_token: BosToken = "own"
    """First token of a sequence; `eos` is what upstream takes where the model's path contains "llama"."""
    max_length: int = Field(default=2048, ge=1)
    """Tokens that the language model takes."""

    @model_validator(mode="after")
    def _check(self) -> "ProcessorConfig":
        if self.only_mask_system and self.prompt_style != "upstream-train":
            raise ValueError(f"only_mask_system belongs to prompt_style 'upstream-train', got {self.prompt_style!r}")
        return self

    def media_plan(
        self, kind: MediaKind, sampling: FrameSampling | None = None, *, is_folder: bool = False
    ) -> tuple[FrameSampling, Crop]:
        """How one piece of media is read: a video as `sampling` (None: this one's own) says, an image as one frame.

        The frames of a folder (`is_folder`) are sampled as a video's and prepared as images, as upstream does.
        """
        if kind == "image":
            return FrameSampling(num_frames=1), self.image_crop
        return sampling or self.sampling, self.image_crop if is_folder else self.video_crop
