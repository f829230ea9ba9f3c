"""Model folders whose files do not fit together are one CheckpointError, never transformers' traceback."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
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
        ({"im_patch_token_id": 10**6}, "ids: <im_patch> 1000000"),
        ({"text_config": {"model_type": "valley"}}, "no part that this transformers knows"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "no model that can be built"),
    ],
)
def test_configurations_that_cannot_be_opened(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = make_tiny_valley(tmp_path / "model")
    change(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=said):
        Assistant.from_pretrained(folder)


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("text_config", {"vocab_size": 10**12}, "vocab_size=1000000000000 of llama"),
        ("text_config", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 of llama"),
        ("vision_config", {"hidden_size": 10**9}, "hidden_size=1000000000 of clip"),
        ("vision_config", {"image_size": 10**9}, "no model that can be built"),
        ("text_config", {"hidden_act": "nothing"}, "no model that can be built"),
        ("vision_config", {"patch_size": 0}, "no model that can be built"),
    ],
)
def test_numbers_that_no_weight_bears_out(part: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = make_tiny_valley(tmp_path / "model")
    path = folder / "config.json"
    change(path, **{part: json.loads(path.read_text())[part] | changes})
    with pytest.raises(CheckpointError, match=said):
        Assistant.from_pretrained(folder)


def test_weights_of_another_number_format(tmp_path: Path) -> None:
    folder = make_tiny_valley(tmp_path / "model")
    path = folder / "model.safetensors"
    state = load_file(path)
    save_file(state | {"core.mm_projector.weight": state["core.mm_projector.weight"].to(torch.int8)}, path)
    with pytest.raises(CheckpointError, match=r"core\.mm_projector\.weight \(torch\.int8\)"):
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
