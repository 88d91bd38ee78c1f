"""Pages by opaque cursor."""

from collections.abc import Callable
from typing import Annotated, Generic, TypeVar

from fastapi import Query
from pydantic import BaseModel, Field

from db.pages import Page

__all__ = ["Cursor", "Limit", "PageOf", "page_of"]

Item = TypeVar("Item")
Row = TypeVar("Row")

Cursor = Annotated[str | None, Query(max_length=500, description="`next` of the page before.")]
Limit = Annotated[int, Query(ge=1, le=500, description="Items of one page.")]


class PageOf(BaseModel, Generic[Item]):
    items: list[Item]
    next: str | None = Field(description="Cursor of the page after this one; null at the end.")


def page_of(page: Page[Row], view: Callable[[Row], Item]) -> PageOf[Item]:
    """The reply body of one page of rows."""
    return PageOf[Item](items=[view(row) for row in page.items], next=page.next)
