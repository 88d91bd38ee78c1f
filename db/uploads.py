"""What a user sent: a blob that has an owner. A content hash is never accepted as an id."""

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from db.engine import new_id, now
from db.errors import NotFound
from db.pages import Page, newest_first
from db.tables import Blob, Upload

__all__ = ["add", "delete", "get", "page", "stored_bytes"]


def add(s: Session, owner: str, filename: str, blob_id: str) -> Upload:
    """Names finished content. Of a name longer than 255 characters the end is kept."""
    row = Upload(id=new_id("upl"), owner=owner, filename=filename[-255:], blob_id=blob_id, created_at=now(s))
    s.add(row)
    s.flush()
    return row


def get(s: Session, owner: str, upload_id: str) -> Upload:
    """Raises ``NotFound`` (``upload_not_found``)."""
    row = s.scalar(select(Upload).where(Upload.id == upload_id, Upload.owner == owner))
    if row is None:
        raise NotFound.of("upload", upload_id)
    return row


def page(s: Session, owner: str, cursor: str | None = None, limit: int = 100) -> Page[Upload]:
    """Newest first."""
    return newest_first(s, select(Upload).where(Upload.owner == owner), Upload.created_at, Upload.id, cursor, limit)


def delete(s: Session, owner: str, upload_id: str) -> None:
    """Models and data sets made of it keep the content. Raises ``NotFound``."""
    s.delete(get(s, owner, upload_id))
    s.flush()


def stored_bytes(s: Session, owner: str) -> int:
    """Sum of an owner's uploads; equal content counts each time."""
    query = select(func.sum(Blob.size)).join(Upload, Upload.blob_id == Blob.id).where(Upload.owner == owner)
    return int(s.scalar(query) or 0)
