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

from valley_ray.model.config import ValleyConfig
from valley_ray.model.pooling import Pooling, build_pooling
from valley_ray.model.splice import Splice, build_splice
from valley_ray.model.vision import tower_width

IGNORE_INDEX = -100
"""Label of a position that is not learned."""

Features = Sequence[torch.Tensor]
"""One tensor per clip, in the order of the visual blocks over the batch: [T, 1 + P, Dv] (for mean pooling also its rows
[P + T, Dv]), or its visual tokens."""


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
        self.pooling: Pooling = build_pooling(config, hidden_size=hidden_size)
        self._splice: Splice = build_splice(config)
        self._can_limit_logits = "logits_to_keep" in inspect.signature(self.language_model.forward).parameters
        self.post_init()

    def use_splice(self, name: str) -> None:
        """Change the rule by which visual tokens meet their placeholders; it is saved with the model.

        Raises:
            CheckpointError: there is no rule `name`.
        """
        self.config.splice = name
        self._splice = build_splice(self.config)

    def get_input_embeddings(self) -> nn.Module:
        """The language model's input embedding."""
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def visual_tokens(self, features: torch.Tensor) -> torch.Tensor:
        """Tokens of one clip: [T, 1 + P, Dv] → [P + T, D], pooled patches first, then one token per frame."""
        return self._tokens_of([features])[0]

    def embed(self, input_ids: torch.Tensor, visual_tokens: Features) -> torch.Tensor:
        """Embeddings [L, D] of one row `input_ids` int64 [L], with `visual_tokens` ([P + T, D] each) on placeholders.

        Raises:
            ConversationError: visual tokens and placeholders do not fit by the rule of `config.splice`.
        """
        return self._embed(input_ids[None], visual_tokens)[0]

    def embed_batch(
        self, input_ids: torch.Tensor, features: Features = (), *, blank: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embeddings [B, L, D] of a batch; projector and pooling are called once, also for a batch without media.

        A batch without media sends a clip of zeros (or `blank` [T, 1 + P, Dv]) through both and adds it with weight
        zero, so that every rank of a data-parallel run has a gradient for them and ZeRO gathers the same weights in
        the same order on all.
        """
        if len(features):
            return self._embed(input_ids, self._tokens_of(features))
        if blank is None:
            shape = (1, 1 + self.config.num_patches, self.mm_projector.in_features)
            blank = torch.zeros(shape, dtype=self.mm_projector.weight.dtype, device=input_ids.device)
        # Before the embedding, as with media: ZeRO-3 hangs where ranks gather weights in another order.
        nothing = 0.0 * self._tokens_of([blank])[0].sum()
        embeddings = self._embed(input_ids, ())
        return embeddings + nothing.to(embeddings.dtype)

    def _tokens_of(self, features: Features) -> list[torch.Tensor]:
        """Visual tokens [P + T, D] of every clip, by one call of the projector and of the pooling."""
        rows = [self.pooling.rows(clip.to(self.mm_projector.weight.dtype)) for clip in features]
        projected = self.mm_projector(torch.cat(rows)).split([len(part) for part in rows])
        return self.pooling.tokens(projected, [len(clip) for clip in features])

    def _embed(self, input_ids: torch.Tensor, visual_tokens: Features) -> torch.Tensor:
        """[B, L] and the visual tokens of its clips → [B, L, D]."""
        embeddings: torch.Tensor = self.get_input_embeddings()(input_ids)
        placement = self._splice(input_ids, visual_tokens)
        if placement is None:
            return embeddings
        spliced = embeddings.flatten(0, 1).index_copy(0, placement.positions, placement.tokens.to(embeddings.dtype))
        return spliced.view_as(embeddings)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        features: Features = (),
        *,
        inputs_embeds: torch.Tensor | None = None,
        blank: torch.Tensor | None = None,
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
            blank: features that a batch without media has gradients for, of zero; see `embed_batch`.
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
            if is_next_step:
                inputs_embeds = self.get_input_embeddings()(input_ids)
            else:
                inputs_embeds = self.embed_batch(input_ids, features, blank=blank)
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
