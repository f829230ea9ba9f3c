"""/v1/files: OpenAI's upload API over a FileStore."""

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from valley_ray.serve.chat_reply import Reply
from valley_ray.serve.files import FileStore, StoredFile
from valley_ray.serve.refusals import UploadError
from valley_ray.serve.upload import receive_upload
from valley_ray.serve.visit import visit_of

Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]


class UploadForm(BaseModel):
    """The fields of an upload beside the file."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, populate_by_name=True)

    purpose: Purpose
    """As OpenAI's; media for questions is `vision` or `user_data`, and any other is taken too."""
    expires_after_anchor: Literal["created_at"] | None = Field(default=None, alias="expires_after[anchor]")
    expires_after_seconds: int | None = Field(default=None, alias="expires_after[seconds]", ge=60, le=2_592_000)
    """Seconds until the file expires; without it the server's own time."""


class FileObject(Reply):
    """An uploaded file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    """Unix time, seconds."""
    expires_at: int | None
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"


class FileList(Reply):
    """A page of files, newest first."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(Reply):
    """A file that is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def files_router(store: FileStore) -> APIRouter:
    """The routes of uploaded files; every caller sees their own only."""
    router = APIRouter(prefix="/v1/files", tags=["files"])

    @router.post("", response_model=FileObject)
    async def upload_file(request: Request) -> FileObject:
        """Keep one file."""
        received = await receive_upload(request.headers.get("content-type", ""), request.stream(), store)
        try:
            form = _form(received.fields)
            stored = await asyncio.to_thread(
                store.keep,
                received.upload,
                owner=visit_of(request).caller.owner,
                filename=received.filename,
                purpose=form.purpose,
                expire_after_s=form.expires_after_seconds,
            )
        except BaseException:
            received.upload.discard()
            raise
        visit_of(request).notes["file"] = stored.file_id
        return _shown(stored)

    @router.get("", response_model=FileList)
    async def list_files(
        request: Request,
        purpose: Purpose | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> FileList:
        """The caller's files."""
        files = await asyncio.to_thread(store.files_of, visit_of(request).caller.owner)
        files = [file for file in files if purpose is None or file.purpose == purpose]
        if order == "asc":
            files.reverse()
        ids = [file.file_id for file in files]
        first = ids.index(after) + 1 if after in ids else 0
        page = files[first : first + limit]
        return FileList(
            data=[_shown(file) for file in page],
            first_id=page[0].file_id if page else None,
            last_id=page[-1].file_id if page else None,
            has_more=first + limit < len(files),
        )

    @router.get("/{file_id}", response_model=FileObject)
    async def get_file(request: Request, file_id: str) -> FileObject:
        """What is known about a file."""
        return _shown(await asyncio.to_thread(store.get, file_id, visit_of(request).caller.owner))

    @router.get("/{file_id}/content", response_class=FileResponse)
    async def get_file_content(request: Request, file_id: str) -> FileResponse:
        """The bytes of a file."""
        _, path = await asyncio.to_thread(store.open, file_id, visit_of(request).caller.owner)
        # Never a type that a browser would run or show.
        headers = {"X-Content-Type-Options": "nosniff", "Content-Disposition": "attachment"}
        return FileResponse(path, media_type="application/octet-stream", headers=headers)

    @router.delete("/{file_id}", response_model=FileDeleted)
    async def delete_file(request: Request, file_id: str) -> FileDeleted:
        """Forget a file."""
        await asyncio.to_thread(store.delete, file_id, visit_of(request).caller.owner)
        return FileDeleted(id=file_id)

    return router


def _form(fields: dict[str, str]) -> UploadForm:
    try:
        return UploadForm.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UploadError(f"{problem['loc'][0]}: {problem['msg'][:1].lower()}{problem['msg'][1:]}") from error


def _shown(file: StoredFile) -> FileObject:
    return FileObject(
        id=file.file_id,
        bytes=file.size_bytes,
        created_at=file.created_at,
        expires_at=file.expires_at,
        filename=file.filename,
        purpose=file.purpose,  # type: ignore[arg-type]
        status="processed",
    )
