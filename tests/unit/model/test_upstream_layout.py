"""The original's checkpoint layout in all its files, and the words that refuse a bad one (numbers: tests/parity)."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from valley_ray.errors import CheckpointError
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.towers import KNOWN_TOWERS, read_tower

WEIGHTS = "pytorch_model.bin"


def read(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / WEIGHTS)
    return state


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path, words: str, **options: Any) -> str:
    with pytest.raises(CheckpointError, match=words) as caught:
        ValleyForConditionalGeneration.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_opens_as_ours(folder: Path) -> None:
    theirs = ValleyForConditionalGeneration.from_pretrained(folder)
    ours = ValleyForConditionalGeneration.from_pretrained(folder.parent / "ours").state_dict()
    assert theirs.state_dict().keys() == ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.state_dict().items())
    assert theirs.config.im_patch_token_id > 0
    assert theirs.generation_config.eos_token_id == theirs.config.text_config.eos_token_id


def shard(folder: Path, state: dict[str, torch.Tensor], stem: str, suffix: str) -> None:
    """Write `state` as two shards with an index."""
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:]), start=1):
        file = f"{stem}-{number:05d}-of-00002{suffix}"
        tensors = {name: state[name].contiguous() for name in part}
        save_file(tensors, folder / file) if suffix == ".safetensors" else torch.save(tensors, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_single_and_sharded_pickles_and_safetensors_open_to_the_same_weights(upstream_folder: Path) -> None:
    assert_opens_as_ours(upstream_folder)
    state = read(upstream_folder)
    torch.save(state, upstream_folder / WEIGHTS, _use_new_zipfile_serialization=False)
    assert_opens_as_ours(upstream_folder)
    (upstream_folder / WEIGHTS).unlink()
    shard(upstream_folder, state, "pytorch_model", ".bin")
    assert_opens_as_ours(upstream_folder)
    for path in upstream_folder.glob("pytorch_model*"):
        path.unlink()
    save_file(state, upstream_folder / "model.safetensors")
    assert_opens_as_ours(upstream_folder)
    (upstream_folder / "model.safetensors").unlink()
    shard(upstream_folder, state, "model", ".safetensors")
    assert_opens_as_ours(upstream_folder)


def test_pickles_are_refused_where_they_are_not_allowed(upstream_folder: Path) -> None:
    refused(upstream_folder, r"pickled weights \(pytorch_model\.bin\).*allow_bin", allow_bin=False)
    save_file(read(upstream_folder), upstream_folder / "model.safetensors")
    ValleyForConditionalGeneration.from_pretrained(upstream_folder, allow_bin=False)


def test_training_a_mapped_model_leaves_its_file_alone(upstream_folder: Path) -> None:
    before = (upstream_folder / WEIGHTS).read_bytes()
    model = ValleyForConditionalGeneration.from_pretrained(upstream_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (upstream_folder / WEIGHTS).read_bytes() == before


def test_a_pickle_that_is_not_tensors_is_not_run(upstream_folder: Path) -> None:
    for is_zip in (True, False):
        state = {"model.norm.weight": RunsCode()}
        torch.save(state, upstream_folder / WEIGHTS, _use_new_zipfile_serialization=is_zip)
        refused(upstream_folder, r"pytorch_model\.bin holds more than tensors")
        assert not (upstream_folder.parent / "executed").exists()
    torch.save([torch.zeros(1)], upstream_folder / WEIGHTS)
    refused(upstream_folder, "expected a mapping of names to dense tensors")


def test_tensors_that_are_no_weights_are_refused(upstream_folder: Path) -> None:
    state = read(upstream_folder)
    head = state["lm_head.weight"]
    for odd in ({"lm_head.weight": head.to("meta")}, {"lm_head.weight": head.to_sparse()}, {5: head}):
        torch.save(state | odd, upstream_folder / WEIGHTS)
        refused(upstream_folder, "expected a mapping of names to dense tensors")
    for dtype in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn):
        torch.save(state | {"lm_head.weight": head.to(dtype)}, upstream_folder / WEIGHTS)
        refused(upstream_folder, rf"pytorch_model\.bin: 1 weights of another .*: lm_head\.weight \({dtype}\)")


def test_a_weight_in_two_shards_is_named(upstream_folder: Path) -> None:
    state = read(upstream_folder)
    (upstream_folder / WEIGHTS).unlink()
    shard(upstream_folder, state, "pytorch_model", ".bin")
    twice = min(state)
    second = upstream_folder / "pytorch_model-00002-of-00002.bin"
    torch.save(torch.load(second) | {twice: torch.zeros_like(state[twice])}, second)
    refused(upstream_folder, rf"00002\.bin: 1 weights in an earlier file too: {re.escape(twice)}")


def test_added_tokens_that_the_model_has_no_rows_for(upstream_folder: Path) -> None:
    path = upstream_folder / "added_tokens.json"
    added = json.loads(path.read_text())
    path.write_text(json.dumps(added | {"<im_patch>": -5}))
    refused(upstream_folder, r"other ids: <im_patch> -5;")
    path.write_text(json.dumps(added | {"<im_patch>": added["<vi_frame>"]}))
    refused(upstream_folder, "two added tokens have one id")


def test_weights_that_do_not_fit_are_named_in_the_words_of_the_file(upstream_folder: Path) -> None:
    state = read(upstream_folder)
    weights = upstream_folder / WEIGHTS
    torch.save({name: value for name, value in state.items() if name != "lm_head.weight"}, weights)
    refused(upstream_folder, r"1 weights missing: lm_head\.weight.*pytorch_model\.bin")
    torch.save(state | {"model.norm.weight": torch.zeros(3)}, weights)
    refused(upstream_folder, r"1 weights of another shape: model\.norm\.weight \(expected \[32\], got \[3\]\)")
    torch.save(state | {f"model.extra{i}": torch.zeros(1) for i in range(7)}, weights)
    message = refused(upstream_folder, "7 weights unexpected: .* and 2 more")
    assert len(re.findall(r"model\.extra\d", message)) == 5


def test_damaged_and_absent_files_are_named(upstream_folder: Path) -> None:
    weights = upstream_folder / WEIGHTS
    whole = weights.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 100):
        weights.write_bytes(whole[:size])
        refused(upstream_folder, r"pytorch_model\.bin")
    weights.write_bytes(b"not a weight file")
    refused(upstream_folder, r"pytorch_model\.bin")
    weights.unlink()
    refused(upstream_folder, r"has no model\.safetensors and no pytorch_model\.bin")
    (upstream_folder / "model.safetensors").write_bytes(b"not a weight file")
    refused(upstream_folder, r"model\.safetensors is damaged")


def test_indices_that_name_no_file_of_the_folder(upstream_folder: Path) -> None:
    index = upstream_folder / "pytorch_model.bin.index.json"
    cases = {
        "pytorch_model-00001-of-00002.bin": r"lacks weight files .*pytorch_model-00001-of-00002\.bin",
        "../theirs/pytorch_model.bin": r"weight_map names '\.\./theirs/pytorch_model\.bin'",
        str(upstream_folder / WEIGHTS): "no file of this folder",
        "..": "no file of this folder|lacks weight files",
    }
    for name, words in cases.items():
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        refused(upstream_folder, words)
    for weight_map in ({}, [], None, {"lm_head.weight": 5}):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(upstream_folder, "weight_map")


def test_configurations_that_cannot_be_opened(upstream_folder: Path) -> None:
    original = (upstream_folder / "config.json").read_text()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model_type": "llava"}, "expected model_type 'valley', got 'llava'"),
        ({"use_delta_transformer": True, "use_patch_importance_pooling": True}, "are both true"),
        ({"mm_vision_select_layer": -9}, "vision_layer=-9 of a tower with 3 layers"),
        ({"mm_vision_tower": None}, "tower's name under mm_vision_tower"),
        ({"hidden_size": "wide"}, "cannot be used"),
        ({"mm_vision_tower": "nowhere/tower"}, "no multiple of 64"),
        ({"use_delta_transformer": True}, r"weights missing: model\.(position_matrix|transformer_delta_encoder)"),
    ]
    for changes, words in cases:
        change_config(upstream_folder, **changes)
        refused(upstream_folder, words)
        (upstream_folder / "config.json").write_text(original)


def test_an_unknown_pooling_is_named(upstream_folder: Path) -> None:
    ours = upstream_folder.parent / "ours"
    change_config(ours, pooling="median")
    refused(ours, "pooling.*median")


def test_missing_added_tokens_are_named(upstream_folder: Path) -> None:
    (upstream_folder / "added_tokens.json").write_text(json.dumps({"[PAD]": 48}))
    refused(upstream_folder, r"added_tokens\.json lacks <vi_frame>")
    (upstream_folder / "added_tokens.json").unlink()
    refused(upstream_folder, r"has no added_tokens\.json")


def test_the_tower_is_found_beside_the_checkpoint_from_any_working_directory(
    upstream_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    assert_opens_as_ours(upstream_folder)
    assert read_tower(upstream_folder).config.num_attention_heads == 2


def test_a_tower_whose_config_cannot_be_read(upstream_folder: Path) -> None:
    path = upstream_folder.parent / "tower" / "config.json"
    for text in ("{", '{"model_type": "nonsense"}'):
        path.write_text(text)
        refused(upstream_folder, r"tower/config\.json of the vision tower cannot be used")


def test_known_towers_need_no_network(upstream_folder: Path) -> None:
    for name, facts in KNOWN_TOWERS.items():
        change_config(upstream_folder, mm_vision_tower=name)
        tower = read_tower(upstream_folder)
        assert tower.config.hidden_size == facts["hidden_size"]
        assert tower.config.model_type.startswith("chinese_clip") == ("chinese" in name)
        assert tower.preprocessor is not None
        assert tower.preprocessor["crop_size"]["height"] == facts["image_size"]
        assert tower.preprocessor["do_center_crop"] != ("chinese" in name)


def test_the_shape_of_an_unknown_tower_is_told_by_its_weights(upstream_folder: Path) -> None:
    width, prefix = 128, "model.vision_tower.vision_model."
    state = {
        f"{prefix}embeddings.patch_embedding.weight": torch.zeros(width, 3, 16, 16),
        f"{prefix}embeddings.position_embedding.weight": torch.zeros(1 + 49, width),
    }
    state |= {f"{prefix}encoder.layers.{i}.mlp.fc1.weight": torch.zeros(256, width) for i in range(5)}
    torch.save(state, upstream_folder / WEIGHTS)
    change_config(upstream_folder, mm_vision_tower="nobody/chinese-tower")
    tower = read_tower(upstream_folder)
    assert tower.preprocessor is None
    assert tower.config.model_type == "chinese_clip_vision_model"
    came = [getattr(tower.config, name) for name in ("image_size", "patch_size", "num_hidden_layers")]
    assert came == [112, 16, 5]
    assert (tower.config.num_attention_heads, tower.config.intermediate_size) == (2, 256)


class RunsCode:
    """Unpickled without care, it makes a file."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)
