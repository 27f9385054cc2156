"""What every route works with, put together once by `app.py`."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request, WebSocket

from hope_runtime.config import HopeConfig
from memory_store import SessionKey
from server.errors import ApiError
from server.measured import MeasuredStore
from server.metrics import Metrics
from server.residency import Residency
from server.security import Gate
from server.sessions import Sessions
from server.settings import Settings
from server.turns import Turns


@dataclass(frozen=True, slots=True)
class Card:
    """The served model, as it is told to clients."""

    name: str
    fingerprint: str
    config: HopeConfig
    device: str
    dtype: str
    loaded: int  # seconds since the epoch

    @property
    def mixers(self) -> str:
        """What lets the tokens of a session see each other, in words."""
        config, found = self.config, []
        if config.attention_blocks:
            found.append(f"window {config.window} tokens, {config.sinks} sinks")
        if config.memory is not None and (blocks := len(config.memory_blocks)):
            heads, width = config.memory.heads, config.memory.head_width
            found.append(
                f"memory of {heads} heads of {width} x {width} in {blocks} blocks, "
                f"chunk {config.memory.rule.chunk}"
            )
        return "; ".join(found)


@dataclass(frozen=True, slots=True)
class Service:
    settings: Settings
    card: Card
    gate: Gate
    store: MeasuredStore
    residency: Residency
    turns: Turns
    metrics: Metrics
    sessions: Sessions


def service(connection: Request | WebSocket) -> Service:
    found: Service = connection.app.state.service
    return found


def tenant(connection: Request | WebSocket) -> str:
    """Return who asks; the guard has put it there."""
    found: str = connection.scope["tenant"]
    return found


def key(
    connection: Request | WebSocket, session: str, *, param: str = "conversation"
) -> SessionKey:
    """Return the key of a tenant's session (400 when the id is not one)."""
    try:
        return SessionKey(tenant(connection), session)
    except ValueError as error:
        raise ApiError(400, "invalid_request", str(error), param=param) from None
