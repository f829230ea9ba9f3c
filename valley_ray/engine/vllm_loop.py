"""vLLM's AsyncLLM on an asyncio loop in a thread of its own: requests in, outputs out, for a caller without asyncio.

Knows prompts as embeddings and vLLM's outputs as they come; what they mean is `valley_ray.engine.vllm`'s business.
L prompt tokens, D hidden width.
"""

import asyncio
import os
import queue
import threading
import weakref
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import torch

from valley_ray.engine.memory import KEEP_FREED_VARIABLES
from valley_ray.engine.vllm_owner import own
from valley_ray.errors import ConfigError

_ENVIRONMENT = {
    # Who asks what is nobody else's business.
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # Several replicas on a machine would all be bound to its first cores; OMP_NUM_THREADS says how many threads.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # The other runner has another interface of logits processors.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    **KEEP_FREED_VARIABLES,
}
"""Where the user's environment does not say otherwise."""

_CLOSE_S = 10.0
"""How long vLLM's process may take to end."""

Arrived = tuple[str, Any]
"""Request id, and a RequestOutput or the exception that ended the request."""


class VllmLoop:
    """A running vLLM; `close` ends it, and so does the end of the last reference."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """`arguments` are those of vLLM's AsyncEngineArgs; raises ConfigError where vLLM does not start with them."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        own()
        if arguments.get("distributed_executor_backend") == "uni":
            # Its CPU platform refuses one process otherwise; the client that is used here starts that one in any case.
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        self._arrived: queue.SimpleQueue[Arrived] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        thread.start()
        try:
            self._llm = self._call(_start(arguments)).result()
        except Exception as error:  # of whatever class: vLLM raises many, and names the reason
            _stop(None, self._loop, thread)
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"vLLM does not start: {reason[:500]}; its log above says more") from error
        self._finalizer = weakref.finalize(self, _stop, self._llm, self._loop, thread)

    def ask(self, request_id: str, embeds: torch.Tensor, params: Any) -> "Future[None]":
        """Put a prompt [L, D] in line; its outputs arrive, with `params` vLLM's SamplingParams."""
        return self._call(_read(self._llm, self._arrived, request_id, embeds, params))

    def abort(self, reader: "Future[None]") -> None:
        """Free the place of the request that `ask` gave this for; outputs on their way may still arrive."""
        reader.cancel()

    def arrived(self, timeout_s: float) -> Iterator[Arrived]:
        """What has come, in order; waits up to `timeout_s` seconds for the first."""
        try:
            yield self._arrived.get(block=timeout_s > 0, timeout=timeout_s or None)
            while True:
                yield self._arrived.get_nowait()
        except queue.Empty:
            return

    @property
    def has_failed(self) -> bool:
        """Whether vLLM's process is gone; what was asked of it may then never arrive."""
        return bool(self._llm.errored)

    def forget_prompts(self) -> None:
        """Empty the prefix cache."""
        self._call(self._llm.reset_prefix_cache()).result()

    def close(self) -> None:
        """End vLLM's process and the thread; once is enough."""
        self._finalizer()
        # It would end itself again while the interpreter ends.
        self._llm = None

    def _call(self, work: Coroutine[Any, Any, Any]) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)


async def _start(arguments: Mapping[str, Any]) -> Any:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))


async def _read(
    llm: Any, arrived: "queue.SimpleQueue[Arrived]", request_id: str, embeds: torch.Tensor, params: Any
) -> None:
    try:
        async for output in llm.generate({"prompt_embeds": embeds}, params, request_id):
            arrived.put((request_id, output))
    except Exception as error:  # whatever it is: the caller of `arrived` must not wait for ever
        arrived.put((request_id, error))


def _stop(llm: Any, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    # First, or what waits for vLLM's process takes its end for a failure and says so.
    asyncio.run_coroutine_threadsafe(_end_tasks(), loop).result(_CLOSE_S)
    if llm is not None:
        llm.shutdown(timeout=_CLOSE_S)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(_CLOSE_S)


async def _end_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
