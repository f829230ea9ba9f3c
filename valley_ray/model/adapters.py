"""Opens adapter folders onto a model that is in memory already: several adapters share one base.

The base's weights are neither copied nor changed; an adapter brings its matrices, and its own projector, pooling and
token table where they differ from the base's. `lora.py` puts an adapter into a model to train it, `checkpoint.py`
merges one while it opens a folder; the answers are the same. Knows no peft.
D_in, D_out: a layer's widths; r: the rank; n tokens.
"""

import copy
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from valley_ray.errors import CheckpointError
from valley_ray.model.adapter_files import (
    EXTRAS,
    LANGUAGE_MODEL,
    MAGNITUDE,
    Adapter,
    check_extras,
    check_fit,
    read_adapter,
)
from valley_ray.model.checkpoint import base_folder, read_weight
from valley_ray.model.core import ValleyCore
from valley_ray.model.weight_files import read_weights

logger = logging.getLogger(__name__)

VISUAL_PARTS = ("mm_projector.", "pooling.")
"""Names of what visual tokens are made by."""


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """LoRA or DoRA on one linear layer, unmerged."""

    down: torch.Tensor
    """[r, D_in]."""
    up: torch.Tensor
    """[D_out, r], scaled."""
    gain: torch.Tensor | None = None
    """[D_out], DoRA's: the learned magnitude over that of the weights with the adapter."""
    bias: torch.Tensor | None = None
    """[D_out], the layer's own, which the gain leaves alone."""

    def __call__(self, states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """[..., D_in] and the base layer's [..., D_out] → the adapted layer's."""
        adapted = output + F.linear(F.linear(states, self.down), self.up)
        if self.gain is None:
            return adapted
        if self.bias is None:
            return adapted * self.gain
        return (adapted - self.bias) * self.gain + self.bias

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What it holds beside the base."""
        return [one for one in (self.down, self.up, self.gain) if one is not None]


@dataclass(frozen=True, eq=False)
class OwnWeight:
    """A layer's weight, replaced: the head of a model that shares it with a token table of the adapter's own."""

    weight: torch.Tensor
    """[D_out, D_in]."""

    def __call__(self, states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """[..., D_in] → [..., D_out]; the base layer's output is dropped."""
        return F.linear(states, self.weight)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Nothing that the token table does not hold already."""
        return []


@dataclass(frozen=True, eq=False)
class CoreAdapter:
    """An opened adapter, as the slots engine takes it with a prompt."""

    core: ValleyCore
    """The base's weights with the adapter's own projector, pooling and token table; its decoder blocks are the
    base's, without the updates."""
    updates: Mapping[str, LowRankUpdate | OwnWeight]
    """By the name of the language model's layer."""
    num_bytes: int
    """Memory beside the base's."""

    def embed(self, input_ids: torch.Tensor, visual_tokens: Sequence[torch.Tensor]) -> torch.Tensor:
        """As `ValleyCore.embed`."""
        return self.core.embed(input_ids, visual_tokens)

    def embed_tokens(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [n] → [n, D]."""
        embeddings: torch.Tensor = self.core.get_input_embeddings()(token_ids)
        return embeddings


@torch.no_grad()
def open_adapter(core: ValleyCore, folder: Path, *, allow_bin: bool = True) -> CoreAdapter:
    """Open the adapter of `folder` onto `core`, which stays as it is.

    Raises:
        CheckpointError: as `check_adapter`.
    """
    adapter = _read_fitting(core, folder, allow_bin=allow_bin)
    linears = _linear_layers(core)
    twin, own = _with_own(core, adapter.extras)
    updates: dict[str, LowRankUpdate | OwnWeight] = {
        layer: _update(linears[layer], pair, adapter.scaling) for layer, pair in adapter.pairs.items()
    }
    table = _table(twin)
    head = _tied_head(core)
    if head is not None and table is not _table(core):
        updates[head] = OwnWeight(table)
    tensors = itertools.chain(own, *(update.tensors for update in updates.values()))
    return CoreAdapter(twin, updates, sum(one.nbytes for one in tensors))


def check_adapter(core: ValleyCore, folder: Path, *, allow_bin: bool = True) -> None:
    """Raise CheckpointError where `open_adapter` would: no adapter or a whole model, a kind of adapter or file that is
    not taken, one made for another base or shape. Little is read."""
    adapter = _read_fitting(core, folder, allow_bin=allow_bin)
    _check_base(core, adapter, allow_bin=allow_bin)


@torch.no_grad()
def open_visual_part(core: ValleyCore, folder: Path) -> ValleyCore:
    """`core` with the projector and pooling of an adapter folder, to make visual tokens; others are shared.

    The core may be without its language model. Raises CheckpointError where their shapes differ from the core's.
    """
    path = folder / EXTRAS
    extras = read_weights([path]) if path.is_file() else {}
    visual = {name: tensor for name, tensor in extras.items() if name.startswith(VISUAL_PARTS)}
    check_extras(folder, visual, dict(core.named_parameters()))
    return _with_own(core, visual)[0]


def _read_fitting(core: ValleyCore, folder: Path, *, allow_bin: bool) -> Adapter:
    if (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is a whole model, not an adapter alone; serve it as `model`, or give a folder that has "
            "adapter_config.json and no config.json"
        )
    adapter = read_adapter(folder, allow_bin=allow_bin)
    check_fit(adapter, {name: module.weight.shape for name, module in _linear_layers(core).items()})
    check_extras(folder, adapter.extras, dict(core.named_parameters()))
    if (head := _tied_head(core)) in adapter.pairs:
        raise CheckpointError(f"{folder} adapts {head}, which this model shares with its token table; leave it out")
    return adapter


def _check_base(core: ValleyCore, adapter: Adapter, *, allow_bin: bool) -> None:
    """One weight of the named base against the core's: a copy of the base under another name is the same base."""
    named = base_folder(adapter.folder)
    if named is not None and named.resolve() == Path(core.config._name_or_path).resolve():
        return
    layer = max(adapter.pairs)
    weight = _linear_layers(core)[layer].weight
    theirs = None
    if named is not None:
        try:
            theirs = read_weight(named, f"{LANGUAGE_MODEL}{layer}.weight", allow_bin=allow_bin)
        except CheckpointError as error:
            logger.info("the base of %s cannot be looked at: %s", adapter.folder, error)
    if theirs is None:
        logger.warning(
            "%s: its base %r is out of reach, so that it fits this model is known by shapes alone",
            adapter.folder,
            adapter.config.get("base_model_name_or_path"),
        )
    elif theirs.shape != weight.shape or not torch.equal(theirs.to(weight.dtype), weight.cpu()):
        raise CheckpointError(
            f"{adapter.folder} was trained on {named}, whose weights are not those of {core.config._name_or_path}; "
            "serve it with its own base"
        )


def _linear_layers(core: ValleyCore) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in core.language_model.named_modules() if type(module) is torch.nn.Linear}


def _tied_head(core: ValleyCore) -> str | None:
    """Name of the head, where it shares its weight with the token table."""
    head = core.language_model.get_output_embeddings()
    if head.weight is not _table(core):
        return None
    names: dict[Any, str] = {module: name for name, module in core.language_model.named_modules()}
    return names[head]


def _table(core: ValleyCore) -> torch.Tensor:
    table: Any = core.get_input_embeddings().weight
    return table  # type: ignore[no-any-return]


def _with_own(core: ValleyCore, extras: Mapping[str, torch.Tensor]) -> tuple[ValleyCore, list[torch.nn.Parameter]]:
    """A core of the same parameters but those of `extras` that differ, and these."""
    shared = {id(one): one for one in itertools.chain(core.parameters(), core.buffers())}
    twin = copy.deepcopy(core, shared)
    own = []
    for name, tensor in extras.items():
        parameter = core.get_parameter(name)
        # A copy: what is read is backed by its file.
        value = tensor.to(parameter.device, parameter.dtype, copy=True)
        if torch.equal(value, parameter):
            continue
        own.append(torch.nn.Parameter(value, requires_grad=False))
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, own[-1])
    return twin.eval(), own


def _update(layer: torch.nn.Linear, pair: Mapping[str, torch.Tensor], scaling: float) -> LowRankUpdate:
    weight = layer.weight

    def here(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(weight.device, weight.dtype, copy=True)

    down, up = pair["A"].to(weight.device).float(), scaling * pair["B"].to(weight.device).float()
    gain = None
    if MAGNITUDE in pair:
        gain = here(pair[MAGNITUDE].to(weight.device).float() / (weight.float() + up @ down).norm(dim=1))
    return LowRankUpdate(here(down), here(up), gain, layer.bias)
