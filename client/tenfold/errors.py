"""Exceptions of the client, one per kind of answer.

::

    TenfoldError
    ├── ConnectionFailed          no answer from the service
    ├── APIError                  the service said no: status, code, request_id
    │   ├── BadRequest            400, 413, 422: what was sent cannot be used
    │   ├── NotAuthenticated      401: no key, or one that is not known
    │   ├── NotAllowed            403: the key lacks the scope
    │   ├── NotFound              404: not there, or not yours
    │   ├── Conflict              409: not possible in the present state
    │   ├── RateLimited           429
    │   └── ServerError           5xx
    ├── Rejected                  an uploaded model or data set was read and refused
    ├── JobFailed                 a job ended as failed or cancelled
    ├── WaitTimeout               it did not end within the time given; it goes on
    └── Corrupted                 a download does not have the promised SHA-256
"""

from typing import Any

__all__ = [
    "APIError",
    "BadRequest",
    "Conflict",
    "ConnectionFailed",
    "Corrupted",
    "JobFailed",
    "NotAllowed",
    "NotAuthenticated",
    "NotFound",
    "RateLimited",
    "Rejected",
    "ServerError",
    "TenfoldError",
    "WaitTimeout",
]


class TenfoldError(Exception):
    pass


class ConnectionFailed(TenfoldError):
    pass


class APIError(TenfoldError):
    """The service's problem document (RFC 9457)."""

    def __init__(self, status: int, problem: dict[str, Any], request_id: str | None) -> None:
        self.status = status
        self.code = str(problem.get("code", "unknown"))
        self.detail = str(problem.get("detail") or problem.get("title") or "no detail given")
        self.problem = problem
        self.request_id = request_id
        super().__init__(f"{self.detail} ({status} {self.code}, request {request_id})")


class BadRequest(APIError):
    pass


class NotAuthenticated(APIError):
    pass


class NotAllowed(APIError):
    pass


class NotFound(APIError):
    pass


class Conflict(APIError):
    pass


class RateLimited(APIError):
    pass


class ServerError(APIError):
    pass


class _Ended(TenfoldError):
    """Something ended badly: ``code`` is stable, the text says what to do."""

    def __init__(self, code: str, reason: str) -> None:
        self.code = code
        self.reason = reason
        super().__init__(f"{reason} ({code})")


class Rejected(_Ended):
    pass


class JobFailed(_Ended):
    pass


class WaitTimeout(TenfoldError):
    pass


class Corrupted(TenfoldError):
    pass


_BY_STATUS: dict[int, type[APIError]] = {
    401: NotAuthenticated,
    403: NotAllowed,
    404: NotFound,
    409: Conflict,
    429: RateLimited,
}


def api_error(status: int, problem: dict[str, Any], request_id: str | None) -> APIError:
    """The exception for one answer of the service."""
    kind = _BY_STATUS.get(status, ServerError if status >= 500 else BadRequest)
    return kind(status, problem, request_id)
