"""Records and media elsewhere: file systems of fsspec, web servers that stop or refuse, secrets that nobody sees."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from valley_ray.data.sources import SourceConfig, files, read_catalog, write_catalog
from valley_ray.data.sources.objects import read_object
from valley_ray.errors import DataError, FetchError


def turns() -> list[dict[str, str]]:
    return [{"from": "human", "value": "<video>\nWhat moves?"}, {"from": "gpt", "value": "A square."}]


RECORDS = [{"id": name, "video": f"{name}.mp4", "conversations": turns()} for name in ("here", "gone")]


class Server(http.server.BaseHTTPRequestHandler):
    """Knows no ranges, as many do not; /cut/ promises more bytes than it sends, /busy/ answers 500."""

    content: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        content = self.content.get(self.path.partition("?")[0].rpartition("/")[2])
        if content is None or self.path.startswith("/busy/"):
            self.send_error(404 if content is None else 500)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if self.path.startswith("/cut/") else content)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        Server.content = {"records.json": json.dumps(RECORDS).encode()}
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def memory() -> Iterator[Any]:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def read(tmp_path: Path, path: str, **values: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    write_catalog([SourceConfig(path=path, **values)], tmp_path / "out")
    clips, samples = read_catalog(tmp_path / "out")
    return clips.to_pylist(), samples.to_pylist()


def test_records_and_media_lie_on_any_file_system(tmp_path: Path, memory: Any) -> None:
    memory.pipe("/set/records.json", json.dumps(RECORDS).encode())
    memory.pipe("/set/webvid/here.mp4", b"12345")
    clips, samples = read(tmp_path, "memory://set/records.json")
    assert [(clip["uri"], clip["size_bytes"]) for clip in clips] == [
        ("memory://set/webvid/here.mp4", 5),
        ("memory://set/gone.mp4", None),
    ]
    assert clips[0]["etag"], "the store's time or tag"
    assert "looked for memory://set/gone.mp4 and" in clips[1]["error"]
    assert [sample["source"] for sample in samples] == ["records.json"] * 2


def test_folder_on_any_file_system_is_a_folder_of_clips(tmp_path: Path, memory: Any) -> None:
    for name in ("b.mp4", "a/c.webm", "a/.hidden.mp4", "frames/f1.png", "frames/f2.png", "notes.txt"):
        memory.pipe(f"/set/{name}", b"123")
    clips, samples = read(tmp_path, "memory://set")
    assert [(clip["uri"].removeprefix("memory://set/"), clip["kind"], clip["size_bytes"]) for clip in clips] == [
        ("a/c.webm", "video", 3),
        ("b.mp4", "video", 3),
        ("frames", "frames", None),
    ]
    assert samples == []


def test_local_media_of_remote_records_and_file_urls(tmp_path: Path, memory: Any) -> None:
    memory.pipe("/set/records.json", json.dumps(RECORDS).encode())
    (tmp_path / "here.mp4").write_bytes(b"123")
    clips, _ = read(tmp_path, "memory://set/records.json", media_root=tmp_path.as_uri())
    assert (clips[0]["uri"], clips[0]["size_bytes"]) == (str(tmp_path / "here.mp4"), 3)
    (tmp_path / "a b.json").write_text(json.dumps(RECORDS))
    clips, samples = read(tmp_path, (tmp_path / "a b.json").as_uri())
    assert (clips[0]["size_bytes"], samples[0]["source"]) == (3, "a b.json")


def test_web_server_without_ranges_gives_lists_and_tables(tmp_path: Path, web: str) -> None:
    clips, samples = read(tmp_path, f"{web}/set/records.json?signature=secret")
    assert [clip["uri"] for clip in clips] == [f"{web}/set/here.mp4", f"{web}/set/gone.mp4"], "taken on trust"
    assert [clip["error"] for clip in clips] == ["", ""]
    assert samples[0]["source"] == "records.json"
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([{"id": "x", "video": "a.mp4", "question": "Q?", "answer": "A"}]), sink)
    Server.content["t.parquet"] = sink.getvalue().to_pybytes()
    _, samples = read(tmp_path, f"{web}/t.parquet", media_root=str(tmp_path))
    assert samples[0]["sample_id"] == "x"
    assert "secret" not in (tmp_path / "out/catalog.json").read_text()


def test_web_server_that_fails_is_one_line_without_secrets(tmp_path: Path, web: str) -> None:
    host = web.removeprefix("http://")
    Server.content["big.json"] = json.dumps([RECORDS[0]] * 20_000).encode()
    for path in ("/nowhere.json", "/busy/records.json", "/cut/records.json", "/cut/big.json"):
        with pytest.raises(DataError) as error:
            read(tmp_path, f"http://user:secret@{host}{path}?key=secret")
        assert path in str(error.value)
        assert "secret" not in str(error.value), error.value
        assert "\n" not in str(error.value)
        assert not list((tmp_path / "out").iterdir()), "nothing is left of what came before the break"


def test_unknown_scheme_and_bucket_that_refuses_are_errors(tmp_path: Path, memory: Any) -> None:
    with pytest.raises(DataError, match=r"cannot read records nonsense://a/b\.json: Protocol not known"):
        read(tmp_path, "nonsense://a/b.json")
    memory.pipe("/set/records.json", json.dumps(RECORDS).encode())
    with pytest.raises(DataError, match="nonsense://media"):
        read(tmp_path, "memory://set/records.json", media_root="nonsense://media")


def test_media_in_buckets_are_read_within_limits(memory: Any) -> None:
    memory.pipe("/set/a.mp4", b"12345")
    assert read_object("memory://set/a.mp4", max_bytes=5) == b"12345"
    cases = {
        "memory://set/gone.mp4": "source_not_found",
        "memory://set/a.mp4": "source_too_large",
        "memory://set": "fetch_failed",
        "ssh://host/a.mp4": "source_not_allowed",
        "memory://a::http://localhost/a.mp4": "source_not_allowed",
        "http://localhost/a.mp4": "source_not_allowed",
        "/local/a.mp4": "source_not_allowed",
    }
    for uri, error_class in cases.items():
        with pytest.raises(FetchError) as error:
            read_object(uri, max_bytes=4)
        assert error.value.code == error_class, uri


def test_buckets_of_arrow_are_listed_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import FileSystem, LocalFileSystem, SubTreeFileSystem

    (tmp_path / "bucket/webvid").mkdir(parents=True)
    (tmp_path / "bucket/webvid/here.mp4").write_bytes(b"12345")
    (tmp_path / "bucket/records.json").write_text(json.dumps(RECORDS))

    def local(url: str) -> tuple[Any, str]:
        """A bucket is a folder here; what reads it is the wrapper that real buckets are read with."""
        assert url.startswith("s3://bucket")
        filesystem: FileSystem = SubTreeFileSystem(str(tmp_path), LocalFileSystem())
        return ArrowFSWrapper(filesystem), url.removeprefix("s3://")

    for module in ("files", "media"):
        monkeypatch.setattr(f"valley_ray.data.sources.{module}.filesystem_of", local)
    clips, _ = read(tmp_path, "s3://bucket/records.json")
    assert [(clip["uri"], clip["size_bytes"]) for clip in clips] == [
        ("s3://bucket/webvid/here.mp4", 5),
        ("s3://bucket/gone.mp4", None),
    ]
    assert clips[0]["etag"]
    assert files.is_folder("s3://bucket/webvid")
