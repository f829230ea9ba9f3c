"""Where media comes from: the policy of the server, by every kind of locator."""

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from serve_stand_in import Recorder, app, config, send, two_words

from valley_ray.errors import SamplingError
from valley_ray.media.sampling import FrameSampling
from valley_ray.serve.protocol import FrameWish

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class _Site(BaseHTTPRequestHandler):
    """/away leads to another host name; everything else is as many bytes as its path says."""

    def do_GET(self) -> None:
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.2:{self.server.server_address[1]}/5")
            self.end_headers()
            return
        data = b"x" * int(self.path[1:])
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Site)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


async def ask(url: str, recorder: Recorder | None = None, *, num: int = 1, **fields: Any) -> httpx.Response:
    return await ask_front(app(recorder, config(**fields)), url, num=num)


async def ask_front(front: FastAPI, url: str, *, num: int = 1) -> httpx.Response:
    video = {"type": "video_url", "video_url": {"url": url}}
    content = [*([video] * num), {"type": "text", "text": "what?"}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
    return await send(front, json=body)


def code(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


async def test_urls_are_refused_unless_their_host_is_allowed(site: str) -> None:
    assert code(await ask(f"{site}/5")) == (400, "source_not_allowed")
    assert code(await ask(f"{site}/5", allow_hosts=("example.org",))) == (400, "source_not_allowed")
    private = await ask(f"{site}/5", allow_hosts=("127.0.0.1",))
    assert code(private) == (400, "source_not_allowed")
    assert "not a public address" in private.json()["error"]["message"]


async def test_allowed_urls_are_fetched_inside_the_limits(site: str) -> None:
    allowed: dict[str, Any] = {"allow_hosts": ("127.0.0.1",), "allow_private_addresses": True}
    recorder = two_words()
    assert (await ask(f"{site}/5", recorder, **allowed)).status_code == 200
    [media] = recorder.requests[0].media
    assert media.data == b"xxxxx"
    assert code(await ask(f"{site}/1001", **allowed)) == (400, "source_too_large")
    assert code(await ask(f"{site}/away", **allowed)) == (400, "source_not_allowed")


async def test_equal_content_has_one_key_however_it_came(site: str, tmp_path: Path) -> None:
    recorder = two_words()
    settings = config(tmp_path, allow_hosts=("127.0.0.1",), allow_private_addresses=True)
    front = app(recorder, settings)
    stored = await send(front, path="/v1/files", files={"file": ("a", b"xxx")}, data={"purpose": "vision"})
    urls = [stored.json()["id"], f"{site}/3", "data:video/mp4;base64,eHh4"]
    content = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": "what?"})
    reply = await send(front, json={"model": "tiny", "messages": [{"role": "user", "content": content}]})
    assert reply.status_code == 200, reply.text
    assert len({media.key for media in recorder.requests[0].media}) == 1


async def test_paths_outside_the_roots_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"a")
    (tmp_path / "b.mp4").write_bytes(b"b")
    (tmp_path / "in" / "link.mp4").symlink_to(tmp_path / "b.mp4")
    roots: dict[str, Any] = {"allow_roots": (tmp_path / "in",)}
    assert (await ask(str(tmp_path / "in" / "a.mp4"), **roots)).status_code == 200
    for path in (tmp_path / "b.mp4", tmp_path / "in" / ".." / "b.mp4", tmp_path / "in" / "link.mp4"):
        assert code(await ask(str(path), **roots)) == (400, "source_not_allowed")
    assert code(await ask(str(tmp_path / "in" / "a.mp4"))) == (400, "source_not_allowed")


async def test_media_of_one_request_is_counted() -> None:
    url = "data:video/mp4;base64,AAEC"
    assert (await ask(url, num=2, max_media=2)).status_code == 200
    assert code(await ask(url, num=3, max_media=2)) == (400, "over_limit")


async def test_frames_over_the_ceiling_and_contradictions_are_refused() -> None:
    def body(part: dict[str, Any], url: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
        video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAEC", **url}, **part}
        content = [video, {"type": "text", "text": "what?"}]
        return {"model": "tiny", "messages": [{"role": "user", "content": content}], **request}

    for part, url, request, message in (
        ({"num_frames": 65}, {}, {}, "num_frames=65 is over this server's 64"),
        ({}, {"num_frames": 65}, {}, "num_frames=65 is over"),
        ({}, {}, {"num_frames": 65}, "num_frames=65 is over"),
        ({"num_frames": 2}, {"fps": 1}, {}, "not both"),
        ({"num_frames": 2, "fps": 1}, {}, {}, "not both"),
        ({"start_s": 5}, {}, {"end_s": 4}, "end_s must be after start_s"),
    ):
        reply = await send(app(), json=body(part, url, request))
        assert reply.status_code == 400
        assert message in reply.json()["error"]["message"]
    assert (await send(app(), json=body({"fps": 1}, {}, {"num_frames": 4}))).status_code == 200


def test_wishes_change_what_they_name_and_nothing_else() -> None:
    default = FrameSampling(num_frames=8, folder_order="directory")
    assert FrameWish().over(default) == default
    assert FrameWish(fps=2.0).over(default) == FrameSampling(num_frames=None, fps=2.0, folder_order="directory")
    assert FrameWish(start_s=1.0).over(default) == FrameSampling(num_frames=8, start_s=1.0, folder_order="directory")
    by_rate = FrameSampling(num_frames=None, fps=1.0, start_s=3.0)
    assert FrameWish(num_frames=4).over(by_rate) == FrameSampling(num_frames=4, start_s=3.0)
    assert FrameWish(end_s=2.0).over(by_rate).start_s is None
    with pytest.raises(SamplingError, match="end_s must be after start_s"):
        FrameWish(start_s=2.0, end_s=1.0).over(default)


async def test_nobody_waits_behind_the_slow_downloads_of_others(tmp_path: Path) -> None:
    begun, ended = threading.Semaphore(0), threading.Event()

    class Silent(_Site):
        def do_GET(self) -> None:
            begun.release()
            ended.wait(10)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"bytes")
    front = app(settings=config(allow_hosts=("127.0.0.1",), allow_private_addresses=True, allow_roots=(tmp_path,)))
    silent = f"http://127.0.0.1:{server.server_address[1]}/1"
    try:
        slow = asyncio.create_task(ask_front(front, silent, num=16))
        for _ in range(8):
            assert await asyncio.to_thread(begun.acquire, timeout=5)
        async with asyncio.timeout(5):
            assert (await ask_front(front, str(clip))).status_code == 200
        assert not slow.done()
        ended.set()
        assert (await slow).json()["error"]["code"] == "fetch_interrupted"
    finally:
        ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
