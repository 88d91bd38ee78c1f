"""/v1/keys: an admin makes and revokes keys; everyone may look at the one in use."""

from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from api.auth import Admin, Db, Reader
from api.conditional import conditional
from api.idempotency import Once, Reply
from api.models import Name
from api.paging import Cursor, Limit, PageOf, page_of
from api.problems import responses
from db import keys
from db.keys import Scope
from db.tables import Key

__all__ = ["router"]

router = APIRouter(prefix="/v1/keys", tags=["keys"])


class KeyRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"example": {"name": "laptop", "scopes": ["read", "submit"], "owner": "ada"}}
    )

    name: Name
    scopes: Annotated[list[Scope], Field(min_length=1)] = [Scope.READ, Scope.SUBMIT]
    owner: Annotated[str, Field(max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")] | None = Field(
        default=None, description="Whose things the key sees; your own when left out."
    )


class KeyView(BaseModel):
    id: str
    owner: str
    name: str
    scopes: list[Scope]
    created_at: float
    last_used_at: float | None
    revoked_at: float | None
    links: dict[str, str]


class NewKeyView(KeyView):
    secret: str | None = Field(description="Shown this once and never stored: null in a repeat of the request.")


def key_view(row: Key) -> KeyView:
    return KeyView(
        id=row.id,
        owner=row.owner,
        name=row.name,
        scopes=row.scopes,
        created_at=row.created_at,
        last_used_at=row.last_used_at,
        revoked_at=row.revoked_at,
        links={"self": f"/v1/keys/{row.id}"},
    )


def _create(owner: str, body: KeyRequest, s: Session) -> Reply:
    row, secret = keys.add(s, body.owner or owner, body.name, body.scopes)
    return Reply(201, NewKeyView(**key_view(row).model_dump(), secret=secret), forget=["secret"])


@router.post(
    "", operation_id="create_key", status_code=201, response_model=NewKeyView, responses=responses(401, 403, 409, 422)
)
def create_key(caller: Admin, body: KeyRequest, once: Once) -> Response:
    """A new key. Its secret is in this reply and nowhere else."""
    return once(lambda s: _create(caller.owner, body, s))


@router.get("", operation_id="list_keys", response_model=PageOf[KeyView], responses=responses(304, 401, 403))
def list_keys(request: Request, db: Db, caller: Admin, cursor: Cursor = None, limit: Limit = 100) -> Response:
    """Everyone's keys, newest first, without their secrets."""
    with db.read() as s:
        page = keys.page(s, None, cursor, limit)
    return conditional(request, page_of(page, key_view))


@router.get("/current", operation_id="get_current_key", response_model=KeyView, responses=responses(401))
def get_current_key(caller: Reader) -> KeyView:
    """The key that this request came with: who you are and what you may do."""
    return key_view(caller.key)


@router.delete("/{key_id}", operation_id="revoke_key", status_code=204, responses=responses(401, 403, 404))
def revoke_key(db: Db, caller: Admin, key_id: str) -> None:
    """Revoke a key for good; it stops working at once."""
    with db.begin() as s:
        keys.revoke(s, None, key_id)
