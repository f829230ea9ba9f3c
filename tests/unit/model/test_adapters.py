"""Adapters opened onto a model in memory: shared weights, the logits of a merged folder, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny_valley
from tiny_adapters import make_adapter

from valley_ray.errors import CheckpointError
from valley_ray.model import ValleyForConditionalGeneration
from valley_ray.model.adapter_files import EXTRAS
from valley_ray.model.adapters import check_adapter, open_adapter, open_visual_part


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_valley(tmp_path_factory.mktemp("adapters") / "base")


@pytest.fixture(scope="module")
def red(base: Path) -> Path:
    return make_adapter(base, base.parent / "red", seed=1)


@pytest.fixture
def model(base: Path) -> ValleyForConditionalGeneration:
    return opened(base)


def opened(folder: Path, **options: object) -> ValleyForConditionalGeneration:
    model: ValleyForConditionalGeneration = ValleyForConditionalGeneration.from_pretrained(folder, **options)
    return model.eval()


def test_the_base_is_shared_and_stays_bit_for_bit(model: ValleyForConditionalGeneration, red: Path) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [(name, type(module)) for name, module in model.named_modules()]
    adapter = open_adapter(model.core, red)
    own = {
        name
        for name, parameter in adapter.core.named_parameters()
        if parameter.data_ptr() != model.core.get_parameter(name).data_ptr()
    }
    assert own == {"mm_projector.weight", "mm_projector.bias", "language_model.model.embed_tokens.weight"}
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    matrices = load_file(red / "adapter_model.safetensors")
    expected = sum(tensor.nbytes for tensor in matrices.values())
    assert adapter.num_bytes == expected + sum(adapter.core.get_parameter(name).nbytes for name in own)


@torch.no_grad()
@pytest.mark.parametrize("use_dora", [False, True])
def test_every_layer_computes_what_the_merged_weight_does(base: Path, use_dora: bool, tmp_path: Path) -> None:
    folder = make_adapter(base, tmp_path / "adapter", seed=3, r=6, use_dora=use_dora)
    model, merged = opened(base), opened(folder)
    # No layer of a LLaMA has one; a gain must not scale it.
    layer = model.core.language_model.model.layers[0].self_attn.q_proj
    other = merged.core.language_model.model.layers[0].self_attn.q_proj
    layer.bias = other.bias = torch.nn.Parameter(torch.randn(layer.out_features))
    adapter = open_adapter(model.core, folder)
    assert len(adapter.updates) == 14
    for name, update in adapter.updates.items():
        plain, whole = (one.core.language_model.get_submodule(name) for one in (model, merged))
        states = torch.randn(5, plain.in_features)
        torch.testing.assert_close(update(states, plain(states)), whole(states), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(plain(states), whole(states), atol=1e-2)


@torch.no_grad()
def test_visual_tokens_and_embeddings_are_those_of_the_merged_folder(
    model: ValleyForConditionalGeneration, red: Path
) -> None:
    merged, adapter = opened(red), open_adapter(model.core, red)
    features = torch.randn(3, 17, 32)
    expected = merged.core.visual_tokens(features)
    assert torch.equal(adapter.core.visual_tokens(features), expected)
    assert not torch.allclose(model.core.visual_tokens(features), expected, atol=1e-2)
    ids = torch.arange(20)
    assert torch.equal(adapter.embed_tokens(ids), merged.get_input_embeddings()(ids))
    # An encoder has no language model.
    del model.core.language_model
    assert torch.equal(open_visual_part(model.core, red).visual_tokens(features), expected)


@pytest.mark.parametrize("adapter_only", [True, False])
def test_projector_and_table_that_are_the_bases_are_shared(
    adapter_only: bool, model: ValleyForConditionalGeneration, base: Path, tmp_path: Path
) -> None:
    """Whether the folder lacks them, or holds what its stage did not train."""
    folder = make_adapter(base, tmp_path / "adapter", seed=2, moved=(), adapter_only=adapter_only)
    shared = {parameter.data_ptr() for parameter in model.core.parameters()}
    adapter = open_adapter(model.core, folder)
    assert {parameter.data_ptr() for parameter in adapter.core.parameters()} == shared
    assert open_visual_part(model.core, folder).mm_projector.weight is model.core.mm_projector.weight


def test_half_precision_is_the_bases(base: Path, red: Path) -> None:
    adapter = open_adapter(opened(base, dtype=torch.bfloat16).core, red)
    dtypes = {tensor.dtype for update in adapter.updates.values() for tensor in update.tensors}
    assert dtypes | {parameter.dtype for parameter in adapter.core.parameters()} == {torch.bfloat16}


def refusal(model: ValleyForConditionalGeneration, folder: Path, **options: bool) -> str:
    with pytest.raises(CheckpointError) as refused:
        check_adapter(model.core, folder, **options)
    message = str(refused.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_an_adapter_of_the_same_base_under_another_name_is_taken(
    model: ValleyForConditionalGeneration, base: Path, red: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_adapter(model.core, red)
    copied = opened(shutil.copytree(base, tmp_path / "copy"))
    check_adapter(copied.core, red)
    assert not caplog.records
    folder = shutil.copytree(red, tmp_path / "red")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "nowhere/to/be/found"}))
    check_adapter(model.core, folder)
    assert "'nowhere/to/be/found' is out of reach" in caplog.text


def test_an_adapter_of_other_weights_or_shapes_is_refused(
    model: ValleyForConditionalGeneration, base: Path, red: Path, tmp_path: Path
) -> None:
    other = make_adapter(make_tiny_valley(tmp_path / "other", seed=5), tmp_path / "of-other", seed=1)
    assert "whose weights are not those of" in refusal(model, other)
    odd = shutil.copytree(red, tmp_path / "odd")
    extras = load_file(odd / EXTRAS)
    extras["mm_projector.weight"] = torch.zeros(8, 32)
    save_file(extras, odd / EXTRAS)
    assert "mm_projector.weight has shape [8, 32]" in refusal(model, odd)
    matrices = load_file(odd / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(matrices | {name: torch.zeros(4, 31)}, odd / "adapter_model.safetensors")
    assert "expected width 32, got 31" in refusal(model, odd)


def test_what_is_no_adapter_alone_is_refused(
    model: ValleyForConditionalGeneration, base: Path, red: Path, tmp_path: Path
) -> None:
    assert "is a whole model" in refusal(model, base)
    (tmp_path / "empty").mkdir()
    assert "has no adapter_config.json" in refusal(model, tmp_path / "empty")
    pickled = shutil.copytree(red, tmp_path / "pickled")
    torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    check_adapter(model.core, pickled)
    assert "allow_bin" in refusal(model, pickled, allow_bin=False)
