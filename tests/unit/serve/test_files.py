"""The store of uploads, and uploads over HTTP."""

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from serve_stand_in import app, config, openai_client, send

from valley_ray.errors import OverloadedError
from valley_ray.serve.files import FilesConfig, FileStore, StoredFile
from valley_ray.serve.refusals import RequestTooLargeError, UnknownFileError, UploadStorageError

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def keep(store: FileStore, data: bytes, owner: str = "", **fields: Any) -> StoredFile:
    upload = store.begin()
    try:
        upload.write(data)
        return store.keep(upload, owner=owner, filename="a.mp4", purpose="vision", **fields)
    finally:
        upload.discard()


def contents(folder: Path) -> list[bytes]:
    return sorted(path.read_bytes() for path in (folder / "content").iterdir())


def test_equal_files_are_kept_once_and_go_with_the_last(tmp_path: Path, clock: Clock) -> None:
    store = FileStore(FilesConfig(folder=tmp_path), clock)
    first, second = keep(store, b"same", "me"), keep(store, b"same", "you")
    assert first.file_id != second.file_id
    assert contents(tmp_path) == [b"same"]
    store.delete(first.file_id, "me")
    assert store.open(second.file_id, "you")[1].read_bytes() == b"same"
    store.delete(second.file_id, "you")
    assert contents(tmp_path) == []
    assert not list((tmp_path / "files").iterdir())
    assert not list((tmp_path / "incoming").iterdir())


def test_a_file_belongs_to_who_uploaded_it(tmp_path: Path) -> None:
    store = FileStore(FilesConfig(folder=tmp_path))
    mine = keep(store, b"mine", "me")
    for attempt in (store.get, store.open, store.delete):
        with pytest.raises(UnknownFileError):
            attempt(mine.file_id, "you")
    assert store.files_of("you") == []
    assert store.files_of("me") == [mine]


def test_what_is_no_file_id_never_reaches_the_disk(tmp_path: Path) -> None:
    store = FileStore(FilesConfig(folder=tmp_path / "store"))
    keep(store, b"x")
    (tmp_path / "store" / "secret.json").write_text("{}")
    for wrong in ("../secret", "secret", "", "file-../../secret", "file-" + "0" * 24, "file-\0"):
        with pytest.raises(UnknownFileError):
            store.open(wrong, "")


def test_files_expire(tmp_path: Path, clock: Clock) -> None:
    store = FileStore(FilesConfig(folder=tmp_path, expire_after_s=100), clock)
    usual, long = keep(store, b"usual"), keep(store, b"long", expire_after_s=1000)
    assert (usual.expires_at, long.expires_at) == (1_000_100, 1_001_000)
    clock.now += 100
    assert store.files_of("") == [long]
    with pytest.raises(UnknownFileError, match="expired"):
        store.open(usual.file_id, "")
    keep(store, b"next")
    assert contents(tmp_path) == [b"long", b"next"]


def test_what_was_unused_for_longest_makes_room(tmp_path: Path, clock: Clock) -> None:
    store = FileStore(FilesConfig(folder=tmp_path, max_total_bytes=10), clock)
    old, older = keep(store, b"1234"), keep(store, b"abcd")
    clock.now += 1
    store.open(old.file_id, "")
    clock.now += 1
    keep(store, b"new")
    assert contents(tmp_path) == [b"1234", b"new"]
    with pytest.raises(UnknownFileError):
        store.get(older.file_id, "")
    with pytest.raises(RequestTooLargeError, match="altogether"):
        keep(store, b"x" * 11)
    assert contents(tmp_path) == [b"1234", b"new"]


def test_the_number_of_files_is_bounded_too(tmp_path: Path, clock: Clock) -> None:
    store = FileStore(FilesConfig(folder=tmp_path, max_files=2), clock)
    for number in range(4):
        clock.now += 1
        keep(store, b"%d" % number)
    assert contents(tmp_path) == [b"2", b"3"]


def test_a_file_over_the_limit_leaves_nothing(tmp_path: Path) -> None:
    store = FileStore(FilesConfig(folder=tmp_path, max_file_bytes=3))
    with pytest.raises(RequestTooLargeError, match="larger than 3 bytes"):
        keep(store, b"1234")
    assert not list((tmp_path / "incoming").iterdir())


def test_uploads_at_once_are_bounded(tmp_path: Path) -> None:
    store = FileStore(FilesConfig(folder=tmp_path, max_uploads=1))
    running = store.begin()
    with pytest.raises(OverloadedError):
        store.begin()
    running.discard()
    store.begin().discard()


def test_a_folder_that_cannot_be_written_is_the_servers_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UploadStorageError) as failed:
        FileStore(FilesConfig(folder=tmp_path / "file" / "uploads")).begin()
    assert failed.value.http_status == 507


async def test_uploads_stream_to_disk_whatever_their_pieces(tmp_path: Path) -> None:
    front = app(settings=config(tmp_path, files={"max_file_bytes": 4 * 2**20}))
    data = bytes(range(256)) * 12_000 + b"\r\n--boun!"
    body = (
        b'--bound\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'
        + data
        + b'\r\n--bound\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nvision\r\n--bound--\r\n'
    )

    async def pieces(size: int) -> AsyncGenerator[bytes, None]:
        for start in range(0, len(body), size):
            yield body[start : start + size]

    headers = {"content-type": "multipart/form-data; boundary=bound"}
    for size in (7919, len(body)):
        reply = await send(front, path="/v1/files", content=pieces(size), headers=headers)
        assert reply.status_code == 200, reply.text
        content = await send(front, "GET", f"/v1/files/{reply.json()['id']}/content")
        assert content.content == data
        assert content.headers["x-content-type-options"] == "nosniff"
    assert len(contents(tmp_path / "uploads")) == 1


async def test_bodies_that_are_no_upload_are_400_and_leave_nothing(tmp_path: Path) -> None:
    front = app(settings=config(tmp_path))
    file, purpose = ("a", b"bytes"), {"purpose": "vision"}
    multipart = {"content-type": "multipart/form-data; boundary=b"}
    for arguments, message in (
        ({"json": {}}, "expected a multipart/form-data body"),
        ({"files": {"file": file}}, "purpose: field required"),
        ({"files": {"file": file}, "data": {"purpose": "fun"}}, "purpose: input should be"),
        ({"files": {"file": file}, "data": {**purpose, "x": "1"}}, "x: extra inputs"),
        ({"files": {"other": file}, "data": purpose}, "no field file"),
        ({"files": [("file", file), ("file", file)], "data": purpose}, "two fields file"),
        ({"files": {"file": file}, "data": {"purpose": "v" * 5000}}, "longer than 4096"),
        ({"files": {"file": file}, "data": {**purpose, "expires_after[seconds]": "1"}}, r"expires_after[seconds]"),
        ({"content": b"--b\r\nno", "headers": multipart}, "multipart body"),
        ({"content": b"", "headers": multipart}, "breaks off"),
        ({"content": b"--b\r\n\r\nx\r\n--b--\r\n", "headers": multipart}, "a field too many"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, "expected a multipart"),
    ):
        reply = await send(front, path="/v1/files", **arguments)
        assert reply.status_code == 400, (message, reply.text)
        assert message in reply.json()["error"]["message"]
        assert reply.json()["error"]["code"] == "invalid_upload"
    left = [path for path in (tmp_path / "uploads").rglob("*") if path.is_file()]
    assert left == []


async def test_an_upload_over_the_limit_is_a_413_declared_or_not(tmp_path: Path) -> None:
    front = app(settings=config(tmp_path, files={"max_file_bytes": 1000}))
    for size in (1001, 200_000):
        reply = await send(front, path="/v1/files", files={"file": ("a", b"x" * size)}, data={"purpose": "vision"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
    assert not [path for path in (tmp_path / "uploads").rglob("*") if path.is_file()]


async def test_the_list_has_pages_that_the_client_walks(tmp_path: Path) -> None:
    client = openai_client(app(settings=config(tmp_path)))
    ids = {(await client.files.create(file=("a", b"%d" % i), purpose="vision")).id for i in range(5)}
    page = await client.files.list(limit=2)
    assert (len(page.data), page.has_more) == (2, True)
    assert {file.id async for file in client.files.list(limit=2)} == ids
    newest = [file.id async for file in client.files.list()]
    assert [file.id async for file in client.files.list(order="asc")] == newest[::-1]


async def test_an_upload_says_when_it_expires(tmp_path: Path) -> None:
    client = openai_client(app(settings=config(tmp_path)))
    stored = await client.files.create(
        file=("a", b"x"), purpose="vision", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert stored.expires_at == stored.created_at + 3600
