"""Makes room for the seven added tokens in a tokenizer and a language model, as upstream's training start does.

Knows no Valley class; `ValleyForConditionalGeneration.from_backbones` is built on it.
"""

from typing import Any

import torch
from torch import nn
from transformers import AddedToken, PreTrainedTokenizerBase

from valley_ray.errors import CheckpointError
from valley_ray.model.config import ID_FIELD_OF_TOKEN


def add_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Add those of the seven tokens that `tokenizer` lacks, in training order, and make [PAD] its pad token.

    Returns their ids by the name of the ValleyConfig field.
    """
    known = tokenizer.get_added_vocab()
    new = [AddedToken(token, special=True, normalized=False) for token in ID_FIELD_OF_TOKEN if token not in known]
    tokenizer.add_tokens(new, special_tokens=True)
    tokenizer.pad_token = "[PAD]"
    return {field: tokenizer.convert_tokens_to_ids(token) for token, field in ID_FIELD_OF_TOKEN.items()}


@torch.no_grad()
def grow_embeddings(language_model: Any, ids: dict[str, int], *, num_tokens: int) -> None:
    """Give input embedding and head at least `num_tokens` rows and fill those of the added tokens in place.

    As upstream (valley/train/train.py and initialize_vision_tokenizer): [PAD] gets the mean of the rows before it;
    <im_start> and <im_end> get the mean of all rows before them, the new ones included; <vi_frame>, <vi_start>,
    <vi_end> and <im_patch> are drawn from the model's initial distribution (torch's global generator).
    """
    table = language_model.get_input_embeddings()
    if table.num_embeddings < num_tokens:
        language_model.resize_token_embeddings(num_tokens, mean_resizing=False)
    std = getattr(language_model.config, "initializer_range", 0.02)
    pad, im_start, im_end = ids["pad_token_id"], ids["im_start_token_id"], ids["im_end_token_id"]
    drawn = [token for token in ids.values() if token not in (pad, im_start, im_end)]
    for weight in _token_tables(language_model):
        weight[pad] = weight[:pad].mean(dim=0)
        weight[drawn] = torch.empty_like(weight[drawn]).normal_(0.0, std)
        weight[[im_start, im_end]] = weight[:im_start].mean(dim=0)


def embedding_dtype(language_model: nn.Module) -> torch.dtype:
    """Data type of the token table, which the projector shares."""
    return language_model.get_input_embeddings().weight.dtype  # type: ignore[operator,no-any-return]


def _token_tables(language_model: Any) -> list[torch.Tensor]:
    """Input table and head, one entry where they are tied."""
    head = language_model.get_output_embeddings()
    if head is None:
        raise CheckpointError(
            "the language model has no output head; give a causal language model (AutoModelForCausalLM)"
        )
    table = language_model.get_input_embeddings()
    return [table.weight] if head.weight is table.weight else [table.weight, head.weight]
