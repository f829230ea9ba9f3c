"""ValleyConfig: which tower, which language model, and how the frames' features become visual tokens."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from valley_ray.errors import CheckpointError

ID_FIELD_OF_TOKEN = {
    "[PAD]": "pad_token_id",
    "<vi_frame>": "vi_frame_token_id",
    "<vi_start>": "vi_start_token_id",
    "<vi_end>": "vi_end_token_id",
    "<im_patch>": "im_patch_token_id",
    "<im_start>": "im_start_token_id",
    "<im_end>": "im_end_token_id",
}
"""The seven added tokens in training order (chat/tokens.py spells them for prompts) and the fields of their ids."""


@strict
class ValleyConfig(PreTrainedConfig):
    """Configuration of `ValleyForConditionalGeneration`; saved as config.json of a model folder."""

    model_type = "valley"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # noqa: RUF012  # the name transformers reads

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    """Of any causal language model."""
    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    """Of any vision tower; `image_size` and `patch_size` fix the number of patches."""
    vision_layer: int = -2
    """Hidden state taken from the tower; -2 leaves out the last layer and the norm after it (upstream's choice)."""
    pooling: str = "mean"
    """How T frames' patches become one set of patch tokens: mean, max, importance or delta (model/pooling.py)."""
    temporal_dropout: float = 0.1
    """Dropout of delta pooling's encoder in training (upstream's layer leaves torch's default)."""
    splice: str = "strict"
    """How visual tokens meet their placeholders: strict, upstream or upstream-serve (model/splice.py)."""
    vi_frame_token_id: int = -1
    """Placeholder of one frame token."""
    vi_start_token_id: int = -1
    vi_end_token_id: int = -1
    im_patch_token_id: int = -1
    """Placeholder of one patch token."""
    im_start_token_id: int = -1
    im_end_token_id: int = -1
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        text_config = _sub_config(self.text_config, "text_config", default="llama")
        self.text_config = text_config
        self.vision_config = _sub_config(self.vision_config, "vision_config", default="clip_vision_model")
        self.tie_word_embeddings = bool(text_config.tie_word_embeddings)
        super().__post_init__(**kwargs)

    @property
    def num_patches(self) -> int:
        """P, patch tokens per visual block."""
        return int(self.vision_config.image_size // self.vision_config.patch_size) ** 2  # type: ignore[union-attr]

    @property
    def image_size(self) -> int:
        """S, side of the square crop in pixels."""
        return int(self.vision_config.image_size)  # type: ignore[union-attr]


def _sub_config(value: Any, name: str, *, default: str) -> PreTrainedConfig:
    if value is None:
        return CONFIG_MAPPING[default]()
    if not isinstance(value, dict):
        return value
    model_type = value.get("model_type", default)
    if model_type not in CONFIG_MAPPING or model_type == ValleyConfig.model_type:
        raise CheckpointError(
            f"config.json: {name} has model_type {model_type!r}, which is no part that this transformers knows"
        )
    return CONFIG_MAPPING[model_type](**{key: item for key, item in value.items() if key != "model_type"})


AutoConfig.register(ValleyConfig.model_type, ValleyConfig)
