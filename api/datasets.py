"""/v1/datasets: an upload becomes data that is inspected, then ready or rejected."""

from functools import partial

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from api.auth import Db, Reader, Submitter
from api.conditional import Wait, conditional, until_changed
from api.idempotency import Once, Reply
from api.models import Id, Name
from api.paging import Cursor, Limit, PageOf, page_of
from api.problems import responses
from db import datasets, uploads
from db.engine import Database
from db.settings import Settings
from db.tables import AssetState, Dataset
from search.spec import DataInfo, DataSpec

__all__ = ["router"]

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])


class DatasetRequest(DataSpec):
    """What a data set is made of: an upload and how its file is read as batches."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "upload": "upl_0a1b2c3d4e5f60718293a4b5",
                "name": "cifar10",
                "task": "classification",
                "transform": {
                    "scale": 0.00392156862745098,
                    "mean": [0.485, 0.456, 0.406],
                    "std": [0.229, 0.224, 0.225],
                    "layout": "nhwc",
                    "augment": "crop_flip",
                },
            }
        }
    )

    upload: Id
    """The id that POST /v1/uploads gave."""
    name: Name | None = None
    """For people; the upload's file name when left out."""

    def spec(self) -> DataSpec:
        return DataSpec(**{field: getattr(self, field) for field in DataSpec.model_fields})


class DatasetView(BaseModel):
    id: str
    name: str
    spec: DataSpec
    state: AssetState
    reason_code: str | None
    reason: str | None
    info: DataInfo | None = Field(description="Inputs, classes and split sizes; once it is ready.")
    created_at: float
    links: dict[str, str]


def dataset_view(row: Dataset, *, brief: bool = False) -> DatasetView:
    """``brief``: without ``info``, for lists."""
    return DatasetView(
        id=row.id,
        name=row.name,
        spec=DataSpec.model_validate(row.spec),
        state=row.state,
        reason_code=row.reason_code,
        reason=row.reason,
        info=None if brief else datasets.info(row),
        created_at=row.created_at,
        links={"self": f"/v1/datasets/{row.id}"},
    )


@router.post(
    "",
    operation_id="create_dataset",
    status_code=202,
    response_model=DatasetView,
    responses=responses(400, 401, 403, 404, 409, 422),
)
def create_dataset(request: Request, caller: Submitter, body: DatasetRequest, once: Once) -> Response:
    """Take in uploaded data. It is inspected by a worker: poll `Location` until it is `ready` or `rejected`."""
    settings: Settings = request.app.state.settings
    return once(partial(_create, caller.owner, body, settings.queue))


def _create(owner: str, body: DatasetRequest, queue: str, s: Session) -> Reply:
    row = datasets.add(
        s,
        owner,
        upload_id=body.upload,
        name=body.name or uploads.get(s, owner, body.upload).filename or body.upload,
        spec=body.spec(),
        queue=queue,
    )
    return Reply(202, dataset_view(row), queues=[queue])


@router.get("", operation_id="list_datasets", response_model=PageOf[DatasetView], responses=responses(401, 422))
def list_datasets(request: Request, db: Db, caller: Reader, cursor: Cursor = None, limit: Limit = 100) -> Response:
    """Your data sets, newest first, without what was found in them."""
    with db.read() as s:
        page = datasets.page(s, caller.owner, cursor, limit)
    return conditional(request, page_of(page, partial(dataset_view, brief=True)))


def _state(db: Database, owner: str, dataset_id: str) -> AssetState:
    with db.read() as s:
        return datasets.get(s, owner, dataset_id).state


def _one(request: Request, db: Database, owner: str, dataset_id: str) -> Response:
    with db.read() as s:
        return conditional(request, dataset_view(datasets.get(s, owner, dataset_id)))


@router.get("/{dataset_id}", operation_id="get_dataset", response_model=DatasetView, responses=responses(304, 401, 404))
async def get_dataset(request: Request, db: Db, caller: Reader, dataset_id: str, wait: Wait = 0) -> Response:
    """One data set: its state, and once it is ready its inputs, classes and splits."""
    return await until_changed(
        request,
        wait,
        stamp=partial(_state, db, caller.owner, dataset_id),
        reply=partial(_one, request, db, caller.owner, dataset_id),
    )


@router.delete("/{dataset_id}", operation_id="delete_dataset", status_code=204, responses=responses(401, 403, 404, 409))
def delete_dataset(db: Db, caller: Submitter, dataset_id: str) -> None:
    """Delete a data set that no job uses."""
    with db.begin() as s:
        datasets.delete(s, caller.owner, dataset_id)
