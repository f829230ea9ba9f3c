"""Adapters: added, trained, saved, opened again, merged; and the words that refuse a bad one."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from valley_ray.errors import CheckpointError, ConfigError
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.checkpoint import their_name
from valley_ray.model.lora import LoraSettings, add_lora, load_adapter, merge_lora, save_adapter
from valley_ray.model.towers import read_tower

IDS = torch.arange(3, 20)[None]


def opened(folder: Path, **options: Any) -> ValleyForConditionalGeneration:
    model: ValleyForConditionalGeneration = ValleyForConditionalGeneration.from_pretrained(folder, **options)
    return model.eval()


@torch.no_grad()
def logits(model: ValleyForConditionalGeneration) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits
    return result


def trained(folder: Path) -> ValleyForConditionalGeneration:
    """The model of `folder` with an adapter whose matrices, projector and table have moved."""
    model = opened(folder)
    torch.manual_seed(0)
    add_lora(model.core, LoraSettings(r=4, dropout=0.0))
    with torch.no_grad():
        for name, parameter in model.core.named_parameters():
            if "lora_" in name or "mm_projector" in name or "embed_tokens" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=["ours", "theirs"])
def adapter(request: pytest.FixtureRequest, upstream_folder: Path) -> Path:
    """A saved adapter on a base of either layout."""
    folder = upstream_folder.parent / "adapter"
    save_adapter(trained(upstream_folder.parent / request.param).core, folder)
    return folder


def test_an_adapter_in_the_folder_of_its_base_counts(upstream_folder: Path) -> None:
    for name in ("ours", "theirs"):
        folder = upstream_folder.parent / name
        model = trained(folder)
        save_adapter(model.core, folder)
        torch.testing.assert_close(logits(opened(folder)), logits(model), atol=1e-5, rtol=1e-4)


def test_a_base_beside_a_whole_model_is_refused(upstream_folder: Path) -> None:
    for name in ("ours", "theirs"):
        with pytest.raises(CheckpointError, match=r"is a whole model .* leave the base"):
            opened(upstream_folder.parent / name, base=upstream_folder)


def test_a_fresh_adapter_changes_nothing_and_trains_alone_in_the_language_model(upstream_folder: Path) -> None:
    model = opened(upstream_folder)
    before = logits(model)
    add_lora(model.core, LoraSettings())
    assert torch.equal(logits(model), before)
    trainable = {name for name, parameter in model.core.language_model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert not any("lora_" in name for name, _ in model.vision_tower.named_parameters())


def test_merging_keeps_the_logits_and_leaves_no_trace(upstream_folder: Path, tmp_path: Path) -> None:
    model = trained(upstream_folder)
    before, names = logits(model), opened(upstream_folder).state_dict().keys()
    merge_lora(model.core)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    assert model.state_dict().keys() == names
    model.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(opened(tmp_path / "merged")), logits(model))
    merge_lora(model.core)
    add_lora(model.core, LoraSettings())


def test_an_adapter_folder_opens_merged_with_its_projector_and_table(adapter: Path) -> None:
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    expected = trained(Path(base))
    model = opened(adapter)
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-5, rtol=1e-5)
    assert torch.equal(model.core.mm_projector.weight, expected.core.mm_projector.weight)
    resumed = opened(Path(base))
    load_adapter(resumed.core, adapter)
    assert torch.equal(logits(resumed), logits(expected))


def test_a_bare_adapter_says_that_the_projector_is_the_bases(
    upstream_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = upstream_folder.parent / "bare"
    save_adapter(trained(upstream_folder).core, folder, adapter_only=True)
    model = opened(folder)
    assert "projector and token table are those of its base" in caplog.text
    assert torch.equal(model.core.mm_projector.weight, opened(upstream_folder).core.mm_projector.weight)
    assert read_tower(folder).name == "tower"


@pytest.mark.parametrize("inserted", ["", ".base_layer"])
def test_base_and_adapter_in_one_folder_open_merged(inserted: str, upstream_folder: Path) -> None:
    """The original's callback saves a model with its adapter inside; newer peft renames the weights under it."""
    model = trained(upstream_folder)
    folder = upstream_folder.parent / "both"
    save_adapter(model.core, folder, adapter_only=True)
    (folder / "config.json").write_bytes((upstream_folder / "config.json").read_bytes())
    state = {their_name(name.replace(".base_layer", inserted)): value for name, value in model.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    torch.testing.assert_close(logits(opened(folder)), logits(model), atol=1e-5, rtol=1e-5)
    (folder / "adapter_config.json").unlink()
    shutil.copy(upstream_folder / "added_tokens.json", folder)
    with pytest.raises(CheckpointError, match=r"unexpected: .*lora_A"):
        opened(folder)


def test_an_adapter_without_its_base(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    base = config["base_model_name_or_path"]
    path.write_text(json.dumps(config | {"base_model_name_or_path": "nobody/nothing"}))
    with pytest.raises(CheckpointError, match=r"base model 'nobody/nothing' is out of reach.*give base"):
        opened(adapter)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        opened(adapter, base=adapter)
    opened(adapter, base=base)


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)

    return edit


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
BAD_ADAPTERS = [
    (edit_config(r=8), r"has rank 4, adapter_config\.json says r=8"),
    (edit_config(r=0), "expected numbers above 0 under r"),
    (edit_config(lora_alpha="x"), "expected numbers above 0 under r and lora_alpha"),
    (edit_config(peft_type="LOHA"), "expected peft_type 'LORA', got 'LOHA'"),
    (edit_config(fan_in_fan_out=True, bias="all"), "fan_in_fan_out, bias is not supported"),
    (edit_config(modules_to_save=["lm_head"]), "modules_to_save is not supported"),
    (edit_config(target_modules=None), "under target_modules, got None"),
    (edit_weights(dict.clear), "holds no LoRA matrices"),
    (edit_weights(lambda state: state.pop(f"{LAYER}.lora_B.weight")), r"1 weights missing: .*q_proj\.lora_B"),
    (edit_weights(lambda state: [state.pop(f"{LAYER}.lora_{p}.weight") for p in "AB"]), r"missing: .*q_proj\.lora_A"),
    (
        edit_weights(lambda state: state.update({f"{LAYER}.lora_A.weight": torch.zeros(4, 7)})),
        r"q_proj\.lora_A \(expected width 32, got 7\)",
    ),
    (
        edit_weights(lambda state: state.update({f"{LAYER}x.lora_{p}.weight": torch.zeros(4, 4) for p in "AB"})),
        r"1 weights unexpected: .*q_projx\.lora_A",
    ),
    (edit_weights(lambda state: state.update({"lm_head.weight": torch.zeros(1)})), "expected LoRA matrices alone"),
    (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"has no adapter_model\.safetensors"),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not valid JSON"),
    (
        lambda folder: save_file({"mm_projector.weight": torch.zeros(1)}, folder / "non_lora_trainables.safetensors"),
        r"mm_projector\.weight",
    ),
]


@pytest.mark.parametrize(("spoil", "words"), BAD_ADAPTERS)
def test_adapters_that_do_not_fit(spoil: Callable[[Path], Any], words: str, upstream_folder: Path) -> None:
    folder = upstream_folder.parent / "adapter"
    save_adapter(trained(upstream_folder).core, folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=words):
        opened(folder)
    model = opened(upstream_folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        load_adapter(model.core, folder)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_settings_and_cores_that_do_not_fit(upstream_folder: Path, tmp_path: Path) -> None:
    core = opened(upstream_folder).core
    with pytest.raises(CheckpointError, match=r"no linear layer called query; it has .*q_proj"):
        add_lora(core, LoraSettings(target_modules=("q_proj", "query")))
    with pytest.raises(CheckpointError, match="no LoRA adapter to save"):
        save_adapter(core, tmp_path / "none")
    add_lora(core, LoraSettings())
    with pytest.raises(CheckpointError, match="has a LoRA adapter already"):
        add_lora(core, LoraSettings())


def test_dora_is_saved_opened_and_merged_with_its_magnitudes(upstream_folder: Path, tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        folder, saved = upstream_folder.parent / name, tmp_path / f"dora-{name}"
        model = opened(folder)
        plain = logits(model)
        add_lora(model.core, LoraSettings(r=4, dropout=0.0, use_dora=True))
        torch.testing.assert_close(logits(model), plain, atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            for parameter_name, parameter in model.core.named_parameters():
                if "lora_" in parameter_name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        expected = logits(model)
        save_adapter(model.core, saved)
        again = opened(folder)
        load_adapter(again.core, saved)
        torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits(opened(saved, base=folder)), expected, atol=1e-4, rtol=1e-3)
        merge_lora(again.core)
        torch.testing.assert_close(logits(again), expected, atol=1e-4, rtol=1e-3)
        path = saved / "adapter_model.safetensors"
        save_file({key: value for key, value in load_file(path).items() if "magnitude" not in key}, path)
        with pytest.raises(CheckpointError, match="lora_magnitude_vector"):
            load_adapter(opened(folder).core, saved)


def test_four_bits_without_bitsandbytes_name_the_extra(upstream_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    model = opened(upstream_folder)
    before = logits(model)
    with pytest.raises(ConfigError, match=r"valley-ray\[qlora\]"):
        add_lora(model.core, LoraSettings(quantize="nf4"), quantized=True)
    assert torch.equal(logits(model), before)
    add_lora(model.core, LoraSettings(quantize="nf4"))
