"""A judge against a server on loopback that is busy, breaks, refuses and talks around its verdict."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from valley_ray.evaluate.config import JudgeConfig
from valley_ray.evaluate.judge import Case, Verdict, judge, read_verdict

GOOD = 'Sure: {"correct": "yes", "score": 4}'
CASES = [Case("what?", "red", answer) for answer in ("red", "crimson", "blue")]


class Server:
    """Replies in the order of `script` to each answer that is judged; then what its last entry says."""

    def __init__(self, script: dict[str, list[tuple[int, str]]]) -> None:
        self.script, self.requests, self.at_once, self.most_at_once = script, [], 0, 0
        lock = threading.Lock()
        gate = self.gate = threading.Semaphore(0)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append((self.path, self.headers.get("Authorization"), body))
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                    answer = body["messages"][1]["content"].rpartition("Answer: ")[2]
                    steps = outer.script[answer]
                    status, text = steps.pop(0) if len(steps) > 1 else steps[0]
                if text == "wait":
                    gate.acquire()
                    text = GOOD
                with lock:
                    outer.at_once -= 1
                reply = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
                self.send_response(status)
                if status == 429:
                    self.send_header("Retry-After", "7")
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    opened: list[Server] = []
    yield opened
    for server in opened:
        server.close()


def open_server(servers: list[Server], **script: list[tuple[int, str]]) -> Server:
    servers.append(Server(script))
    return servers[-1]


def test_verdicts_come_in_order_with_the_key_and_are_kept(
    servers: list[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    no = (200, '{"correct": "no", "score": 0}')
    server = open_server(servers, red=[(200, GOOD)], crimson=[(200, GOOD)], blue=[no])
    config = JudgeConfig(url=server.url, model="m", api_key_variable="SOME_KEY")
    expected = [Verdict(True, 4.0), Verdict(True, 4.0), Verdict(False, 0.0)]
    assert judge(CASES, config, tmp_path / "kept.jsonl") == expected
    path, authorization, body = server.requests[0]
    assert (path, authorization, body["model"]) == ("/v1/chat/completions", "Bearer secret", "m")
    assert judge([*CASES, CASES[0]], config, tmp_path / "kept.jsonl") == [*expected, expected[0]]
    assert len(server.requests) == 3, "a verdict is asked for once"
    assert "secret" not in (tmp_path / "kept.jsonl").read_text(encoding="utf-8")


def test_busy_servers_and_replies_without_a_verdict_are_tried_again_after_pauses(
    servers: list[Server], tmp_path: Path
) -> None:
    steps = [(429, ""), (500, ""), (200, "I cannot say."), (200, GOOD)]
    server = open_server(servers, red=steps)
    pauses: list[float] = []
    found = judge(CASES[:1], JudgeConfig(url=server.url, model="m"), tmp_path / "k", sleep=pauses.append)
    assert found == [Verdict(True, 4.0)]
    assert pauses == [7.0, 2.0, 4.0], "what the server asks for, else growing pauses"


def test_failures_are_counted_and_asked_again_by_the_next_run(servers: list[Server], tmp_path: Path) -> None:
    server = open_server(servers, red=[(200, GOOD)], crimson=[(401, "no key")], blue=[(503, "")])
    config = JudgeConfig(url=server.url, model="m", retries=2)
    found = judge(CASES, config, tmp_path / "k", sleep=lambda _: None)
    assert found[0] == Verdict(True, 4.0)
    assert found[1].error.startswith("status 401")
    assert (found[2].error, found[2].score) == ("status 503", None)
    assert len(server.requests) == 1 + 1 + 3, "a refusal is not tried again"
    server.script = {"crimson": [(200, GOOD)], "blue": [(200, GOOD)]}
    assert [one.error for one in judge(CASES, config, tmp_path / "k")] == ["", "", ""]


def test_a_server_that_is_not_there_is_a_verdict_with_a_reason(tmp_path: Path) -> None:
    config = JudgeConfig(url="http://127.0.0.1:9/v1", model="m", retries=1)
    [found] = judge(CASES[:1], config, tmp_path / "k", sleep=lambda _: None)
    assert "ConnectError" in found.error


def test_no_more_requests_run_at_once_than_were_allowed(servers: list[Server], tmp_path: Path) -> None:
    cases = [Case("what?", "red", f"a{number}") for number in range(12)]
    server = open_server(servers, **{case.prediction: [(200, "wait")] for case in cases})
    for _ in cases:
        server.gate.release()
    config = JudgeConfig(url=server.url, model="m", concurrency=3)
    assert all(one.is_right for one in judge(cases, config, tmp_path / "k"))
    assert server.most_at_once <= 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"correct": "No", "score": 1}', Verdict(False, 1.0)),
        ('```json\n{"score": "3", "correct": true}\n```', Verdict(True, 3.0)),
        ('{"correct": "yes", "score": 6}', None),
        ('{"correct": "maybe", "score": 2}', None),
        ('{"correct": "yes"}', None),
        ("yes, 4", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_from_whatever_stands_around_it(text: str, expected: Verdict | None) -> None:
    assert read_verdict(text) == expected
