"""Every failure as an RFC 9457 problem: a stable ``code`` and a sentence that says what arrived and what to do."""

import difflib
import errno
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sqlalchemy.exc import DataError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.types import Scope

from db.errors import BadDatabase, Conflict, LostBlob, NotFound, StorageFull, TooLarge
from search.errors import TenfoldError

__all__ = ["Problem", "ProblemBody", "describe", "install", "problem_response", "responses"]

log = logging.getLogger("tenfold.api")

MEDIA_TYPE = "application/problem+json"
LONGEST_ECHO = 200
"""Characters of a refused value that are repeated back."""


class FieldProblem(BaseModel):
    field: str
    """Where it stands: ``budget.max_drop``."""
    code: str
    message: str
    received: Any = None


class ProblemBody(BaseModel):
    """What every error reply holds (RFC 9457, with ``code``, ``request_id`` and ``errors`` added)."""

    type: str = Field(examples=["urn:tenfold:problem:unknown_key"])
    title: str = Field(examples=["Unauthorized"])
    status: int = Field(examples=[401])
    code: str = Field(examples=["unknown_key"])
    detail: str = Field(examples=["This API key is not known here: check TENFOLD_API_KEY."])
    instance: str = Field(examples=["/v1/jobs"])
    request_id: str
    errors: list[FieldProblem] = []


class Problem(HTTPException):
    """Raised by services; ``code`` is stable and snake_case, ``detail`` a sentence for people."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        errors: Sequence[FieldProblem] = (),
    ) -> None:
        super().__init__(status_code=status, detail=detail, headers=headers)
        self.code = code
        self.errors = tuple(errors)


def problem_response(scope: Scope, problem: Problem) -> JSONResponse:
    """The reply to one problem, in the scope of the request that met it."""
    body = ProblemBody(
        type=f"urn:tenfold:problem:{problem.code}",
        title=HTTPStatus(problem.status_code).phrase,
        status=problem.status_code,
        code=problem.code,
        detail=problem.detail,
        instance=scope.get("path", ""),
        request_id=scope.get("state", {}).get("request_id", ""),
        errors=list(problem.errors),
    )
    return JSONResponse(
        body.model_dump(mode="json"),
        status_code=problem.status_code,
        headers=dict(problem.headers or {}),
        media_type=MEDIA_TYPE,
    )


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI ``responses`` that document the problems an operation may answer with."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemBody"}}}
    return {
        status: {"description": HTTPStatus(status).phrase, **({"content": content} if status >= 400 else {})}
        for status in statuses
    }


def describe(document: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI document with ``ProblemBody`` in it, also where FastAPI would show its own form of a 422."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    problem = ProblemBody.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(problem.pop("$defs"), ProblemBody=problem)
    for methods in document["paths"].values():
        for operation in methods.values():
            if "422" in operation["responses"]:
                operation["responses"].update({str(status): text for status, text in responses(422).items()})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    return document


def _of_http(request: Request, error: HTTPException) -> Problem:
    if isinstance(error, Problem):
        return error
    if error.status_code == HTTPStatus.NOT_FOUND:
        code, detail = "no_such_route", f"There is nothing at {request.url.path}: /docs lists every path."
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "other methods")
        code, detail = "method_not_allowed", f"{request.method} is not answered at {request.url.path}: use {allowed}."
    else:
        code, detail = "bad_request", f"The request could not be read: {error.detail}."
    return Problem(error.status_code, code, detail, headers=error.headers)


def _echo(value: Any) -> Any:
    """The value as it arrived, shortened when it is long."""
    if value is None or isinstance(value, bool | int | float):
        return value if value == value else str(value)  # NaN is not JSON
    text = value if isinstance(value, str) else repr(value)
    text = text.encode(errors="backslashreplace").decode()  # JSON may carry half a surrogate pair, UTF-8 may not
    return text if len(text) <= LONGEST_ECHO else text[:LONGEST_ECHO] + "…"


def _place(error: Mapping[str, Any], body: Any) -> str:
    """Dotted; without the names of a union's branches, which pydantic puts in and which lead nowhere in ``body``."""
    source, *parts = error["loc"]
    if source != "body":
        return ".".join(map(str, parts or [source]))
    kept, at = [], body
    for part in parts:
        try:
            at = at[part]
        except (LookupError, TypeError):
            if error["type"] != "missing" or part is not parts[-1]:
                continue
        kept.append(str(part))
    return ".".join(kept) or source


def _names(app: FastAPI) -> list[str]:
    """Every field name of the API's vocabulary, to suggest what was meant."""
    schemas = app.openapi().get("components", {}).get("schemas", {})
    return sorted({name for schema in schemas.values() for name in schema.get("properties", {})})


def _of_validation(request: Request, error: RequestValidationError) -> Problem:
    raw = error.errors()
    if any(one["type"] == "json_invalid" for one in raw):
        one = raw[0]
        where = f"at character {one['loc'][-1]}"
        return Problem(400, "invalid_json", f"The body is not JSON {where}: {one['ctx']['error']}.")
    at: dict[str, list[Any]] = {}
    for one in raw:
        at.setdefault(_place(one, error.body), []).append(one)
    found, sentences = [], []
    for place, branches in at.items():
        one = branches[-1]
        received = _echo(one.get("input"))
        if one["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(one["loc"][-1]), _names(request.app), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out; /docs lists the fields."
            message = f"{place!r} is not a field here ({received!r} arrived): {hint}"
        elif one["type"] == "missing":
            message = f"{place!r} is missing: it has to be given."
        else:
            allowed = ", or ".join(branch["msg"] for branch in branches)
            message = f"{place!r}: {allowed} ({received!r} arrived)."
        found.append(FieldProblem(field=place, code=one["type"], message=message, received=received))
        sentences.append(message)
    code = "unknown_field" if any(f.code == "extra_forbidden" for f in found) else "invalid_request"
    return Problem(422, code, " ".join(sentences), errors=found)


STATUS_OF: dict[type[TenfoldError], int] = {NotFound: 404, Conflict: 409, TooLarge: 413, StorageFull: 507}
"""Everything else that the science and the database refuse is a request that makes no sense as it stands: 422."""


def _of_science(error: TenfoldError) -> Problem:
    if error.code == "upload_abandoned":
        return Problem(408, error.code, error.message)
    if isinstance(error, LostBlob | BadDatabase):
        log.error("storage is broken", exc_info=error)
        return Problem(500, error.code, error.message)
    status = next((status for kind, status in STATUS_OF.items() if isinstance(error, kind)), 422)
    return Problem(status, error.code, error.message[:1].upper() + error.message[1:])


def _of_database(error: Exception) -> Problem:
    if isinstance(error, DataError):
        return Problem(
            422, "unstorable_value", "The request has a value that no column can hold, such as a NUL character."
        )
    log.error("database unavailable", exc_info=error)
    return Problem(
        503, "database_unavailable", "The database does not answer: try again shortly.", headers={"Retry-After": "5"}
    )


def install(app: FastAPI) -> None:
    """Let every exception that can leave an endpoint become a problem. Unexpected ones: ``api.http``."""

    def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class
        return problem_response(request.scope, _of_http(request, error))

    def validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)  # noqa: S101
        return problem_response(request.scope, _of_validation(request, error))

    def science(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, TenfoldError)  # noqa: S101
        return problem_response(request.scope, _of_science(error))

    def database(request: Request, error: Exception) -> JSONResponse:
        return problem_response(request.scope, _of_database(error))

    def system(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return problem_response(request.scope, _of_science(StorageFull()))
        raise error

    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(TenfoldError, science)
    for kind in (OperationalError, DataError, PoolTimeout):
        app.add_exception_handler(kind, database)
    app.add_exception_handler(OSError, system)
