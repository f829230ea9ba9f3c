"""An adapter per request: all tokens of a pass go through the same layers, each with the change of its own adapter.

The weights stand in memory once, whatever number of adapters is asked for, and so does the cache. An adapter belongs
to the request that brings it: nothing is registered, and nothing of it stays here once its last request is over.
Knows neither files nor how an adapter changes a layer.
n tokens, N new tokens of a pass, L prompt tokens, D hidden width, D_in, D_out: a layer's widths.
"""

import secrets
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from transformers.modeling_utils import PreTrainedModel

from valley_ray.engine.prefix import Keys


class LayerUpdate(Protocol):
    """What an adapter does to one linear layer."""

    def __call__(self, states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """[..., D_in] and the layer's own output [..., D_out] → the adapted layer's output."""


class Adapter(Protocol):
    """What stands between the model and a request that names it (`valley_ray.model.adapters` has one)."""

    @property
    def updates(self) -> Mapping[str, LayerUpdate]:
        """By the name of the language model's layer."""

    def embed(self, input_ids: torch.Tensor, visual_tokens: Sequence[torch.Tensor]) -> torch.Tensor:
        """As the core's `embed`."""

    def embed_tokens(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [n] → [n, D]: new tokens, by the adapter's own table where it has one."""


Part = tuple[Adapter, torch.Tensor | None]
"""An adapter, and its tokens' places in a pass; None: all of them."""


class PassAdapters:
    """Which tokens of the pass belong to which adapter; the adapted layers of `model` read it."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self._model, self._device = model, device
        self._head = model.get_output_embeddings()
        self._adapted: set[str] = set()
        self._salts: weakref.WeakKeyDictionary[Adapter, int] = weakref.WeakKeyDictionary()
        self.of_tokens: list[Part] = []
        self.of_logits: list[Part] = []

    def prepare(self, adapter: Adapter | None) -> None:
        """Let the layers that `adapter` changes ask whom a token belongs to."""
        if adapter is None:
            return
        for name in adapter.updates.keys() - self._adapted:
            parent, _, child = name.rpartition(".")
            layer = self._model.get_submodule(name)
            adapted = _AdaptedLinear(layer, name, self, is_head=layer is self._head)
            setattr(self._model.get_submodule(parent), child, adapted)
            self._adapted.add(name)

    @contextmanager
    def of_pass(self, owners: Sequence[Adapter | None], kept: Sequence[int]) -> Iterator[None]:
        """While a pass runs: `owners` of its N new tokens, and the places of those whose logits are computed."""
        self.of_tokens = self._parts(owners)
        self.of_logits = self._parts([owners[place] for place in kept]) if self.of_tokens else []
        try:
            yield
        finally:
            self.of_tokens, self.of_logits = [], []

    def embed_tokens(
        self, token_ids: torch.Tensor, embeds: torch.Tensor, owners: Sequence[Adapter | None]
    ) -> torch.Tensor:
        """The embeddings of new tokens: `embeds` [n, D], where they belong to no adapter."""
        for adapter, places in self._parts(owners):
            if places is None:
                return adapter.embed_tokens(token_ids)
            embeds[places] = adapter.embed_tokens(token_ids[places])
        return embeds

    def salted(self, keys: Keys, adapter: Adapter | None) -> Keys:
        """Content keys that no other adapter has: it makes other keys and values of the same embeddings."""
        if adapter is None:
            return keys
        return keys ^ self._salts.setdefault(adapter, secrets.randbits(63))

    def _parts(self, owners: Sequence[Adapter | None]) -> list[Part]:
        places: dict[Adapter, list[int]] = {}
        for place, owner in enumerate(owners):
            if owner is not None:
                places.setdefault(owner, []).append(place)
        return [
            (owner, None if len(own) == len(owners) else torch.tensor(own, device=self._device))
            for owner, own in places.items()
        ]


class _AdaptedLinear(torch.nn.Module):
    """A layer of the engine's own copy, packed or not; it stays as it is for tokens without an adapter."""

    def __init__(self, layer: torch.nn.Module, name: str, of_pass: PassAdapters, *, is_head: bool) -> None:
        super().__init__()
        self._layer: Any = layer
        self._name, self._pass, self._is_head = name, of_pass, is_head

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[1, n, D_in] → [1, n, D_out]."""
        output: torch.Tensor = self._layer(states)
        for adapter, places in self._pass.of_logits if self._is_head else self._pass.of_tokens:
            update = adapter.updates.get(self._name)
            if update is None:
                continue
            if places is None:
                return update(states, output)
            output[:, places] = update(states[:, places], output[:, places])
        return output
