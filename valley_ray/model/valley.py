"""ValleyForConditionalGeneration: pixels and token ids → logits.

`vision_tower` is frozen and stands beside `core`, which holds everything that can be trained; a training engine wraps
`core` alone. Shapes: N frames over all clips, T frames of one clip, S crop side, P patches, Dv tower width.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from valley_ray.model.backbones import add_tokens, embedding_dtype, grow_embeddings
from valley_ray.model.checkpoint import load_folder
from valley_ray.model.config import ValleyConfig
from valley_ray.model.core import Features, ValleyCore
from valley_ray.model.vision import build_tower, check_pixels, encode_frames, vision_half


class ValleyForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The whole model; `generate` takes `pixel_values` or `features` beside `input_ids`."""

    config_class = ValleyConfig
    base_model_prefix = ""
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012  # the name transformers reads

    def __init__(
        self,
        config: ValleyConfig,
        *,
        vision_tower: nn.Module | None = None,
        language_model: nn.Module | None = None,
    ) -> None:
        super().__init__(config)
        self.vision_tower: Any = vision_tower or build_tower(config.vision_config)
        self.core = ValleyCore(config, language_model)
        self.vision_tower.requires_grad_(False)
        self.post_init()

    @classmethod
    def from_backbones(
        cls,
        vision_tower: Any,
        language_model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vision_layer: int = -2,
        pooling: str = "mean",
        splice: str = "strict",
    ) -> Self:
        """Put a pretrained tower and causal language model together: what stage 1 starts from.

        The modules are taken in, not copied (a CLIPModel gives its vision half); `tokenizer` gets the seven added
        tokens and the token tables their rows (parity note 22); projector and pooling are random. `open_backbones`
        opens the three by name or folder.

        Raises:
            CheckpointError: an unknown pooling or splice, or a language model without a head.
        """
        ids = add_tokens(tokenizer)
        grow_embeddings(language_model, ids, num_tokens=len(tokenizer))
        tower: Any = vision_half(vision_tower)
        config = ValleyConfig(
            text_config=language_model.config.to_dict(),
            vision_config=tower.config.to_dict(),
            vision_layer=vision_layer,
            pooling=pooling,
            splice=splice,
            **ids,
        )
        model = cls(config, vision_tower=tower, language_model=language_model)
        dtype = embedding_dtype(language_model)
        model.core.mm_projector.to(dtype)
        model.core.pooling.to(dtype)
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.eval()
        return model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        splice: str | None = None,
        allow_bin: bool = True,
        base: str | Path | None = None,
        **kwargs: Any,
    ) -> Self:
        """Open a model folder: ours, one of the original's released layout, or an adapter folder on its base.

        Args:
            pretrained_model_name_or_path: the folder.
            splice: replaces the rule in config.json.
            allow_bin: False refuses pickled weights (`.bin`), which are otherwise opened without running code.
            base: folder under an adapter, where the one that it names is out of reach.
            kwargs: as transformers' `from_pretrained` (dtype, device_map, attn_implementation).

        Raises:
            CheckpointError: no such folder, a damaged file, or a missing, unexpected or odd-shaped weight.
        """
        load = partial(super().from_pretrained, **kwargs)
        base = None if base is None else Path(base)
        model: Self = load_folder(load, Path(pretrained_model_name_or_path), allow_bin=allow_bin, base=base)
        model.vision_tower.requires_grad_(False)
        if splice is not None:
            model.core.use_splice(splice)
        return model

    def get_input_embeddings(self) -> nn.Module:
        """The language model's input embedding."""
        embeddings: nn.Module = self.core.language_model.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's input embedding."""
        self.core.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        head: nn.Module = self.core.language_model.get_output_embeddings()
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's head."""
        self.core.language_model.set_output_embeddings(new_embeddings)

    def encode_frames(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features [N, 1 + P, Dv] of float `pixel_values` [N, 3, S, S] (normalised), frame token first; no gradient.

        Raises:
            MediaError: pixels of another shape, or rounded more coarsely than the tower computes.
        """
        return encode_frames(self.vision_tower, pixel_values, self.config)

    def encode_clips(self, pixel_values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Features of several clips ([T, 3, S, S] each, T may differ) by one pass of the tower; errors as above."""
        for clip in pixel_values:
            check_pixels(clip, image_size=self.config.image_size, tower_dtype=self.vision_tower.dtype)
        features = self.encode_frames(torch.cat(list(pixel_values)))
        return list(features.split([len(clip) for clip in pixel_values]))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: Sequence[torch.Tensor] | None = None,
        features: Features | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `ValleyCore.forward`; `pixel_values` ([T, 3, S, S] per block) are encoded where no `features` come."""
        if features is None:
            features = self.encode_clips(pixel_values) if pixel_values is not None and len(pixel_values) else ()
        if labels is None:
            kwargs["logits_to_keep"] = logits_to_keep
        output: CausalLMOutputWithPast = self.core(
            input_ids,
            attention_mask,
            features,
            inputs_embeds=inputs_embeds,
            labels=labels,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **({} if use_cache is None else {"use_cache": use_cache}),
            **kwargs,
        )
        return output

    def prepare_inputs_for_generation(
        self, *args: Any, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Hand the media to the first step alone: later steps read them from the cache."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            *args, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("pixel_values", None)
            inputs.pop("features", None)
        return inputs


AutoModelForImageTextToText.register(ValleyConfig, ValleyForConditionalGeneration)
AutoModelForCausalLM.register(ValleyConfig, ValleyForConditionalGeneration)
