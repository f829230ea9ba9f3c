"""ValleyForConditionalGeneration: pixels and token ids → logits.

`vision_tower` is frozen and stands beside `core`, which holds everything that can be trained; a training engine wraps
`core` alone. Shapes: B rows, L tokens, T frames, S crop side, P patches, Dv tower width, D language width, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from valley_ray.errors import ConversationError
from valley_ray.model.backbones import add_tokens, embedding_dtype, grow_embeddings
from valley_ray.model.checkpoint import load_strictly
from valley_ray.model.config import ValleyConfig
from valley_ray.model.pooling import build_pooling
from valley_ray.model.vision import build_tower, extract_features, tower_width, vision_half

IGNORE_INDEX = -100
"""Label of a position that is not learned."""

Features = Sequence[torch.Tensor]
"""One [T, 1 + P, Dv] tensor per visual block, in the order of the blocks over the batch."""


class ValleyCore(nn.Module):
    """Projector, pooling and language model: features and token ids → logits."""

    def __init__(self, config: ValleyConfig, language_model: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        hidden_size = self.language_model.get_input_embeddings().embedding_dim
        self.mm_projector = nn.Linear(tower_width(config.vision_config), hidden_size)
        self.pooling = build_pooling(config.pooling)
        self._can_limit_logits = "logits_to_keep" in inspect.signature(self.language_model.forward).parameters

    def visual_tokens(self, features: torch.Tensor) -> torch.Tensor:
        """Tokens of one clip: [T, 1 + P, Dv] → [P + T, D], pooled patches first, then one token per frame."""
        projected = self.mm_projector(self.pooling.rows(features.to(self.mm_projector.weight.dtype)))
        return self.pooling.tokens(projected, num_frames=len(features))

    def embed(self, input_ids: torch.Tensor, visual_tokens: Features) -> torch.Tensor:
        """Embeddings [L, D] of `input_ids` int64 [L], with `visual_tokens` ([P + T, D] each) on the placeholders.

        Raises:
            ConversationError: the number of placeholders is not the number of visual tokens.
        """
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        if not visual_tokens:
            return embeddings
        rows = torch.cat(list(visual_tokens)).to(embeddings.dtype)
        is_placeholder = (input_ids == self.config.im_patch_token_id) | (input_ids == self.config.vi_frame_token_id)
        positions = is_placeholder.nonzero().squeeze(-1)
        if len(positions) != len(rows):
            raise ConversationError(
                f"the token ids hold {len(positions)} visual placeholders but the media give {len(rows)} visual tokens; "
                "encode the prompt with the frame counts of the media"
            )
        return embeddings.index_copy(0, positions, rows)

    def embed_batch(self, input_ids: torch.Tensor, features: Features = ()) -> torch.Tensor:
        """Embeddings [B, L, D] of a batch; the projector is called once, also for a batch without media.

        A zero row always goes through the projector and is added with weight zero, so that every rank of a data-parallel
        run has a gradient for it and ZeRO gathers the same weights in the same order on all of them.
        """
        dtype = self.mm_projector.weight.dtype
        rows = [self.pooling.rows(clip.to(dtype)) for clip in features]
        zero = torch.zeros(1, self.mm_projector.in_features, dtype=dtype, device=input_ids.device)
        projected = self.mm_projector(torch.cat([zero, *rows])).split([1, *map(len, rows)])
        tokens = [
            self.pooling.tokens(part, num_frames=len(clip)) for part, clip in zip(projected[1:], features, strict=True)
        ]
        embeddings = self.embed(input_ids.flatten(), tokens) + 0.0 * projected[0].sum()
        return embeddings.unflatten(0, input_ids.shape)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        features: Features = (),
        *,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        loss_reduction: Literal["mean", "sum"] = "mean",
        return_logits: bool = True,
        **language_model_kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the language model over text and visual tokens.

        Args:
            input_ids: int64 [B, L].
            attention_mask: [B, L] of 0 and 1, or what the language model takes as a 4-D mask (packed rows).
            features: one tensor per visual block, in the order of the blocks over the batch.
            inputs_embeds: [B, L, D] instead of `input_ids` and `features`.
            labels: int64 [B, L], -100 where nothing is learned; position i is predicted from i - 1.
            loss_reduction: mean over the batch's learned tokens, or their sum (to be divided by a global count).
            return_logits: False with `labels` computes logits only where some row learns, and returns none of them:
                the loss is the same, memory and time go with the answers' length.
            language_model_kwargs: position_ids, past_key_values, use_cache, logits_to_keep and the like.

        Returns:
            `.logits` [B, L, V] (None where not asked for), `.loss` float32 scalar (None without labels),
            `.past_key_values`.
        """
        if inputs_embeds is None:
            assert input_ids is not None, "give input_ids or inputs_embeds"
            inputs_embeds = self.embed_batch(input_ids, features)
        targets = None
        if labels is not None:
            language_model_kwargs.setdefault("use_cache", False)
            targets = labels[:, 1:]
            if not return_logits and self._can_limit_logits:
                predicting = (targets != IGNORE_INDEX).any(dim=0).nonzero().squeeze(-1)
                targets = targets[:, predicting]
                language_model_kwargs["logits_to_keep"] = predicting
        output = self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, **language_model_kwargs
        )
        if targets is None:
            return output
        logits = output.logits[:, : targets.shape[1]]
        output.loss = token_loss(logits, targets, reduction=loss_reduction)
        if not return_logits:
            output.logits = None
        return output


def token_loss(logits: torch.Tensor, targets: torch.Tensor, *, reduction: Literal["mean", "sum"]) -> torch.Tensor:
    """Cross entropy in float32 of [B, K, V] logits against int64 [B, K] targets (-100 ignored); 0 where none is learned."""
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    if reduction == "sum":
        return total
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


class ValleyForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # untyped bases
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
        self.vision_tower = vision_tower or build_tower(config.vision_config)
        self.core = ValleyCore(config, language_model)
        self.vision_tower.requires_grad_(False)
        self.post_init()

    @classmethod
    def from_backbones(
        cls,
        vision_tower: nn.Module,
        language_model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vision_layer: int = -2,
        pooling: str = "mean",
    ) -> Self:
        """Put a pretrained tower and causal language model together: what stage 1 starts from.

        The modules are taken in, not copied (a CLIPModel gives its vision half); `tokenizer` gets the seven added tokens
        and the token tables their rows (parity note 22); the projector is random.

        Raises:
            CheckpointError: an unknown pooling, or a language model without a head.
        """
        ids = add_tokens(tokenizer)
        grow_embeddings(language_model, ids, num_tokens=len(tokenizer))
        tower = vision_half(vision_tower)
        config = ValleyConfig(
            text_config=language_model.config.to_dict(),
            vision_config=tower.config.to_dict(),
            vision_layer=vision_layer,
            pooling=pooling,
            **ids,
        )
        model = cls(config, vision_tower=tower, language_model=language_model)
        model.core.mm_projector.to(embedding_dtype(language_model))
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Open a model folder; arguments as transformers' `from_pretrained` (dtype, device_map, attn_implementation).

        Raises:
            CheckpointError: no such folder, a damaged file, or a weight that is missing, unexpected or of another shape.
        """
        load = partial(super().from_pretrained, **kwargs)
        model: Self = load_strictly(load, Path(pretrained_model_name_or_path))
        return model

    def get_input_embeddings(self) -> nn.Module:
        """The language model's input embedding."""
        return self.core.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's input embedding."""
        self.core.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.core.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's head."""
        self.core.language_model.set_output_embeddings(new_embeddings)

    @torch.no_grad()
    def encode_frames(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features [N, 1 + P, Dv] of float `pixel_values` [N, 3, S, S] (normalised), frame token first; no gradient."""
        self.vision_tower.eval()
        pixel_values = pixel_values.to(self.vision_tower.dtype)
        return extract_features(
            self.vision_tower, pixel_values, layer=self.config.vision_layer, num_patches=self.config.num_patches
        )

    def encode_clips(self, pixel_values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Features of several clips ([T, 3, S, S] each, T may differ) by one pass of the tower."""
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
        """As `ValleyCore.forward`; `pixel_values` ([T, 3, S, S] per visual block) are encoded where no `features` come."""
        if features is None:
            features = self.encode_clips(pixel_values) if pixel_values is not None and len(pixel_values) else ()
        if labels is None:
            kwargs["logits_to_keep"] = logits_to_keep
        return self.core(
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

    def prepare_inputs_for_generation(
        self, *args: Any, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Hand the media to the first step alone: later steps read them from the cache."""
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("pixel_values", None)
            inputs.pop("features", None)
        return inputs


AutoModelForImageTextToText.register(ValleyConfig, ValleyForConditionalGeneration)
AutoModelForCausalLM.register(ValleyConfig, ValleyForConditionalGeneration)
