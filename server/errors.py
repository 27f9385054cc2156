"""Every error by its name on the wire; the only place that turns exceptions into answers."""

from __future__ import annotations

from hope_runtime.blobs import StateError
from hope_runtime.engine import NotFinite
from hope_runtime.tokenizer import ChatError
from memory_store import errors as store
from memory_store.headers import BadArchive
from memory_store.seal import BadKeyring, Sealed
from server.wire import ErrorDetail


class ApiError(Exception):
    """An answer other than success: status, code, and one sentence with value and remedy."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.param, self.retry_after = param, retry_after

    @property
    def detail(self) -> ErrorDetail:
        return ErrorDetail(
            type=_kind(self.status),
            code=self.code,
            message=self.message,
            param=self.param,
            retry_after_s=self.retry_after,
        )


def _kind(status: int) -> str:
    match status:
        case 401:
            return "authentication_error"
        case 403:
            return "permission_error"
        case 404 | 410:
            return "not_found_error"
        case 429:
            return "rate_limit_error"
        case _ if status < 500:
            return "invalid_request_error"
        case _:
            return "server_error"


def answer(error: Exception) -> ApiError:
    """Return what the client hears of an exception."""
    match error:
        case ApiError():
            return error
        case store.NotFound():
            return ApiError(404, "conversation_not_found", str(error))
        case store.Deleted():
            return ApiError(410, "session_deleted", str(error))
        case store.NoVersion():
            return ApiError(404, "version_not_found", str(error), param="version")
        case store.Held():
            wait = min(max(error.seconds, 1.0), 5.0)
            return ApiError(409, "session_busy", str(error), retry_after=wait)
        case store.Fenced() | store.Regressed():
            return ApiError(409, "session_moved", str(error), retry_after=1)
        case store.Conflict():
            return ApiError(409, "version_conflict", str(error))
        case store.Incompatible():
            return ApiError(409, "state_incompatible", str(error))
        case BadArchive():
            return ApiError(400, "invalid_archive", str(error))
        case Sealed() | BadKeyring():
            return ApiError(500, "memory_sealed", str(error))
        case store.Corrupt() | StateError():
            return ApiError(500, "memory_corrupt", str(error))
        case store.Full():
            return ApiError(503, "store_full", str(error), retry_after=30)
        case store.Unavailable() | store.Incomplete():
            return ApiError(503, "store_unavailable", str(error), retry_after=2)
        case NotFinite():
            return ApiError(422, "memory_update_rejected", f"{error}; the turn was rolled back")
        case ChatError():
            return ApiError(400, "invalid_request", str(error), param="messages")
        case _:
            return ApiError(500, "internal_error", f"the server failed: {type(error).__name__}")
