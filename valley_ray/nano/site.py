"""Generated scenes on a web server of this process, and the list that names them: downloads without a net."""

import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from valley_ray.nano.clips import Split, write_scene

SCENES = Split("site", 30_000, (("single", 24),))
NOT_VIDEOS = {"sign-in.mp4": "<html>Please sign in</html>", "gone.mp4": None}
"""What lists of the net hold too: a page that is named like a video, and nothing at all."""


@contextlib.contextmanager
def serve_scenes(list_file: Path, *, host: str) -> Iterator[None]:
    """Serve SCENES and NOT_VIDEOS at `host` while the block runs; `list_file` gets their URLs, one twice.

    The port of an earlier list is taken again where it is free, so that its URLs stay the same.
    """
    folder = list_file.parent / "site"
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for stem, scene in SCENES.scenes():
        names.append(f"{stem}.mp4")
        if not (folder / names[-1]).exists():
            write_scene(folder / names[-1], scene)
    for name, text in NOT_VIDEOS.items():
        if text is not None:
            (folder / name).write_text(text, encoding="utf-8")
    with _server(folder, host, _earlier_port(list_file)) as server:
        urls = [f"http://{host}:{server.server_port}/{name}" for name in (*names, names[0], *NOT_VIDEOS)]
        list_file.write_text("\n".join(urls) + "\n", encoding="utf-8")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_arguments: object) -> None:
        """Say nothing: the ledger does."""


def _server(folder: Path, host: str, port: int) -> ThreadingHTTPServer:
    handler = partial(_Handler, directory=str(folder))
    try:
        return ThreadingHTTPServer((host, port), handler)
    except OSError:  # somebody else has the port by now
        return ThreadingHTTPServer((host, 0), handler)


def _earlier_port(list_file: Path) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return urlsplit(list_file.read_text(encoding="utf-8").splitlines()[0]).port or 0
    return 0
