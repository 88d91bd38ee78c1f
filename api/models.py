"""/v1/models: an upload becomes a network that is inspected, then ready or rejected."""

from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from api.auth import Db, Reader, Submitter
from api.conditional import Wait, conditional, until_changed
from api.idempotency import Once, Reply
from api.paging import Cursor, Limit, PageOf, page_of
from api.problems import Problem, responses
from db import models, uploads
from db.engine import Database
from db.settings import Settings
from db.tables import AssetState, Model
from search.spec import ModelInfo

__all__ = ["Id", "Name", "router"]

router = APIRouter(prefix="/v1/models", tags=["models"])

Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]


Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
"""What our ids look like; whether one exists is for the database to say."""


class ArchitectureRequest(BaseModel):
    """A network of ours by its name, for files that hold weights alone."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    options: dict[str, Any] = {}


class ModelRequest(BaseModel):
    """What a network is made of."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"example": {"upload": "upl_5c1f0c0f6a7b8d9e0f1a2b3c", "name": "resnet20"}},
    )

    upload: Id = Field(description="The id that POST /v1/uploads gave.")
    name: Name | None = Field(default=None, description="For people; the upload's file name when left out.")
    format: Literal["auto", "pt2", "safetensors", "state_dict"] = "auto"
    architecture: ArchitectureRequest | None = Field(
        default=None, description="Needed for `safetensors` and `state_dict`, which hold weights without a graph."
    )


class ModelView(BaseModel):
    id: str
    name: str
    format: str
    architecture: dict[str, Any] | None
    state: AssetState
    reason_code: str | None
    reason: str | None
    info: ModelInfo | None = Field(description="Layers, inputs, outputs, costs; once it is ready.")
    created_at: float
    links: dict[str, str]


def model_view(row: Model, *, brief: bool = False) -> ModelView:
    """``brief``: without ``info``, for lists."""
    return ModelView(
        id=row.id,
        name=row.name,
        format=row.format,
        architecture=row.architecture,
        state=row.state,
        reason_code=row.reason_code,
        reason=row.reason,
        info=None if brief else models.info(row),
        created_at=row.created_at,
        links={"self": f"/v1/models/{row.id}"},
    )


@router.post(
    "",
    operation_id="create_model",
    status_code=202,
    response_model=ModelView,
    responses=responses(400, 401, 403, 404, 409, 422),
)
def create_model(request: Request, caller: Submitter, body: ModelRequest, once: Once) -> Response:
    """Take in an uploaded network. It is inspected by a worker: poll `Location` until it is `ready` or `rejected`."""
    settings: Settings = request.app.state.settings
    if body.format in {"safetensors", "state_dict"} and body.architecture is None:
        raise Problem(
            422,
            "architecture_needed",
            f"A {body.format} file holds weights without a graph: name its architecture, or upload a .pt2 "
            "(`tenfold.export(model, example)` writes one).",
        )
    return once(partial(_create, caller.owner, body, settings.queue))


def _create(owner: str, body: ModelRequest, queue: str, s: Session) -> Reply:
    row = models.add(
        s,
        owner,
        upload_id=body.upload,
        name=body.name or uploads.get(s, owner, body.upload).filename or body.upload,
        format=body.format,
        architecture=None if body.architecture is None else body.architecture.model_dump(mode="json"),
        queue=queue,
    )
    return Reply(202, model_view(row), queues=[queue])


@router.get("", operation_id="list_models", response_model=PageOf[ModelView], responses=responses(401, 422))
def list_models(request: Request, db: Db, caller: Reader, cursor: Cursor = None, limit: Limit = 100) -> Response:
    """Your networks, newest first, without their layers."""
    with db.read() as s:
        page = models.page(s, caller.owner, cursor, limit)
    return conditional(request, page_of(page, partial(model_view, brief=True)))


def _state(db: Database, owner: str, model_id: str) -> AssetState:
    with db.read() as s:
        return models.get(s, owner, model_id).state


def _one(request: Request, db: Database, owner: str, model_id: str) -> Response:
    with db.read() as s:
        return conditional(request, model_view(models.get(s, owner, model_id)))


@router.get("/{model_id}", operation_id="get_model", response_model=ModelView, responses=responses(304, 401, 404))
async def get_model(request: Request, db: Db, caller: Reader, model_id: str, wait: Wait = 0) -> Response:
    """One network: its state, and once it is ready its layers, inputs and outputs."""
    return await until_changed(
        request,
        wait,
        stamp=partial(_state, db, caller.owner, model_id),
        reply=partial(_one, request, db, caller.owner, model_id),
    )


@router.delete("/{model_id}", operation_id="delete_model", status_code=204, responses=responses(401, 403, 404, 409))
def delete_model(db: Db, caller: Submitter, model_id: str) -> None:
    """Delete a network that no job uses."""
    with db.begin() as s:
        models.delete(s, caller.owner, model_id)
