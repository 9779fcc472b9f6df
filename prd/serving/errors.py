"""Errors that a client of the service is told: a type to decide by, a sentence to read, and the HTTP status."""

from __future__ import annotations

from prd.errors import PrdError


class ServiceError(PrdError, RuntimeError):
    """An error with the HTTP status and the type that a client sees.

    field        of the request that is wrong, as "options.faces"; None where it is none
    retry_after  seconds after which the same request may succeed; None where it will not
    """

    status = 500
    type = "internal_error"

    def __init__(self, message: str, *, field: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message, self.field, self.retry_after = message, field, retry_after

    def body(self) -> dict[str, dict[str, str]]:
        """Return the JSON of the error."""
        error = {"type": self.type, "message": self.message}
        return {"error": error if self.field is None else {**error, "field": self.field}}


class InvalidField(ServiceError):
    """A field of the request that is missing, unknown, of the wrong type or out of its range."""

    status, type = 422, "invalid_field"


class InvalidBody(ServiceError):
    """A body that is no JSON object."""

    status, type = 422, "invalid_body"

    def __init__(self) -> None:
        super().__init__('the body must be a JSON object, sent as application/json, as {"prompt": "a red cube"}')


class UnknownHost(ServiceError):
    """A request to a name that the service does not go by, as a site's that was made to mean this machine."""

    status, type = 403, "unknown_host"


class UnknownJob(ServiceError):
    """A job that never was, or whose time is over."""

    status, type = 404, "unknown_job"


class NotDone(ServiceError):
    """The file of a job that has none: not yet, or never."""

    status, type = 409, "not_done"


class BodyTooLarge(ServiceError):
    """A body of more bytes than the service reads."""

    status, type = 413, "body_too_large"


class QueueFull(ServiceError):
    """A queue that holds as many jobs as it may."""

    status, type = 429, "queue_full"


class RateLimited(ServiceError):
    """A client that asked too often."""

    status, type = 429, "rate_limited"


class Loading(ServiceError):
    """A service whose model is not loaded yet."""

    status, type = 503, "loading"


class Stopping(ServiceError):
    """A service that takes no new jobs, for it stops."""

    status, type = 503, "stopping"
