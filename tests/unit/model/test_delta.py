"""Deltas of either layout, and the words that refuse a wrong base (numbers: tests/parity)."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from valley_ray.errors import CheckpointError
from valley_ray.model import ValleyForConditionalGeneration, delta
from valley_ray.model.delta import apply_delta, make_delta

NUM_NEW_TOKENS = 7


@pytest.fixture
def base(upstream_folder: Path) -> Path:
    """The language model of the tiny Valley before its seven tokens, a little moved."""
    model = ValleyForConditionalGeneration.from_pretrained(upstream_folder).core.language_model
    model.resize_token_embeddings(model.config.vocab_size - NUM_NEW_TOKENS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    folder = upstream_folder.parent / "base"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout", ["ours", "theirs"])
def test_delta_and_base_give_the_target_back(
    layout: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta, "SHARD_BYTES", 20_000)
    target = tmp_path / layout
    make_delta(base, target, tmp_path / "delta")
    apply_delta(base, tmp_path / "delta", tmp_path / "restored")
    assert (tmp_path / "restored" / "model.safetensors.index.json").is_file()
    ours = ValleyForConditionalGeneration.from_pretrained(tmp_path / "restored")
    assert ours.dtype == torch.float16
    theirs = ValleyForConditionalGeneration.from_pretrained(target, dtype=torch.float16).state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-3, rtol=2e-3, msg=name)
    stored = ValleyForConditionalGeneration.from_pretrained(tmp_path / "delta").core
    assert stored.language_model.model.norm.weight.abs().max() < 0.2
    assert torch.equal(stored.mm_projector.weight, ours.core.mm_projector.weight)


def test_a_head_that_base_and_target_tie_is_stored_nowhere(upstream_folder: Path, tmp_path: Path) -> None:
    config = ValleyForConditionalGeneration.from_pretrained(tmp_path / "ours").config
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = True
    model = ValleyForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "tied")
    model.core.language_model.save_pretrained(tmp_path / "base")
    make_delta(tmp_path / "base", tmp_path / "tied", tmp_path / "delta")
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "restored")
    restored = ValleyForConditionalGeneration.from_pretrained(tmp_path / "restored", dtype=torch.float32)
    for name, tensor in restored.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=2e-3, rtol=2e-3, msg=name)


def test_a_wrong_base_is_named_with_file_and_key_and_leaves_nothing(base: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    config = model.config
    config.intermediate_size += 8
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match=r"wide is not the base of .*of another shape: model\.layers\.0\.mlp\."):
        make_delta(tmp_path / "wide", tmp_path / "theirs", tmp_path / "out")
    config.intermediate_size -= 8
    config.num_hidden_layers += 1
    LlamaForCausalLM(config).save_pretrained(tmp_path / "deep")
    with pytest.raises(CheckpointError, match=r"missing in .*theirs: .* and 4 more"):
        make_delta(tmp_path / "deep", tmp_path / "theirs", tmp_path / "out")
    config.num_hidden_layers -= 2
    LlamaForCausalLM(config).save_pretrained(tmp_path / "flat")
    with pytest.raises(CheckpointError, match=r"missing in .*flat"):
        apply_delta(tmp_path / "flat", tmp_path / "theirs", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))) == []


def test_outputs_and_inputs_that_cannot_be_used(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, out = tmp_path / "theirs", tmp_path / "out"
    with pytest.raises(CheckpointError, match="exists already"):
        make_delta(base, target, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="expected model_type 'valley'"):
        make_delta(target, base, out)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        make_delta(tmp_path / "nowhere", target, out)
    (target / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="merge it first"):
        make_delta(base, target, out)
    (target / "adapter_config.json").unlink()
    weights = target / "pytorch_model.bin"
    torch.save(torch.load(weights) | {"model.norm.weight": torch.full((32,), 1e6)}, weights)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds numbers that float16 cannot"):
        make_delta(base, target, out)
    assert not out.exists()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_output_that_breaks_half_way_is_not_there(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(delta, "_copy_other_files", broken)
    with pytest.raises(KeyboardInterrupt):
        make_delta(base, tmp_path / "theirs", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))] == []


def test_an_output_that_cannot_be_written_is_said(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*free space, or name another folder"):
        make_delta(base, tmp_path / "theirs", tmp_path / "file" / "out")


def test_tokenizer_and_settings_go_along(base: Path, tmp_path: Path) -> None:
    make_delta(base, tmp_path / "ours", tmp_path / "delta")
    kept = {path.name for path in (tmp_path / "ours").iterdir()}
    assert {path.name for path in (tmp_path / "delta").iterdir()} == kept
    config = json.loads((tmp_path / "delta" / "config.json").read_text())
    assert {config["dtype"], config["text_config"]["dtype"]} == {"float16"}
