"""One definition of an operation, two ways to run it: ``job.cancel()`` on a ``Job``, awaited on an ``AsyncJob``.

``operation``, ``steering``, ``reading`` and ``listing`` are descriptors over generators (``_wire.Steps``); which of the
two sides an object is on decides what attribute access gives: at run time by its driver, for checkers by overloads.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import update_wrapper, wraps
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from ._drivers import AsyncDriver, Driver
from ._wire import Steps, fetch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Async", "Pages", "Sync", "listing", "operation", "reading", "steering"]

S = TypeVar("S")
P = ParamSpec("P")
T = TypeVar("T")

PAGE = 100


class Sync:
    """Objects whose operations block."""

    _driver: Driver


class Async:
    """Objects whose operations are awaited."""

    _driver: AsyncDriver


SyncT = TypeVar("SyncT", bound=Sync)
AsyncT = TypeVar("AsyncT", bound=Async)


class operation(Generic[S, P, T]):
    """A method: its steps are run to the end."""

    def __init__(self, steps: Callable[Concatenate[S, P], Steps[T]]) -> None:
        self.steps = steps
        update_wrapper(self, steps)  # type: ignore[arg-type]

    @overload
    def __get__(self, owner: None, kind: type) -> Self: ...
    @overload
    def __get__(self, owner: Sync, kind: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, owner: Async, kind: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, owner: Any, kind: type) -> Any:
        if owner is None:
            return self

        @wraps(self.steps)
        def run(*args: P.args, **kwargs: P.kwargs) -> Any:
            return owner._driver.run(self.steps(owner, *args, **kwargs))

        return run


class steering(Generic[S, P]):
    """A method that gives its own object when its steps are done, so that calls can be chained."""

    def __init__(self, steps: Callable[Concatenate[S, P], Steps[None]]) -> None:
        self.steps = steps
        update_wrapper(self, steps)  # type: ignore[arg-type]

    @overload
    def __get__(self, owner: None, kind: type) -> Self: ...
    @overload
    def __get__(self, owner: SyncT, kind: type) -> Callable[P, SyncT]: ...
    @overload
    def __get__(self, owner: AsyncT, kind: type) -> Callable[P, Coroutine[Any, Any, AsyncT]]: ...
    def __get__(self, owner: Any, kind: type) -> Any:
        if owner is None:
            return self

        @wraps(self.steps)
        def run(*args: P.args, **kwargs: P.kwargs) -> Any:
            return owner._driver.run(_giving(owner, self.steps(owner, *args, **kwargs)))

        return run


def _giving(owner: T, steps: Steps[None]) -> Steps[T]:
    yield from steps
    return owner


class reading(Generic[S, T]):
    """An attribute that is read from the service each time."""

    def __init__(self, steps: Callable[[S], Steps[T]]) -> None:
        self.steps = steps
        update_wrapper(self, steps)  # type: ignore[arg-type]

    @overload
    def __get__(self, owner: None, kind: type) -> Self: ...
    @overload
    def __get__(self, owner: Sync, kind: type) -> T: ...
    @overload
    def __get__(self, owner: Async, kind: type) -> Coroutine[Any, Any, T]: ...
    def __get__(self, owner: Any, kind: type) -> Any:
        return self if owner is None else owner._driver.run(self.steps(owner))


class Pages(Generic[T]):
    """A paged listing: where it is and what becomes of each item."""

    def __init__(self, path: str, made: Callable[[dict[str, Any]], T], **params: Any) -> None:
        self.path = path
        self.made = made
        self.params = params

    def page(self, cursor: str | None) -> Steps[tuple[list[T], str | None]]:
        """The items after ``cursor``, and the cursor after them."""
        body = yield from fetch("GET", self.path, params={"limit": PAGE, **self.params, "cursor": cursor})
        return [self.made(item) for item in body["items"]], body.get("next")

    def all(self) -> Steps[list[T]]:
        items, cursor = yield from self.page(None)
        while cursor:
            more, cursor = yield from self.page(cursor)
            items += more
        return items


class listing(Generic[S, P, T]):
    """A method that gives an iterator (``async for`` on the async side), fetching page by page as it is read."""

    def __init__(self, pages: Callable[Concatenate[S, P], Pages[T]]) -> None:
        self.pages = pages
        update_wrapper(self, pages)  # type: ignore[arg-type]

    @overload
    def __get__(self, owner: None, kind: type) -> Self: ...
    @overload
    def __get__(self, owner: Sync, kind: type) -> Callable[P, Iterator[T]]: ...
    @overload
    def __get__(self, owner: Async, kind: type) -> Callable[P, AsyncIterator[T]]: ...
    def __get__(self, owner: Any, kind: type) -> Any:
        if owner is None:
            return self

        @wraps(self.pages)
        def iterate(*args: P.args, **kwargs: P.kwargs) -> Any:
            pages = self.pages(owner, *args, **kwargs)
            return _sync(owner._driver, pages) if isinstance(owner, Sync) else _async(owner._driver, pages)

        return iterate


def _sync(driver: Driver, pages: Pages[T]) -> Iterator[T]:
    items, cursor = driver.run(pages.page(None))
    yield from items
    while cursor:
        items, cursor = driver.run(pages.page(cursor))
        yield from items


async def _async(driver: AsyncDriver, pages: Pages[T]) -> AsyncIterator[T]:
    items, cursor = await driver.run(pages.page(None))
    for item in items:
        yield item
    while cursor:
        items, cursor = await driver.run(pages.page(cursor))
        for item in items:
            yield item
