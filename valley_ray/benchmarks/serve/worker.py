"""What the server is compared with: an HTTP worker as the original's, one process that answers one request at a time.

    python -m valley_ray.benchmarks.serve.worker MODEL_FOLDER

Each request names a video. The worker decodes it (decord, PIL, numpy), encodes it, and runs the language model token by
token over transformers' own cache; every second token it sends all of the text so far, as JSON ended by a zero byte
(upstream: valley/serve/model_worker.py, `generate_video_stream` and `--stream-interval 2`). Kinder than the original: a
lock instead of five requests that take turns in threads, no heartbeats, no detours of pixels over tensors.
"""

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import iterate_in_threadpool
from transformers import DynamicCache

from valley_ray.answering import build_prompt, load_model
from valley_ray.benchmarks.decode_cost import reference_chain
from valley_ray.benchmarks.serve.child import Starter
from valley_ray.chat.conversation import from_openai
from valley_ray.processor import ValleyProcessor
from valley_ray.serve.app import free_port

PATH = "/worker_generate_stream"
STREAM_INTERVAL = 2
"""Tokens between two messages of a stream."""


class Worker:
    """A model of one process."""

    def __init__(self, folder: Path) -> None:
        self._model: Any = load_model(folder)
        self._processor = ValleyProcessor.from_pretrained(folder)

    @torch.inference_mode()
    def stream(self, request: dict[str, Any]) -> Iterator[bytes]:
        """`{"prompt", "videos": [path], "max_new_tokens"}` → JSON messages `{"text", "error_code"}`; greedy."""
        core = self._model.core
        embeds = self._embed(request["prompt"], Path(request["videos"][0]))
        cache, token_ids = DynamicCache(), list[int]()
        count = request["max_new_tokens"]
        for index in range(count):
            output = core.language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = int(output.logits[0, -1].argmax())
            token_ids.append(token)
            has_ended = token in self._processor.stop_token_ids
            if index % STREAM_INTERVAL == 0 or index == count - 1 or has_ended:
                text = self._processor.decode(token_ids)
                yield json.dumps({"text": request["prompt"] + text, "error_code": 0}).encode() + b"\0"
            if has_ended:
                return
            embeds = core.get_input_embeddings()(torch.tensor([[token]]))

    def _embed(self, question: str, video: Path) -> torch.Tensor:
        """[1, L, D] of a prompt whose video was never seen before."""
        parts = [{"type": "video_url", "video_url": {"url": str(video)}}, {"type": "text", "text": question}]
        conversation, _ = from_openai([{"role": "user", "content": parts}])
        [features] = self._model.encode_clips([torch.from_numpy(reference_chain(video))])
        prompt = build_prompt(self._processor, conversation, [self._model.core.visual_tokens(features)])
        embeds: torch.Tensor = self._model.core.embed(torch.tensor(prompt.input_ids), prompt.visual_tokens)
        return embeds[None]


def build_app(worker: Worker) -> FastAPI:
    """The worker over HTTP."""
    app, lock = FastAPI(), asyncio.Lock()

    @app.post(PATH)
    async def generate(request: Request) -> StreamingResponse:
        wanted = await request.json()

        async def one_at_a_time() -> AsyncGenerator[bytes, None]:
            async with lock:
                async for message in iterate_in_threadpool(worker.stream(wanted)):
                    yield message

        return StreamingResponse(one_at_a_time())

    return app


def main(folder: str) -> None:
    """Serve until whoever started this process lets go of it."""
    starter = Starter()
    app, port = build_app(Worker(Path(folder))), free_port("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))

    async def serve() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        starter.tell(f"http://127.0.0.1:{port}")
        await asyncio.to_thread(starter.wait)
        server.should_exit = True
        await serving

    asyncio.run(serve())


if __name__ == "__main__":
    main(sys.argv[1])
