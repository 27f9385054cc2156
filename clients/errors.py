"""What can go wrong between a client and its server, and nothing else.

HopeError
├── Unreachable        nobody answered at the address
├── ConnectionLost     the line broke in the middle of a turn
├── Refused            the server said no, or the turn failed: status, code, param
└── ProtocolViolation  the server said what the protocol does not allow
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

from server import wire

if TYPE_CHECKING:
    from typing import Self


class HopeError(Exception):
    """Anything that kept a client from getting its answer; `str()` of it is a sentence."""

    code: str = "client_error"
    status: int | None = None
    may_be_committed: bool = False  # the session may have learned the turn; nobody can tell yet

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Unreachable(HopeError):
    """Nobody answered at the address; nothing was sent, so nothing was learned."""

    code = "unreachable"


class ConnectionLost(HopeError):
    """The line broke in the middle of a turn, and sending it again did not help.

    With `may_be_committed` the turn was on its way and its terminal event never came. Say the
    same again under this `turn_id`, whenever you like: it is learned once, and answered as it
    was if it had been committed.
    """

    code = "connection_lost"

    def __init__(self, message: str, *, turn_id: str, may_be_committed: bool) -> None:
        super().__init__(message)
        self.turn_id = turn_id
        self.may_be_committed = may_be_committed


class ProtocolViolation(HopeError):
    """The server said what the protocol does not allow: a fault to report, not to handle."""

    code = "protocol_violation"


class Refused(HopeError):
    """The server said no, or could not finish the turn.

    Nothing of it was kept, unless `may_be_committed`: then the store fell silent while the turn
    was committed, and only the same turn_id, sent again, tells.
    """

    def __init__(
        self,
        error: wire.ErrorDetail,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
        may_be_committed: bool = False,
    ) -> None:
        super().__init__(error.message)
        self.type = error.type
        self.code = error.code
        self.param = error.param
        self.status = status
        self.retry_after_s = error.retry_after_s if retry_after_s is None else retry_after_s
        self.may_be_committed = may_be_committed

    @classmethod
    def from_http(cls, status: int, body: str | bytes, retry_after: str | None = None) -> Self:
        """Read an HTTP refusal, whoever wrote it.

        >>> Refused.from_http(502, "<html>Bad gateway</html>").message
        'The server answered with HTTP status 502.'
        """
        try:
            error = _ErrorBody.model_validate_json(body).error
        except ValidationError:
            message = _IN_WORDS.get(status, f"The server answered with HTTP status {status}.")
            error = wire.ErrorDetail(type="http_error", code=f"http_{status}", message=message)
        return cls(error, status=status, retry_after_s=_seconds(retry_after))


_IN_WORDS = {
    401: "The server wants an API key that it knows.",
    403: "The server does not let this client in.",
}


class _ErrorBody(BaseModel):
    error: wire.ErrorDetail


def _seconds(header: str | None) -> float | None:
    return float(header) if header is not None and header.isdigit() else None
