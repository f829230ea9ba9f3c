"""Deltas are made and applied to the original's bytes, and what comes back opens to its numbers."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parity_forward import forward_inputs
from parity_set import ROOT, load_json

from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.checkpoint import UPSTREAM_BUFFERS
from valley_ray.model.delta import apply_delta, make_delta
from valley_ray.model.weight_files import find_files, read_weights

ATOL = 1e-3
"""The set's README; measured noise between float32 and float64 is 2e-5."""


def recorded_pairs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Records with a base and a target."""
    for name, record in load_json("delta.json").items():
        if "base" in record and "target" in record:
            yield name, record


def test_deltas_and_restored_models_are_the_originals_bytes(tmp_path: Path) -> None:
    for name, record in recorded_pairs():
        delta, restored = tmp_path / f"{name}-delta", tmp_path / f"{name}-restored"
        make_delta(ROOT / record["base"], ROOT / record["target"], delta)
        assert_recorded(weights(delta), record["delta_tensors"], name)
        apply_delta(ROOT / record["base"], delta, restored)
        if "restored_tensors" in record:
            assert_recorded(weights(restored), record["restored_tensors"], name)
        assert ValleyForConditionalGeneration.from_pretrained(restored).dtype == torch.float16


def test_the_originals_delta_gives_the_originals_model(tmp_path: Path) -> None:
    for name, record in recorded_pairs():
        if "delta" not in record or "restored" not in record:
            continue
        apply_delta(ROOT / record["base"], ROOT / record["delta"], tmp_path / name)
        ours, theirs = weights(tmp_path / name), weights(ROOT / record["restored"])
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
        for file in record["delta_files"]:
            if file != "config.json" and not file.endswith(".bin"):
                assert (tmp_path / name / file).read_bytes() == (ROOT / record["delta"] / file).read_bytes(), file


def test_a_restored_model_gives_the_recorded_logits(tmp_path: Path) -> None:
    effect = load_json("delta.json").get("inv_freq_effect", {})
    for name, record in recorded_pairs():
        if "restored" not in record:
            continue
        apply_delta(ROOT / record["base"], ROOT / record["delta"], tmp_path / name)
        model = ValleyForConditionalGeneration.from_pretrained(tmp_path / name, dtype=torch.float32, splice="upstream")
        runs = [(given, given.run(model)) for given in forward_inputs(Path(record["target"]).name)]
        for expected in effect.values() if runs else ():
            first = expected["last_row_logits_first8"]
            errors = [
                np.abs(output.logits[row, length - 1, : len(first)].numpy() - np.array(first)).max()
                for given, output in runs
                if abs(output.loss.item() - expected["loss"]) <= ATOL
                for row, length in enumerate(given.lengths)
            ]
            assert min(errors, default=np.inf) <= ATOL, name


def test_targets_that_the_original_refuses_come_back_whole(tmp_path: Path) -> None:
    bases = [record["base"] for _, record in recorded_pairs()]
    refused = [name for name, record in load_json("delta.json").items() if "make_delta_result" in record]
    for name in refused if bases else ():
        target = ROOT / "checkpoints" / name
        make_delta(ROOT / bases[0], target, tmp_path / f"{name}-delta")
        apply_delta(ROOT / bases[0], tmp_path / f"{name}-delta", tmp_path / name)
        ours, theirs = weights(tmp_path / name), weights(target)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key].half(), atol=2e-3, rtol=2e-3, msg=f"{name} {key}")
        opened = ValleyForConditionalGeneration.from_pretrained(tmp_path / name, dtype=torch.float32)
        assert opened.config.pooling == ValleyForConditionalGeneration.from_pretrained(target).config.pooling


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a folder without the buffers that are computed today."""
    state = read_weights(find_files(folder))
    return {name: tensor for name, tensor in state.items() if not name.endswith(UPSTREAM_BUFFERS)}


def assert_recorded(state: dict[str, torch.Tensor], recorded: dict[str, list[Any]], context: str) -> None:
    expected = {name: values for name, values in recorded.items() if not name.endswith(UPSTREAM_BUFFERS)}
    assert state.keys() == expected.keys(), context
    for name, (shape, dtype, total, digest) in expected.items():
        array = state[name].numpy()
        little = array.astype(array.dtype.newbyteorder("<"))
        assert [list(array.shape), str(array.dtype)] == [shape, dtype], (context, name)
        assert abs(float(array.astype(np.float64).sum()) - total) <= 1e-9 * max(1.0, abs(total)), (context, name)
        assert hashlib.sha256(little.tobytes()).hexdigest() == digest, (context, name)
