"""Ingress: the HTTP front as a deployment; answers come from a decoder. Loads no torch."""

from collections.abc import AsyncGenerator

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.context import _get_global_client as get_serve_client
from ray.serve.handle import DeploymentHandle

from valley_ray.serve.api import Backend, build_api
from valley_ray.serve.calls import unwrapped
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.keys import Keys, check_exposure
from valley_ray.serve.protocol import AnswerDelta, AnswerRequest
from valley_ray.serve.second_try import Asker


@serve.ingress()
class Ingress:
    """One HTTP front; replicas share nothing."""

    def __init__(self, config: ServeConfig, decoder: DeploymentHandle, keys: Keys) -> None:
        check_exposure(listening_host() or "0.0.0.0", keys, allow_no_keys=config.allow_no_keys)
        self._config, self._keys, self._decoder = config, keys, decoder.options(stream=True)
        self._asker = Asker(self._answer)

    def __serve_build_asgi_app__(self) -> FastAPI:
        backend = Backend(answer=self._asker.answer, put=ray.put)
        return build_api(self._config, backend, keys=self._keys, behind_serve=True)

    async def _answer(self, request: AnswerRequest) -> AsyncGenerator[AnswerDelta, None]:
        with unwrapped():
            decoder = self._decoder
            if request.adapter is not None:
                decoder = decoder.options(multiplexed_model_id=request.adapter)
            deltas = decoder.answer.remote(request)
            try:
                async for delta in deltas:
                    yield delta
            finally:
                deltas.cancel()


def listening_host() -> str | None:
    """The address that Serve's proxies listen on, which the file's `http_options` or Serve itself named; None where
    Serve does not run yet."""
    client = get_serve_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    if client is None:
        return None
    host: str | None = client.http_config.host
    return host or "0.0.0.0"
