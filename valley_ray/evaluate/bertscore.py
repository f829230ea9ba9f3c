"""BERTScore (Zhang et al. 2020): how near the tokens of two texts are in the vectors of an encoder on disk.

F1 of greedy matching by cosine, special tokens without weight, no idf, not rescaled: the numbers of the authors'
package with its defaults.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from valley_ray.errors import CheckpointError, ConfigError

BEST_LAYERS = {
    ("bert", 12): 9,
    ("bert", 24): 18,
    ("roberta", 12): 10,
    ("roberta", 24): 17,
    ("distilbert", 6): 5,
    ("xlm-roberta", 12): 9,
    ("xlm-roberta", 24): 17,
}
"""(kind of encoder, layers) → the layer that agrees best with people, as the authors found."""


class BertScore:
    """An opened encoder."""

    def __init__(self, folder: Path, *, layer: int | None = None, device: str = "cpu", batch_size: int = 32) -> None:
        """Open the encoder.

        Raises:
            CheckpointError: the folder cannot be opened.
            ConfigError: the encoder has fewer layers than `layer`.
        """
        from transformers import AutoModel, AutoTokenizer

        if not (folder / "config.json").is_file():
            raise CheckpointError(f"bertscore_model={str(folder)!r} is no model folder (no config.json in it)")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            self._encoder: Any = AutoModel.from_pretrained(folder).to(device).eval()
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"bertscore_model={str(folder)!r} cannot be opened ({reason})") from error
        config = self._encoder.config
        num_layers = config.num_hidden_layers
        self._layer = layer or BEST_LAYERS.get((config.model_type, num_layers), num_layers)
        if self._layer > num_layers:
            raise ConfigError(f"bertscore_layer={layer} of an encoder of {num_layers} layers; lower it")
        self._device, self._batch_size = device, batch_size

    def scores(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """F1 of each pair; 0 where one of the texts is empty."""
        pairs = list(zip(predictions, references, strict=True))
        full = [place for place, (ours, theirs) in enumerate(pairs) if ours.strip() and theirs.strip()]
        found = [0.0] * len(pairs)
        for first in range(0, len(full), self._batch_size):
            places = full[first : first + self._batch_size]
            ours, theirs = (self._vectors([pairs[place][side] for place in places]) for side in (0, 1))
            for place, one, other in zip(places, ours, theirs, strict=True):
                found[place] = _f1(*one, *other)
        return found

    @torch.inference_mode()
    def _vectors(self, texts: Sequence[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each text the unit vectors [L, D] of its tokens, and which are no special ones, bool [L]."""
        encoded = self._tokenizer(
            [text.strip() for text in texts],
            padding=True,
            truncation=True,
            max_length=min(self._tokenizer.model_max_length, 512),
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
        is_special = encoded.pop("special_tokens_mask").bool()
        output = self._encoder(**encoded.to(self._device), output_hidden_states=True)
        vectors = torch.nn.functional.normalize(output.hidden_states[self._layer].float(), dim=-1).cpu()
        rows = zip(vectors, is_special, encoded["attention_mask"].bool().cpu(), strict=True)
        return [(vector[mask], ~special[mask]) for vector, special, mask in rows]


def _f1(ours: torch.Tensor, is_ours: torch.Tensor, theirs: torch.Tensor, is_theirs: torch.Tensor) -> float:
    if not is_ours.any() or not is_theirs.any():
        return 0.0
    likeness = ours @ theirs.T
    precision = float(likeness.amax(dim=1)[is_ours].mean())
    recall = float(likeness.amax(dim=0)[is_theirs].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
