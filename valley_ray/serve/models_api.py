"""/v1/models: what can be asked, and which adapter the name of a model means."""

import time
from typing import Literal

from fastapi import APIRouter

from valley_ray.errors import UnknownModelError
from valley_ray.serve.chat_reply import Reply
from valley_ray.serve.config import ServeConfig

_MOST_NAMED = 20
"""Names in an error, before the rest is only counted."""


class Model(Reply):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """When this server started, Unix time in seconds."""
    owned_by: str = "valley_ray"
    parent: str | None = None
    """Of an adapter: the model under it."""


class ModelList(Reply):
    """All models of this server."""

    object: Literal["list"] = "list"
    data: list[Model]


class ServedModels:
    """The model of a server, and the same under each of its adapters as NAME:ADAPTER."""

    def __init__(self, config: ServeConfig) -> None:
        name, created = config.served_name, int(time.time())
        self._adapters: dict[str, str | None] = {name: None}
        self._adapters |= {config.name_under(adapter): adapter for adapter in config.adapters}
        self.models = {
            one: Model(id=one, created=created, parent=None if adapter is None else name)
            for one, adapter in self._adapters.items()
        }

    def adapter_of(self, name: str) -> str | None:
        """The adapter that a model's name means, None for the model alone; raises UnknownModelError."""
        self._check(name)
        return self._adapters[name]

    def router(self) -> APIRouter:
        """The routes."""
        router = APIRouter(prefix="/v1/models", tags=["models"])

        @router.get("", response_model=ModelList)
        async def list_models() -> ModelList:
            """The models that can be asked."""
            return ModelList(data=list(self.models.values()))

        @router.get("/{model_id:path}", response_model=Model)
        async def get_model(model_id: str) -> Model:
            """One model."""
            self._check(model_id)
            return self.models[model_id]

        return router

    def _check(self, name: str) -> None:
        if name in self.models:
            return
        names = [repr(one) for one in self.models]
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        raise UnknownModelError(f"no model {name[:100]!r} here; this server has {', '.join(names[:_MOST_NAMED])}{more}")
