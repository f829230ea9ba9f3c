"""LoRA on the language model of a core: add, load, save, merge. Files are peft's, so that peft opens them too.

Tower, projector, pooling and token tables are never adapted; what is trained of them is saved beside the adapter.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from pydantic import Field
from safetensors.torch import save_file

from valley_ray.config import Config
from valley_ray.errors import CheckpointError, ConfigError
from valley_ray.model.adapter_files import EXTRAS, MAGNITUDE, Adapter, check_extras, check_fit, read_adapter
from valley_ray.model.core import ValleyCore

ADAPTER_NAME = "default"
"""peft's name of the one adapter."""

DECODER_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")
"""Linear layers of a LLaMA block, in upstream's order (valley/train/train.py)."""


class LoraSettings(Config):
    """An adapter's shape; the defaults are upstream's (valley/train/train.py)."""

    r: int = Field(16, ge=1)
    """Rank."""
    alpha: float = Field(32, gt=0, allow_inf_nan=False)
    """The update is scaled by alpha / r."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Of what enters the adapter, while training."""
    target_modules: tuple[str, ...] = Field(DECODER_PROJECTIONS, min_length=1)
    """Names of the language model's linear layers, or their last parts."""
    use_dora: bool = False
    """DoRA (arXiv 2402.09353): a magnitude per output is trained beside the matrices; slower, often better at low r."""
    quantize: Literal["nf4"] | None = None
    """nf4: QLoRA (arXiv 2305.14314): while an adapter is trained, the layers under it hold 4 bits per weight (needs the
    extra `qlora`). It is merged into the weights as they were."""


def add_lora(core: ValleyCore, settings: LoraSettings, *, quantized: bool = False) -> None:
    """Put a fresh adapter into `core.language_model`, in place; it changes nothing before it is trained.

    The language model's own weights are frozen, LoRA's are trainable; projector, pooling and tables are as before.
    With `quantized`, the layers under the adapter are rounded first, as `settings.quantize` says.

    Raises:
        CheckpointError: there is an adapter already, or no layer is called as `settings` says.
        ConfigError: `settings.quantize` without bitsandbytes.
    """
    _refuse_second(core)
    layers = _linear_layers(core)
    absent = [name for name in settings.target_modules if not any(_ends_with(layer, [name]) for layer in layers)]
    if absent:
        raise CheckpointError(
            f"target_modules: the language model has no linear layer called {', '.join(absent)}; "
            f"it has {', '.join(sorted({layer.rpartition('.')[2] for layer in layers}))}"
        )
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
        task_type="CAUSAL_LM",
        use_dora=settings.use_dora,
    )
    if quantized and settings.quantize is not None:
        _quantize(core, [name for name in layers if _ends_with(name, settings.target_modules)])
    _inject(core, config)


@torch.no_grad()
def load_adapter(core: ValleyCore, folder: str | Path, *, allow_bin: bool = True) -> None:
    """Put the adapter of `folder` (ours, peft's or the original's) into `core`, unmerged, to go on training it.

    Raises:
        CheckpointError: no adapter, one of another model or rank, or `core` has one already; `core` is unchanged then.
    """
    _refuse_second(core)
    adapter = read_adapter(Path(folder), allow_bin=allow_bin)
    layers = {name: module.weight.shape for name, module in _linear_layers(core).items()}
    check_fit(adapter, layers)
    check_extras(adapter.folder, adapter.extras, dict(core.named_parameters()))
    _inject(core, _peft_config(adapter))
    modules = _lora_layers(core)
    for layer, pair in adapter.pairs.items():
        modules[layer].lora_A[ADAPTER_NAME].weight.copy_(pair["A"])
        modules[layer].lora_B[ADAPTER_NAME].weight.copy_(pair["B"])
        if MAGNITUDE in pair:
            modules[layer].lora_magnitude_vector[ADAPTER_NAME].weight.copy_(pair[MAGNITUDE])
    for name, tensor in adapter.extras.items():
        core.get_parameter(name).copy_(tensor)


def save_adapter(core: ValleyCore, folder: str | Path, *, adapter_only: bool = False) -> None:
    """Write the adapter of `core` in peft's layout, and beside it what else a LoRA stage trains.

    `non_lora_trainables.safetensors` holds projector, pooling and input table. `adapter_only` leaves it out, as the
    original's bare save does: the adapter then works only on a base that has them.

    Raises:
        CheckpointError: there is no adapter in `core`.
    """
    modules = _lora_layers(core)
    if not modules:
        raise CheckpointError("the core has no LoRA adapter to save; call add_lora or load_adapter first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    matrices = {
        f"base_model.model.{layer}.lora_{part}.weight": getattr(module, f"lora_{part}")[ADAPTER_NAME].weight
        for layer, module in modules.items()
        for part in "AB"
    }
    for layer, module in modules.items():
        if ADAPTER_NAME in module.lora_magnitude_vector:
            magnitude = module.lora_magnitude_vector[ADAPTER_NAME].weight
            matrices[f"base_model.model.{layer}.lora_magnitude_vector"] = magnitude
    save_file(_contiguous(matrices), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if not adapter_only:
        save_file(_contiguous(_extras(core)), folder / EXTRAS, metadata={"format": "pt"})
    config: LoraConfig = core.language_model.peft_config[ADAPTER_NAME]
    config.base_model_name_or_path = core.config._name_or_path
    config.save_pretrained(str(folder))


@torch.no_grad()
def merge_lora(core: ValleyCore) -> None:
    """Merge the adapter into the language model's weights and take its layers out; nothing where there is none."""
    for layer, module in _lora_layers(core).items():
        module.merge(safe_merge=True)
        parent, _, child = layer.rpartition(".")
        setattr(core.language_model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(core.language_model, "peft_config"):
        del core.language_model.peft_config


def _inject(core: ValleyCore, config: LoraConfig) -> None:
    """peft freezes everything that it is given but LoRA, and keeps a field for itself in the model."""
    model = core.language_model
    # What peft asks the model before it looks at its layers.
    model.is_loaded_in_4bit = any(type(module).__name__ == "Linear4bit" for module in model.modules())
    try:
        inject_adapter_in_model(config, model, adapter_name=ADAPTER_NAME)
    finally:
        del model.is_loaded_in_4bit


def _quantize(core: ValleyCore, layers: list[str]) -> None:
    """Replace linear layers by ones that keep their weights in NF4."""
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise ConfigError(
            "lora.quantize=nf4 needs bitsandbytes, which is not installed; pip install 'valley-ray[qlora]'"
        ) from error
    # Rounded where it is fast, one layer after the other; the core's own move to that device comes later.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in layers:
        parent, _, child = name.rpartition(".")
        plain = core.language_model.get_submodule(name)
        layer = Linear4bit(plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta")
        layer.weight = Params4bit(plain.weight.detach(), requires_grad=False, quant_type="nf4", module=layer)
        layer.bias = plain.bias
        setattr(core.language_model.get_submodule(parent), child, layer.to(device))


def _ends_with(layer: str, names: Iterable[str]) -> bool:
    return any(f".{layer}".endswith(f".{name}") for name in names)


def _refuse_second(core: ValleyCore) -> None:
    if _lora_layers(core):
        raise CheckpointError("the core has a LoRA adapter already; call merge_lora first")


def _lora_layers(core: ValleyCore) -> dict[str, Any]:
    return {name: module for name, module in core.language_model.named_modules() if isinstance(module, LoraLayer)}


def _linear_layers(core: ValleyCore) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in core.language_model.named_modules() if isinstance(module, torch.nn.Linear)}


def _peft_config(adapter: Adapter) -> LoraConfig:
    """Names of layers as they are in the file: a pattern could match more of this model."""
    known = {
        name: adapter.config[name]
        for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "task_type")
        if name in adapter.config
    }
    return LoraConfig(**known, target_modules=sorted(adapter.pairs))


def _extras(core: ValleyCore) -> dict[str, torch.Tensor]:
    """What a LoRA stage can train beside the adapter, by its name in the core."""
    table = core.get_input_embeddings().weight
    return {
        name: parameter
        for name, parameter in core.named_parameters()
        if parameter is table or not name.startswith("language_model.")
    }


def _contiguous(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
