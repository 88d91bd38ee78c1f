"""Files to download. Rows are made by ``tasks.complete_export``."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.errors import NotFound
from db.pages import Page, newest_first
from db.tables import Artifact

__all__ = ["get", "page"]


def get(s: Session, owner: str, artifact_id: str) -> Artifact:
    """Raises ``NotFound`` (``artifact_not_found``)."""
    row = s.scalar(select(Artifact).where(Artifact.id == artifact_id, Artifact.owner == owner))
    if row is None:
        raise NotFound.of("artifact", artifact_id)
    return row


def page(
    s: Session, owner: str, job_id: str, cursor: str | None = None, limit: int = 100, *, trial: int | None = None
) -> Page[Artifact]:
    """Newest first; of one trial when ``trial`` is given."""
    query = select(Artifact).where(Artifact.owner == owner, Artifact.job_id == job_id)
    if trial is not None:
        query = query.where(Artifact.trial == trial)
    return newest_first(s, query, Artifact.created_at, Artifact.id, cursor, limit)
