"""Every checkpoint of the set opens from any working directory, to the original's weights and token ids."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_set import ROOT, load_json

from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.checkpoint import DEAD_LAYER, UPSTREAM_BUFFERS, our_name
from valley_ray.model.config import ID_FIELD_OF_TOKEN
from valley_ray.model.towers import read_tower

ATOL, RTOL = 1e-9, 1e-9
"""Sums and norms are of the same values in float64; only the order of summing may differ."""


def recorded_checkpoints() -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Name, folder and record of the checkpoints whose weights are recorded."""
    for name, record in load_json("checkpoints.json")["checkpoints"].items():
        folder = ROOT / "checkpoints" / name
        if "state_dict" in record and folder.is_dir():
            yield name, folder, record


def test_token_ids_equal_the_recorded_ones() -> None:
    for name, folder, record in recorded_checkpoints():
        config = ValleyForConditionalGeneration.from_pretrained(folder).config
        for token, field in ID_FIELD_OF_TOKEN.items():
            assert getattr(config, field) == record["token_ids"][token], (name, token)
        assert config.text_config.vocab_size == record["vocab_size"], name


def test_weights_equal_the_recorded_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, folder, record in recorded_checkpoints():
        state = ValleyForConditionalGeneration.from_pretrained(folder).state_dict()
        used = {
            our_name(theirs): expected
            for theirs, expected in record["state_dict"].items()
            if not theirs.endswith(UPSTREAM_BUFFERS) and not theirs.startswith(DEAD_LAYER)
        }
        assert state.keys() == used.keys(), name
        for key, (shape, dtype, total, norm) in used.items():
            tensor = state[key]
            assert [list(tensor.shape), str(tensor.dtype)] == [shape, f"torch.{dtype}"], (name, key)
            came = torch.stack([tensor.double().sum(), tensor.double().norm()])
            torch.testing.assert_close(
                came, torch.tensor([total, norm], dtype=torch.float64), atol=ATOL, rtol=RTOL, msg=key
            )


def test_towers_are_the_recorded_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, folder, record in recorded_checkpoints():
        tower = read_tower(folder)
        assert tower.name == record["tower"], name
        assert tower.config.model_type.startswith("chinese_clip") == ("chinese" in record["tower"]), name
        assert tower.preprocessor is not None, name


def test_every_folder_opens_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    load_json("checkpoints.json")
    for folder in sorted(path for path in (ROOT / "checkpoints").iterdir() if path.is_dir()):
        model = ValleyForConditionalGeneration.from_pretrained(folder)
        assert not any(tensor.is_meta for tensor in model.state_dict().values()), folder
        assert not any("lora_" in name for name in model.state_dict()), folder
