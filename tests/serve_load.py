"""Requests to a served app that go on while something happens to it, and the processes of its replicas."""

import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

PATH = "/v1/chat/completions"
END_TOKEN = 2
"""Of the tiny model's tokenizer; biased away, so that answers are as long as the test wants."""


def body(question: str, video: object = None, *, max_tokens: int, **fields: Any) -> dict[str, Any]:
    """A request that is answered with `max_tokens` tokens."""
    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if video is not None:
        content.insert(0, {"type": "video_url", "video_url": {"url": str(video)}})
    messages = [{"role": "user", "content": content}]
    bias = {str(END_TOKEN): -100}
    return {"model": "tiny", "messages": messages, "max_tokens": max_tokens, "logit_bias": bias, **fields}


def ask(url: str, request: dict[str, Any], timeout_s: float = 240.0) -> str:
    """The text of an answer, streamed or not; raises LostError with what came instead."""
    with httpx.Client(base_url=url, timeout=timeout_s) as client:
        if not request.get("stream"):
            response = client.post(PATH, json=request)
            if response.status_code != 200:
                raise LostError(response.text)
            text: str = response.json()["choices"][0]["message"]["content"]
            return text
        pieces, is_done = [], False
        with client.stream("POST", PATH, json=request) as response:
            if response.status_code != 200:
                raise LostError(response.read().decode())
            for line in response.iter_lines():
                is_done |= line == "data: [DONE]"
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise LostError(f"after {len(pieces)} pieces: {event}")
                    pieces += [choice["delta"].get("content") or "" for choice in event["choices"]]
        if not is_done:
            raise LostError(f"the stream ended after {len(pieces)} pieces")
        return "".join(pieces)


def burst(url: str, requests: Sequence[dict[str, Any]]) -> list[tuple[float, int, str | None]]:
    """Send all requests at once over connections that stand; (seconds, status, Retry-After) of each.

    Connections and texts are made before, so that what is timed is the server.
    """
    host = url.removeprefix("http://")
    connections = [http.client.HTTPConnection(host, timeout=240) for _ in requests]
    ready = threading.Barrier(len(requests))

    def send(connection: http.client.HTTPConnection, text: str) -> tuple[float, int, str | None]:
        connection.connect()
        ready.wait()
        began = time.monotonic()
        connection.request("POST", PATH, text, {"Content-Type": "application/json"})
        response = connection.getresponse()
        seconds = time.monotonic() - began
        response.read()
        return seconds, response.status, response.getheader("Retry-After")

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(send, connections, map(json.dumps, requests)))


class LostError(Exception):
    """A request that got no answer."""


@dataclass
class Tally:
    """What came of many requests."""

    answered: list[tuple[int, str, float]] = field(default_factory=list)
    """(which request, its text, seconds)."""
    lost: list[str] = field(default_factory=list)


@contextmanager
def load(url: str, requests: Sequence[dict[str, Any]], *, num_clients: int) -> Iterator[Tally]:
    """Ask `requests` in turns, over and over, while the block runs; those that are under way then are waited for."""
    tally, lock, stop = Tally(), threading.Lock(), threading.Event()
    turns = iter(range(10**9))

    def client() -> None:
        while not stop.is_set():
            with lock:
                turn = next(turns) % len(requests)
            began = time.monotonic()
            try:
                text = ask(url, requests[turn])
                tally.answered.append((turn, text, time.monotonic() - began))
            except (LostError, httpx.HTTPError) as error:
                tally.lost.append(f"request {turn}: {type(error).__name__} {error}")
                time.sleep(0.2)

    threads = [threading.Thread(target=client) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    try:
        yield tally
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def replicas(deployment: str) -> list[psutil.Process]:
    """Processes of a deployment's replicas on the Ray that this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            # Ray puts the method that runs behind the name.
            if "".join(process.cmdline()[:1]).startswith(f"ray::ServeReplica:valley:{deployment}"):
                found.append(process)
    return found


def kill_one(deployment: str) -> int:
    """SIGKILL one of a deployment's replicas; its process id."""
    victim = replicas(deployment)[0].pid
    os.kill(victim, signal.SIGKILL)
    return victim


@contextmanager
def stopped(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """The processes stand still while the block runs."""
    for one in processes:
        one.suspend()
    try:
        yield
    finally:
        for one in processes:
            one.resume()


def wait_until(what: Callable[[], bool], timeout_s: float, told: str) -> float:
    """Seconds until `what` holds."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < timeout_s, f"{told} within {timeout_s:g} s"
        time.sleep(0.02)
    return time.monotonic() - began
