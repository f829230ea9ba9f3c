"""The original's checkpoint layout: what is refused, and by which words (its numbers: tests/parity)."""

import json
import os
from pathlib import Path

import pytest
import torch
from tiny import make_tiny_valley

from valley_ray.errors import CheckpointError
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.config import ID_FIELD_OF_TOKEN


@pytest.fixture
def upstream_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model written as the original's callback writes it, with its tower's folder in the working directory."""
    monkeypatch.chdir(tmp_path)
    model = ValleyForConditionalGeneration.from_pretrained(make_tiny_valley(tmp_path / "ours"))
    folder = tmp_path / "theirs"
    folder.mkdir()
    names = {
        "vision_tower.": "model.vision_tower.vision_model.",
        "core.mm_projector.": "model.mm_projector.",
        "core.language_model.": "",
    }
    state = {
        next(theirs + name.removeprefix(ours) for ours, theirs in names.items() if name.startswith(ours)): value
        for name, value in model.state_dict().items()
    }
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    torch.save(state, folder / "pytorch_model.bin")
    text = model.config.text_config.to_dict() | {"model_type": "valley", "mm_vision_tower": "tower"}
    (folder / "config.json").write_text(json.dumps(text))
    added = {token: getattr(model.config, field) for token, field in ID_FIELD_OF_TOKEN.items()}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    model.vision_tower.save_pretrained(tmp_path / "tower")
    return folder


def test_upstream_layout_opens_to_the_same_weights(upstream_folder: Path) -> None:
    theirs = ValleyForConditionalGeneration.from_pretrained(upstream_folder)
    ours = ValleyForConditionalGeneration.from_pretrained(upstream_folder.parent / "ours").state_dict()
    assert theirs.state_dict().keys() == ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.state_dict().items())
    assert theirs.config.im_patch_token_id > 0
    assert theirs.generation_config.eos_token_id == theirs.config.text_config.eos_token_id


def test_a_pickle_that_is_not_tensors_is_not_run(upstream_folder: Path) -> None:
    torch.save({"model.norm.weight": RunsCode()}, upstream_folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds more than tensors"):
        ValleyForConditionalGeneration.from_pretrained(upstream_folder)
    assert not (upstream_folder.parent / "executed").exists()


def test_partial_and_damaged_checkpoints_are_named(upstream_folder: Path) -> None:
    weights = upstream_folder / "pytorch_model.bin"
    state = torch.load(weights)
    torch.save({name: value for name, value in state.items() if name != "lm_head.weight"}, weights)
    with pytest.raises(CheckpointError, match=r"1 weights missing: lm_head\.weight"):
        ValleyForConditionalGeneration.from_pretrained(upstream_folder)
    weights.write_bytes(b"not a weight file")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        ValleyForConditionalGeneration.from_pretrained(upstream_folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors and no pytorch_model\.bin"):
        ValleyForConditionalGeneration.from_pretrained(upstream_folder)
    index = {"weight_map": {"lm_head.weight": "pytorch_model-00001-of-00002.bin"}}
    (upstream_folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks weight files .*pytorch_model-00001-of-00002\.bin"):
        ValleyForConditionalGeneration.from_pretrained(upstream_folder)


def test_missing_added_tokens_are_named(upstream_folder: Path) -> None:
    (upstream_folder / "added_tokens.json").write_text(json.dumps({"[PAD]": 48}))
    with pytest.raises(CheckpointError, match=r"added_tokens\.json lacks <vi_frame>"):
        ValleyForConditionalGeneration.from_pretrained(upstream_folder)


class RunsCode:
    """Unpickled without care, it makes a file."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)
