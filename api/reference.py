"""/docs: the OpenAPI document as one readable page. No script and no CDN, so it works on a closed network.

The page is made here because the wheels that carry Swagger UI are years behind it, and its start-up script is inline,
which our Content-Security-Policy forbids.
"""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, select_autoescape

from api.http import PAGE_POLICY

__all__ = ["router"]

router = APIRouter(include_in_schema=False)
templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True
)


def _type(schema: dict[str, Any]) -> tuple[str, str]:
    """A short text for a schema's type, and the component it links to ("" for none)."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return name, name
    if choices := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
        parts = [_type(one) for one in choices]
        return " | ".join(text for text, _ in parts), next((link for _, link in parts if link), "")
    if "enum" in schema:
        return " | ".join(repr(value) for value in schema["enum"]), ""
    if "const" in schema:
        return repr(schema["const"]), ""
    if schema.get("type") == "array":
        text, link = _type(schema.get("items") or {})
        return f"list of {text}", link
    if isinstance(schema.get("additionalProperties"), dict):
        text, link = _type(schema["additionalProperties"])
        return f"map to {text}", link
    return schema.get("type", "any"), ""


def _operations(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    by_tag: dict[str, list[dict[str, Any]]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {})
            by_tag.setdefault(operation.get("tags", ["other"])[0], []).append(
                {
                    **operation,
                    "method": method.upper(),
                    "path": path,
                    "parameters": operation.get("parameters", []),
                    "body": next(((kind, content.get("schema", {})) for kind, content in body.items()), None),
                }
            )
    return by_tag


@router.get("/docs", response_class=HTMLResponse)
def docs(request: Request) -> HTMLResponse:
    """Every operation and every type, with anchors."""
    document = request.app.openapi()
    page = templates.get_template("reference.html").render(
        info=document["info"],
        operations=_operations(document),
        schemas=document["components"]["schemas"],
        type_of=_type,
    )
    return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})
