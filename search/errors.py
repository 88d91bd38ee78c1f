"""Errors of the science. Misuse and bad input raise; failures of a *run* are ``spec.Outcome`` members.

::

    TenfoldError                code, message (what arrived, what to do)
    ├── BadModel                the uploaded model cannot be taken in
    │   └── Refused             … because the file holds something that is not allowed
    ├── BadData                 the uploaded data cannot be read, or does not fit the model
    ├── BadRequest              a job's specification cannot be carried out as asked
    └── BadBaseline             the original network itself does not behave as promised
"""

__all__ = ["BadBaseline", "BadData", "BadModel", "BadRequest", "Refused", "TenfoldError"]


class TenfoldError(Exception):
    """A failure with a stable code (``snake_case``) and a sentence that says what arrived and what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.code, self.message))


class BadModel(TenfoldError):
    pass


class Refused(BadModel):
    pass


class BadData(TenfoldError):
    pass


class BadRequest(TenfoldError):
    pass


class BadBaseline(TenfoldError):
    pass
