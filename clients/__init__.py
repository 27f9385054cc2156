"""Clients of a HOPE Server: `AsyncHope`, its blocking twin `Hope`, and the terminal `hope-chat`."""

from clients.client import AsyncHope, AsyncReply, AsyncSession
from clients.core import Exported, Patience
from clients.errors import ConnectionLost, HopeError, ProtocolViolation, Refused, Unreachable
from clients.sync import Hope, Reply, Session

__all__ = [
    "AsyncHope",
    "AsyncReply",
    "AsyncSession",
    "ConnectionLost",
    "Exported",
    "Hope",
    "HopeError",
    "Patience",
    "ProtocolViolation",
    "Refused",
    "Reply",
    "Session",
    "Unreachable",
]
