"""ValleyCore: features and token ids → logits and loss. Everything that can be trained is in here.

Shapes: B rows, L tokens, T frames, P patches, Dv tower width, D language width, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from valley_ray.errors import ConversationError
from valley_ray.model.config import ValleyConfig
from valley_ray.model.pooling import Pooling, build_pooling
from valley_ray.model.vision import tower_width

IGNORE_INDEX = -100
"""Label of a position that is not learned."""

Features = Sequence[torch.Tensor]
"""One [T, 1 + P, Dv] tensor per visual block, in the order of the blocks over the batch."""


class ValleyCore(PreTrainedModel):
    """Projector, pooling and language model: features and token ids → logits.

    A PreTrainedModel only so that the language model's tied weights, split plan and the like reach the whole model.
    """

    config_class = ValleyConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    language_model: Any
    """Any Hugging Face causal language model."""

    def __init__(self, config: ValleyConfig, language_model: nn.Module | None = None) -> None:
        super().__init__(config)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        hidden_size = self.language_model.get_input_embeddings().embedding_dim
        self.mm_projector = nn.Linear(tower_width(config.vision_config), hidden_size)
        self.pooling: Pooling = build_pooling(config.pooling)
        self._can_limit_logits = "logits_to_keep" in inspect.signature(self.language_model.forward).parameters
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's input embedding."""
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def visual_tokens(self, features: torch.Tensor) -> torch.Tensor:
        """Tokens of one clip: [T, 1 + P, Dv] → [P + T, D], pooled patches first, then one token per frame."""
        projected = self.mm_projector(self.pooling.rows(features.to(self.mm_projector.weight.dtype)))
        return self.pooling.tokens(projected, num_frames=len(features))

    def embed(self, input_ids: torch.Tensor, visual_tokens: Features) -> torch.Tensor:
        """Embeddings [L, D] of `input_ids` int64 [L], with `visual_tokens` ([P + T, D] each) on the placeholders.

        Raises:
            ConversationError: the number of placeholders is not the number of visual tokens.
        """
        embeddings: torch.Tensor = self.get_input_embeddings()(input_ids)
        is_placeholder = (input_ids == self.config.im_patch_token_id) | (input_ids == self.config.vi_frame_token_id)
        positions = is_placeholder.nonzero().squeeze(-1)
        num_rows = sum(map(len, visual_tokens))
        if len(positions) != num_rows:
            raise ConversationError(
                f"the token ids hold {len(positions)} visual placeholders but the media give {num_rows} visual tokens; "
                "encode the prompt with the frame counts of the media"
            )
        if not num_rows:
            return embeddings
        return embeddings.index_copy(0, positions, torch.cat(list(visual_tokens)).to(embeddings.dtype))

    def embed_batch(self, input_ids: torch.Tensor, features: Features = ()) -> torch.Tensor:
        """Embeddings [B, L, D] of a batch; the projector is called once, also for a batch without media.

        A zero row always goes through the projector and is added with weight zero, so that every rank of a
        data-parallel run has a gradient for it and ZeRO gathers the same weights in the same order on all of them.
        """
        dtype = self.mm_projector.weight.dtype
        rows = [self.pooling.rows(clip.to(dtype)) for clip in features]
        zero = torch.zeros(1, self.mm_projector.in_features, dtype=dtype, device=input_ids.device)
        projected = self.mm_projector(torch.cat([zero, *rows])).split([1, *map(len, rows)])
        tokens = [
            self.pooling.tokens(part, num_frames=len(clip)) for part, clip in zip(projected[1:], features, strict=True)
        ]
        embeddings: torch.Tensor = self.embed(input_ids.flatten(), tokens) + 0.0 * projected[0].sum()
        return embeddings.view(*input_ids.shape, -1)

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
            is_next_step = _cached_length(language_model_kwargs.get("past_key_values")) > 0 and not features
            # A model may write a placeholder itself: in later steps it is a token like any other.
            inputs_embeds = (
                self.get_input_embeddings()(input_ids) if is_next_step else self.embed_batch(input_ids, features)
            )
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
    """Cross entropy, in float32, of [B, K, V] logits against int64 [B, K] targets; -100 is ignored, 0 if all are."""
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    if reduction == "sum":
        return total
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def _cached_length(past_key_values: Any) -> int:
    return 0 if past_key_values is None else int(past_key_values.get_seq_length())
