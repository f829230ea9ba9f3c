"""BERTScore against the formula worked out token by token, on a tiny random encoder."""

from pathlib import Path

import pytest
import torch
from tiny import make_tokenizer
from transformers import BertConfig, BertModel

from valley_ray.errors import CheckpointError, ConfigError
from valley_ray.evaluate.bertscore import BertScore

TEXTS = ["A red circle moves left", "red", "How many shapes do you see", ""]
OTHERS = ["A blue square moves right", "A red circle moves left", "How many shapes do you see", "red"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def by_hand(folder: Path, ours: str, theirs: str, layer: int) -> float:
    """One pair alone, token by token."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    first, second = (
        model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[layer][0]
        for text in (ours, theirs)
    )
    cosine = [[float(torch.cosine_similarity(a, b, dim=0)) for b in second] for a in first]
    precision = sum(max(row) for row in cosine) / len(cosine)
    recall = sum(max(row[place] for row in cosine) for place in range(len(second))) / len(second)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("layer", [None, 1])
def test_scores_are_the_formulas_whatever_stands_beside_them(encoder: Path, layer: int | None) -> None:
    scorer = BertScore(encoder, layer=layer, batch_size=3)
    found = scorer.scores(TEXTS, OTHERS)
    expected = [by_hand(encoder, *pair, layer or 3) for pair in zip(TEXTS[:3], OTHERS[:3], strict=True)]
    assert found == pytest.approx([*expected, 0.0], abs=1e-5)
    assert found[2] == pytest.approx(1.0)
    assert scorer.scores([], []) == []


def test_an_encoder_that_cannot_be_used_is_said(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model folder"):
        BertScore(tmp_path)
    with pytest.raises(ConfigError, match="bertscore_layer=9 of an encoder of 3 layers"):
        BertScore(encoder, layer=9)
