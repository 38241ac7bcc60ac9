"""The OpenAPI description of the server's routes, made from the messages that they take and give."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from slipstream.serving import wire

_REFERENCE = "#/components/schemas/{name}"
_ERROR = {"type": "object", "required": ["detail"], "properties": {"detail": {"type": "string"}}}
_REASONS = {
    400: "The request is wrong; `detail` says where.",
    401: "No key, or a wrong one.",
    404: "There is no such route.",
    409: "Not now: other weights serve, or the weight update that is named is not open.",
    423: "Another weight update is under way.",
    413: "It is larger than the server takes.",
    503: "No replica serves (yet).",
    507: "Shared memory is full.",
}


def described(
    body: type[msgspec.Struct] | None = None,
    reply: type[msgspec.Struct] | str | None = None,
    *errors: int,
    needs_key: bool = True,
) -> dict[str, Any]:
    """Arguments of `FastAPI.add_api_route` that describe a route.

    Args:
        body: Message that it takes, as JSON or msgpack.
        reply: Message that it gives, or the content type of something else.
        errors: Statuses it may answer with, besides those that follow from the rest.
        needs_key: Whether it is closed to those without the key.
    """
    content: dict[str, Any] = {wire.JSON: {"schema": {"type": "object"}}}
    if isinstance(reply, str):
        content = {reply: {"schema": {"type": "string", "format": "binary"}}}
    elif reply is not None:
        content = {wire.JSON: {"schema": _schema(reply)}}
    answers: dict[str, Any] = {"200": {"description": "Done.", "content": content}}
    for status in sorted({*errors, *((401,) if needs_key else ()), *((400, 413) if body else ())}):
        answers[str(status)] = {"description": _REASONS[status], "content": {wire.JSON: {"schema": _ERROR}}}
    extra: dict[str, Any] = {"responses": answers, "security": [{"key": []}] if needs_key else []}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": {wire.JSON: {"schema": _schema(body)}}}
    return {"openapi_extra": extra, "response_model": None}


def _schema(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {"$ref": _REFERENCE.format(name=kind.__name__)}


def use_schema(app: FastAPI, messages: list[type[msgspec.Struct]]) -> None:
    """Let `app` describe itself with the schemas of `messages` at `/openapi.json`."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, schemas = msgspec.json.schema_components(messages, ref_template=_REFERENCE)
            components = made.setdefault("components", {})
            components["schemas"] = schemas
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path in made["paths"].values():
                for operation in path.values():
                    # FastAPI adds an answer without content for every route.
                    operation["responses"].pop("422", None)
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
