# SPDX-License-Identifier: Apache-2.0
"""What went wrong, as OpenAI's API tells it: a status, and `{"error": {"message", "type", "param", "code"}}`."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from hourllava.errors import (
    AdmissionError,
    BusyError,
    DecoderError,
    HourLlavaError,
    InputError,
    MemoryBusyError,
    MemoryFileError,
    ModelError,
    QuestionError,
    SourceConflictError,
    SourceError,
    SourceSizeError,
    StorageError,
    UnknownMemoryError,
    VideoError,
)

INVALID, SERVER, RATE = "invalid_request_error", "server_error", "rate_limit_error"
# The first that an error is one of counts: its status, type, code, and the seconds after which to ask again.
_TABLE: tuple[tuple[type[HourLlavaError], int, str, str | None, int | None], ...] = (
    (BusyError, 429, RATE, "busy", 1),
    (AdmissionError, 503, SERVER, "no_room", 5),
    (DecoderError, 502, SERVER, "decoder", 5),
    (UnknownMemoryError, 404, INVALID, "not_found", None),
    (MemoryBusyError, 409, INVALID, "in_use", None),
    (SourceConflictError, 409, INVALID, "other_source", None),
    (SourceSizeError, 413, INVALID, "too_large", None),
    (SourceError, 400, INVALID, "source_unusable", None),
    (StorageError, 507, SERVER, "no_space", None),
    (MemoryFileError, 500, SERVER, "memory_unreadable", None),
    (ModelError, 500, SERVER, "model_unusable", None),
    (QuestionError, 400, INVALID, None, None),
    (InputError, 400, INVALID, None, None),
    (VideoError, 400, INVALID, "video_unreadable", None),
)
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}


class ApiError(Exception):
    """A problem with its HTTP status.

    Args:
        status: of the response.
        message: one line for people.
        param: what of the request it is about, as `messages[0].content`.
        code: one word for programs.
        kind: OpenAI's type of the error; follows from the status if it is not given.
        retry: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        retry: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, _sendable(message), param and _sendable(param), code
        self.kind = kind or (SERVER if status >= 500 else INVALID)
        self.retry = retry

    def body(self) -> dict[str, Any]:
        """What is sent."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The whole response."""
        headers = {} if self.retry is None else {"retry-after": str(self.retry)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def problem_of(error: Exception) -> ApiError | None:
    """The problem that an exception stands for; None for a bug, about which clients are told nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _of_body(error.errors(), error.body)
    if isinstance(error, HTTPException) and error.__cause__ is not None:  # of the JSON decoder, by way of FastAPI
        return ApiError(400, "the body cannot be read; send JSON in UTF-8, not nested too deep", code="invalid_json")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), code=_CODES.get(error.status_code))
    if isinstance(error, HourLlavaError):
        for kind, status, name, code, retry in _TABLE:
            if isinstance(error, kind):
                return ApiError(status, str(error), code=code, kind=name, retry=retry)
        return ApiError(400, str(error))
    return None


def _sendable(text: str) -> str:
    """A text without what UTF-8 has no bytes for, which a client may have sent in JSON."""
    return text.encode(errors="replace").decode()


def hidden_problem(request_id: str) -> ApiError:
    """What a client is told about a bug."""
    return ApiError(500, f"something went wrong in the server; its log tells more under {request_id}", code="internal")


def _of_body(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """The first thing that is wrong with a body, in a line that names the field."""
    first = errors[0]
    where, *place = first["loc"] or ("body",)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON ({first['ctx']['error']})", code="invalid_json")
    if isinstance(body, bytes) and not place:
        return ApiError(400, "the body is not marked as JSON; send content-type: application/json", code="invalid_json")
    if first["type"] == "refused":  # by a validator of ours, which knows the field
        place.append(first["ctx"]["field"])
    param = _path(place, body if where == "body" else {})
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param}: this server does not know it; leave it out", param, "unknown_parameter")
    if first["type"] == "missing":
        what = param or "the body"
        return ApiError(400, f"{what} is missing", param or None, "missing_parameter")
    message = first["msg"]
    return ApiError(400, f"{param}: {message}" if param else message, param or None, "invalid_value")


def _path(place: Sequence[int | str], body: Any) -> str:
    """A place in a body as `messages[0].content`, without the names of alternatives that validation puts in between."""
    path = ""
    for number, step in enumerate(place):
        if isinstance(step, int) and isinstance(body, list):
            body, path = body[step] if step < len(body) else None, f"{path}[{step}]"
        elif isinstance(body, Mapping) and (step in body or number == len(place) - 1):
            body, path = body.get(step), f"{path}.{step}" if path else str(step)
    return path
