"""Model folders whose files do not fit together are one CheckpointError, never transformers' traceback."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny_valley

from valley_ray.assistant import Assistant
from valley_ray.errors import CheckpointError


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text_config": 5}, "mapping under text_config"),
        ({"text_config": None, "vision_config": None}, "mapping under text_config and vision_config"),
        ({"text_config": {"model_type": "llama", "hidden_size": "x"}}, "cannot be used"),
        ({"text_config": {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 5}}, "cannot be used"),
        ({"vision_layer": -99}, "vision_layer=-99"),
        ({"im_patch_token_id": 3}, "<im_patch> is"),
    ],
)
def test_configurations_that_cannot_be_opened(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = make_tiny_valley(tmp_path / "model")
    change(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=said):
        Assistant.from_pretrained(folder)


def test_a_processor_of_another_model(tmp_path: Path) -> None:
    folder = make_tiny_valley(tmp_path / "model")
    path = folder / "processor_config.json"
    values = json.loads(path.read_text())
    change(path, num_patches=values["num_patches"] + 1)
    with pytest.raises(CheckpointError, match="num_patches="):
        Assistant.from_pretrained(folder)
    crop = values["video_crop"]
    change(path, **{**values, "video_crop": {**crop, "size": crop["size"] - 1}})
    with pytest.raises(CheckpointError, match="the tower takes"):
        Assistant.from_pretrained(folder)


def test_an_index_without_file_names(tmp_path: Path) -> None:
    folder = make_tiny_valley(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}')
    with pytest.raises(CheckpointError, match="expected file names"):
        Assistant.from_pretrained(folder)
