"""Ingress: the HTTP front as a deployment; answers come from a decoder. Loads no torch."""

from collections.abc import AsyncGenerator

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from valley_ray.serve.api import Backend, build_api
from valley_ray.serve.calls import unwrapped
from valley_ray.serve.config import ServeConfig
from valley_ray.serve.protocol import AnswerDelta, AnswerRequest


@serve.ingress()
class Ingress:
    """One HTTP front; replicas share nothing."""

    def __init__(self, config: ServeConfig, decoder: DeploymentHandle) -> None:
        self._config, self._decoder = config, decoder.options(stream=True)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._config, Backend(answer=self._answer, put=ray.put))

    async def _answer(self, request: AnswerRequest) -> AsyncGenerator[AnswerDelta, None]:
        with unwrapped():
            deltas = self._decoder.answer.remote(request)
            try:
                async for delta in deltas:
                    yield delta
            finally:
                deltas.cancel()
