"""/openapi.json: what FastAPI reads off the handlers, and what it cannot see there.

It cannot see events of a stream, bytes of a file, keys that the gate asks for, and fields of an upload, whose handler
reads the body by itself.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from valley_ray.serve.chat_reply import ChatCompletionChunk
from valley_ray.serve.files_api import UploadForm

_REFS = "#/components/schemas/{model}"
_OPEN = ("/health", "/ready")


def describe(api: FastAPI, *, needs_key: bool) -> None:
    """Let `api` answer /openapi.json with the schema of all its routes; made when it is first asked for."""

    def document() -> dict[str, Any]:
        api.openapi_schema = api.openapi_schema or _document(api, needs_key=needs_key)
        return api.openapi_schema

    api.openapi = document  # type: ignore[method-assign]


def _document(api: FastAPI, *, needs_key: bool) -> dict[str, Any]:
    document = get_openapi(title=api.title, version=api.version, description=api.description, routes=api.routes)
    components: dict[str, Any] = document["components"]
    _add_model(components["schemas"], ChatCompletionChunk)
    event = {"$ref": _REFS.format(model="ChatCompletionChunk")}
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]
    chat["content"]["text/event-stream"] = {
        "schema": event,
        "description": "With `stream: true`: one chunk per `data:` line, then `data: [DONE]`.",
    }
    content = document["paths"]["/v1/files/{file_id}/content"]["get"]["responses"]["200"]
    content["content"] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    document["paths"]["/v1/files"]["post"]["requestBody"] = _upload_body()
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in document["paths"].items():
            for operation in methods.values() if path not in _OPEN else ():
                operation["security"] = [{"key": []}]
    return document


def _add_model(schemas: dict[str, Any], model: type[BaseModel]) -> None:
    schema = model.model_json_schema(mode="serialization", ref_template=_REFS)
    schemas.update(schema.pop("$defs", {}))
    schemas[model.__name__] = schema


def _upload_body() -> dict[str, Any]:
    schema = UploadForm.model_json_schema(by_alias=True)
    schema["properties"]["file"] = {"type": "string", "format": "binary"}
    schema["required"] = ["file", *schema["required"]]
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
