"""A tiny model in the original's layout."""

import json
from pathlib import Path

import pytest
import torch
from tiny import make_tiny_valley

from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.checkpoint import their_name
from valley_ray.model.config import ID_FIELD_OF_TOKEN


@pytest.fixture
def upstream_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`theirs`, written as the original's callback writes it, beside the same model in `ours` and its tower's folder.

    The working directory is the folder of all three.
    """
    monkeypatch.chdir(tmp_path)
    model = ValleyForConditionalGeneration.from_pretrained(make_tiny_valley(tmp_path / "ours"))
    folder = tmp_path / "theirs"
    folder.mkdir()
    state = {their_name(name): value for name, value in model.state_dict().items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    torch.save(state, folder / "pytorch_model.bin")
    text = model.config.text_config.to_dict() | {"model_type": "valley", "mm_vision_tower": "tower"}
    text |= {"mm_vision_select_layer": model.config.vision_layer}
    (folder / "config.json").write_text(json.dumps(text))
    added = {token: getattr(model.config, field) for token, field in ID_FIELD_OF_TOKEN.items()}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    model.vision_tower.save_pretrained(tmp_path / "tower")
    return folder
