"""The original's LoRA folders: merged while loading to the recorded logits and words; adapters survive a round trip."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from parity_forward import forward_inputs
from parity_model import open_variant, stored_clips
from parity_set import ROOT, expand_ids, load_json

from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.lora import load_adapter, merge_lora, save_adapter

ATOL, RTOL = 1e-3, 1e-4
"""The set's README; measured noise between float32 and float64 is 2e-5."""


def merged_records() -> dict[str, tuple[Path, dict[str, Any]]]:
    """Folder and record of every merged LoRA run of the set."""
    records = load_json("train.json")
    return {name: (ROOT / record["folder"], record) for name, record in records.items() if "new_ids" in record}


def base_name(folder: Path) -> str:
    """Name of the checkpoint under the adapter of `folder`."""
    return Path(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]).name


def adapter_folders() -> list[Path]:
    """Folders of the set that hold an adapter."""
    load_json("checkpoints.json")
    return sorted(path.parent for path in (ROOT / "checkpoints").glob("*/adapter_config.json"))


def test_merged_logits_and_loss_equal_the_recorded_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arrays = np.load(ROOT / "train.npz") if (ROOT / "train.npz").is_file() else {}
    for name, (folder, record) in merged_records().items():
        if f"{name}.last8_logits" not in arrays:
            continue
        ids, last = torch.from_numpy(arrays[f"{name}.input_ids"]), arrays[f"{name}.last8_logits"]
        model = ValleyForConditionalGeneration.from_pretrained(folder, splice="upstream")
        for given in forward_inputs(base_name(folder)):
            if not torch.equal(given.input_ids, ids.long()):
                continue
            output = given.run(model)
            np.testing.assert_allclose(output.loss.item(), record["loss"], atol=ATOL, rtol=RTOL, err_msg=name)
            for row, length in enumerate(given.lengths):
                came = output.logits[row, length - last.shape[1] : length]
                np.testing.assert_allclose(came, last[row], atol=ATOL, rtol=RTOL, err_msg=f"{name} row {row}")


@torch.no_grad()
def test_merged_words_equal_the_recorded_ones() -> None:
    prompts = {case["id"]: case for case in load_json("inference.json")["build_inputs"]}
    for name, (folder, record) in merged_records().items():
        prompt = prompts.get(record["generate_messages"])
        if prompt is None:
            continue
        model = ValleyForConditionalGeneration.from_pretrained(folder).eval()
        ids = expand_ids(prompt["input_ids_rle_slow"])
        clip = stored_clips(base_name(folder)).get(ids.count(model.config.vi_frame_token_id))
        if clip is None:
            continue
        came = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            pixel_values=[clip],
            max_new_tokens=len(record["new_ids"]),
            do_sample=False,
        )
        assert came[0, -len(record["new_ids"]) :].tolist() == record["new_ids"], name


def test_adapters_survive_saving_and_loading(tmp_path: Path) -> None:
    for folder in adapter_folders():
        base = base_name(folder)
        first = open_variant(base)
        load_adapter(first.core, folder)
        with torch.no_grad():
            first.core.mm_projector.weight.add_(1.0)
        save_adapter(first.core, tmp_path / folder.name)
        second = open_variant(base)
        load_adapter(second.core, tmp_path / folder.name)
        assert_equal_states(first, second)
        merge_lora(first.core)
        merged = ValleyForConditionalGeneration.from_pretrained(tmp_path / folder.name)
        assert_close_states(first, merged)


def test_a_saved_adapter_opens_with_plain_peft(tmp_path: Path) -> None:
    for folder in adapter_folders():
        base = base_name(folder)
        ours = open_variant(base)
        load_adapter(ours.core, folder)
        save_adapter(ours.core, tmp_path / folder.name, adapter_only=True)
        assert not (tmp_path / folder.name / "non_lora_trainables.safetensors").exists()
        theirs = peft.PeftModel.from_pretrained(open_variant(base).core.language_model, tmp_path / folder.name)
        ids = torch.arange(3, 40)[None]
        with torch.no_grad():
            ours.eval()
            assert torch.equal(theirs.eval()(ids).logits, ours.core.language_model(ids).logits), folder


def test_an_adapter_opened_bare_equals_the_folder_that_holds_it_beside_its_base(tmp_path: Path) -> None:
    for folder in adapter_folders():
        if not (folder / "config.json").is_file():
            continue
        bare = tmp_path / folder.name
        bare.mkdir()
        for name in ("adapter_config.json", "adapter_model.bin"):
            (bare / name).write_bytes((folder / name).read_bytes())
        whole = ValleyForConditionalGeneration.from_pretrained(folder)
        opened = ValleyForConditionalGeneration.from_pretrained(bare, base=ROOT / "checkpoints" / base_name(folder))
        theirs, ours = whole.core.language_model.model.layers, opened.core.language_model.model.layers
        assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True)), folder


def assert_equal_states(first: torch.nn.Module, second: torch.nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def assert_close_states(first: torch.nn.Module, second: torch.nn.Module) -> None:
    """peft scales the product, we scale it too, in another order: the last bits of float32 differ."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], atol=1e-6, rtol=1e-6, msg=key)
