"""A web server on loopback that does what servers do and should not; it counts what it was asked."""

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import unquote


class Site(ThreadingHTTPServer):
    """Behaviour is the first part of a path, content its last: /cut/5000/a.mp4 breaks off after 5000 bytes."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, contents: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.contents = contents
        self.version = 1
        """Part of every ETag."""
        self.asked: Counter[str] = Counter()
        """Requests by path."""
        self.ranges: list[str] = []
        self.headers: list[tuple[str, dict[str, str]]] = []
        self.times: list[float] = []
        self.now_open = self.most_open = 0
        self.lock = threading.Lock()
        self.released = threading.Event()
        """Ends stalls and lets `/wait` answer."""

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        with self.server.lock:
            self.server.asked[path] += 1
            self.server.times.append(time.monotonic())
            self.server.headers.append((path, dict(self.headers)))
            self.server.now_open += 1
            self.server.most_open = max(self.server.most_open, self.server.now_open)
            number = self.server.asked[path]
        try:
            self._answer(path, number)
        finally:
            with self.server.lock:
                self.server.now_open -= 1

    do_POST = do_GET

    def _answer(self, path: str, number: int) -> None:
        behaviour, *arguments = path.strip("/").split("/")
        body = self.server.contents.get(PurePosixPath(path).name, b"")
        if behaviour.isdecimal():
            self._reply(int(behaviour), b"")
        elif behaviour == "ok":
            self._reply(200, body, ranges=True)
        elif behaviour == "plain":
            self._reply(200, body)
        elif behaviour == "busy":  # /busy/<status>/<times>/<retry after>/name
            status, times, retry_after = arguments[:3]
            headers = {} if retry_after == "-" else {"Retry-After": retry_after}
            self._reply(200, body) if number > int(times) else self._reply(int(status), b"", headers=headers)
        elif behaviour == "cut":  # every answer ends after so many bytes
            self._reply(200, body, ranges=True, stop_after=int(arguments[0]))
        elif behaviour == "cut-plain":  # only the first answer is cut, and there are no ranges
            self._reply(200, body, stop_after=int(arguments[0]) if number == 1 else None)
        elif behaviour in ("cut-once", "cut-changed"):
            self._reply(200, body, ranges=True, stop_after=int(arguments[0]) if number == 1 else None)
            self.server.version += behaviour == "cut-changed" and number == 1
        elif behaviour == "wrong-range":
            self._wrong_range(body, number, int(arguments[0]))
        elif behaviour == "stall":
            self._reply(200, body, ranges=True, stop_after=int(arguments[0]), stall=True)
        elif behaviour == "drip":
            self._drip(body)
        elif behaviour == "says-more":
            self._reply(200, body, headers={"Content-Length": str(len(body) + 1000)})
        elif behaviour == "says-less":
            self._reply(200, body, headers={"Content-Length": str(len(body) // 3)})
        elif behaviour == "unsaid":  # no length; the first answer is cut
            cut = len(body) // 2 if number == 1 else None
            self._reply(200, body, headers={"Content-Length": None}, stop_after=cut)
        elif behaviour == "html":
            self._reply(200, b"<html><body>Please log in</body></html>", headers={"Content-Type": "video/mp4"})
        elif behaviour == "page":
            self._reply(200, b"<html><body>No video here</body></html>", headers={"Content-Type": "text/html"})
        elif behaviour == "loop":
            self._reply(302, b"", headers={"Location": f"/loop/{arguments[0]}"})
        elif behaviour == "to":
            self._reply(302, b"", headers={"Location": unquote(self.path.partition("?")[2])})
        elif behaviour == "slow":
            time.sleep(float(arguments[0]))
            self._reply(200, body, ranges=True)
        elif behaviour == "wait":
            self.server.released.wait(60)
            self._reply(200, body, ranges=True)
        elif behaviour == "api":
            self._api(arguments[0])
        else:
            self._reply(404, b"")

    def _api(self, name: str) -> None:
        replies = {"empty": {"data": []}, "number": {"data": [{"url": 7}]}}
        reply = replies.get(name, {"data": [{"url": f"/ok/{name}.mp4"}]})
        self._reply(200 if name != "gone" else 404, json.dumps(reply).encode())

    def _wrong_range(self, body: bytes, number: int, stop_after: int) -> None:
        if number == 2 and "Range" in self.headers:
            headers = {"Content-Range": f"bytes 0-{len(body) - 1}/{len(body)}", **self._validators()}
            self._reply(206, body, headers=headers)
        else:
            self._reply(200, body, ranges=True, stop_after=stop_after if number == 1 else None)

    def _validators(self) -> dict[str, str]:
        return {"ETag": f'"{self.server.version}"'}

    def _reply(
        self,
        status: int,
        body: bytes,
        *,
        headers: dict[str, str | None] | None = None,
        ranges: bool = False,
        stop_after: int | None = None,
        stall: bool = False,
    ) -> None:
        sent: dict[str, str | None] = {"Content-Type": "video/mp4"}
        if ranges:
            sent |= self._validators()
            asked = self.headers.get("Range")
            matches = self.headers.get("If-Range", sent["ETag"]) == sent["ETag"]
            if asked and matches:
                self.server.ranges.append(asked)
                start = int(asked.removeprefix("bytes=").partition("-")[0])
                status = 206 if start < len(body) else 416
                last = f"{start}-{len(body) - 1}" if status == 206 else "*"
                sent["Content-Range"] = f"bytes {last}/{len(body)}"
                body = body[start:]
        sent |= {"Content-Length": str(len(body)), **(headers or {})}
        self.send_response(status)
        for name, value in sent.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body[:stop_after])
            if stall:
                self.wfile.flush()
                self.server.released.wait(60)

    def _drip(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            for index in range(len(body)):
                self.wfile.write(body[index : index + 1])
                if self.server.released.wait(0.05):
                    return

    def log_message(self, *_arguments: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serving(contents: dict[str, bytes]) -> Iterator[Site]:
    """A Site that runs until the block ends."""
    with Site(contents) as site:
        thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield site
        finally:
            site.released.set()
            site.shutdown()
            thread.join()
