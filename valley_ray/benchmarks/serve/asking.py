"""Clients: questions about videos over HTTP, streamed, many at once. As little work per token as a client can do."""

import http.client
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from valley_ray.benchmarks.serve.worker import PATH as WORKER_PATH

_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Ask:
    """One question."""

    video: Path
    question: str
    num_tokens: int
    """Of the answer."""


@dataclass(frozen=True)
class Answered:
    """What a client saw."""

    text: str
    first_s: float
    """Until the first text."""
    seconds: float
    """Until the end."""
    num_prompt_tokens: int = 0
    """Where the server says."""


def ask_server(url: str, model: str, ask: Ask) -> Answered:
    """Ask ours; raises AssertionError where the answer has another length than asked for."""
    content = [
        {"type": "video_url", "video_url": {"url": str(ask.video)}},
        {"type": "text", "text": ask.question},
    ]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": ask.num_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    usage: dict[str, int] = {}
    start, first_s, text = time.perf_counter(), 0.0, ""
    for line in _lines(url, "/v1/chat/completions", body):
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        assert "error" not in event, f"the server answers {event}"
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            text += choice["delta"].get("content") or ""
        if text and not first_s:
            first_s = time.perf_counter() - start
    num_tokens = usage.get("completion_tokens")
    assert num_tokens == ask.num_tokens, f"asked the server for {ask.num_tokens} tokens, {num_tokens} came"
    return Answered(text, first_s, time.perf_counter() - start, usage["prompt_tokens"])


def ask_worker(url: str, ask: Ask) -> Answered:
    """Ask the one-request-at-a-time worker; it sends all of the text every time, the prompt before it."""
    body = {"prompt": ask.question, "videos": [str(ask.video)], "max_new_tokens": ask.num_tokens, "temperature": 0}
    start, first_s, received = time.perf_counter(), 0.0, b""
    with _post(url, WORKER_PATH, body) as response:
        while piece := response.read1():
            received += piece
            if b"\0" in received and not first_s:
                first_s = time.perf_counter() - start
    *_, last, end = received.split(b"\0")
    assert not end, f"the worker broke off: {end!r}"
    return Answered(json.loads(last)["text"].removeprefix(ask.question), first_s, time.perf_counter() - start)


def ask_at_once(asks: Sequence[Ask], answer: Callable[[Ask], Answered]) -> tuple[float, list[Answered]]:
    """(wall seconds until all are answered, answers in the order of `asks`), each by a client of its own."""
    with ThreadPoolExecutor(len(asks)) as pool:
        start = time.perf_counter()
        answers = list(pool.map(answer, asks))
        return time.perf_counter() - start, answers


def _lines(url: str, path: str, body: dict[str, Any]) -> Iterator[bytes]:
    with _post(url, path, body) as response:
        while line := response.readline():
            yield line


def _post(url: str, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=_TIMEOUT_S)
    headers = {"content-type": "application/json", "connection": "close"}
    connection.request("POST", path, json.dumps(body), headers)
    response = connection.getresponse()
    assert response.status == 200, f"{url}{path} answers {response.status}: {response.read(500)!r}"
    return response
