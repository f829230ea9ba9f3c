"""Opens a tower, a language model and its tokenizer, and makes room for the seven added tokens in the latter two.

Knows no Valley class; `ValleyForConditionalGeneration.from_backbones` puts together what comes from here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AddedToken, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from valley_ray.errors import CheckpointError
from valley_ray.model.config import ID_FIELD_OF_TOKEN
from valley_ray.model.vision import vision_half
from valley_ray.model.weight_files import listed


def open_backbones(
    tower: str | Path, language_model: str | Path, *, dtype: torch.dtype | str = "auto"
) -> tuple[Any, Any, PreTrainedTokenizerBase]:
    """Open what stage 1 starts from, each by folder or hub name: tower, causal language model, its tokenizer.

    Any Hugging Face vision tower with square patches serves (of a two-sided model the vision half is taken), and any
    causal language model; `dtype` is that of both, "auto" as in their files.

    Raises:
        CheckpointError: something is out of reach or damaged, lacks weights, or is no vision tower or language model.
    """
    vision = vision_half(_open(AutoModel.from_pretrained, tower, "vision tower", dtype=dtype))
    absent = [field for field in ("hidden_size", "image_size", "patch_size") if not hasattr(vision.config, field)]
    if absent:
        raise CheckpointError(f"vision tower {tower}: its config.json has no {', '.join(absent)}; give a vision model")
    language = _open(AutoModelForCausalLM.from_pretrained, language_model, "language model", dtype=dtype)
    return vision, language, _open_tokenizer(language_model)


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


def _open(load: Callable[..., Any], name: str | Path, what: str, *, dtype: torch.dtype | str) -> Any:
    """A model by folder or hub name, every weight from its files."""
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise CheckpointError(f"{what} {name}: there is no such folder; give a folder or a name on the hub")
    try:
        model, info = load(name, dtype=dtype, output_loading_info=True)
    except SafetensorError as error:
        raise CheckpointError(f"{what} {name}: a weight file is damaged ({error}); copy it again") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{what} {name} does not open ({reason}); give a folder with its files or a name on the hub"
        ) from error
    # A tower's pooler stands behind the hidden state that is taken, and many folders leave it out.
    missing = [weight for weight in info["missing_keys"] if "pooler." not in weight]
    if problems := listed("missing", missing):
        raise CheckpointError(f"{what} {name}: {problems[0]}; copy its weight files again")
    model.eval()
    return model


def _open_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
    else:
        # Without its files transformers makes up a tokenizer that knows its special tokens alone.
        if len(tokenizer) > len(tokenizer.all_special_tokens):
            return tokenizer
        reason = "it has no words"
    raise CheckpointError(
        f"language model {name}: its tokenizer does not open ({reason}); copy the tokenizer's files into the folder"
    )


def _token_tables(language_model: Any) -> list[torch.Tensor]:
    """Input table and head, one entry where they are tied."""
    head = language_model.get_output_embeddings()
    if head is None:
        raise CheckpointError(
            "the language model has no output head; give a causal language model (AutoModelForCausalLM)"
        )
    table = language_model.get_input_embeddings()
    return [table.weight] if head.weight is table.weight else [table.weight, head.weight]
