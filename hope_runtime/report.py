"""Facts the engine reports, one frozen value each. It does not know who listens."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from hope_runtime.consolidation import Consolidated
from hope_runtime.state import State


class Reason(StrEnum):
    """Why a reply ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class Phase(StrEnum):
    """What a batch was for."""

    PREFILL = "prefill"
    DECODE = "decode"
    UPDATE = "update"


@dataclass(frozen=True, slots=True)
class Seated:
    """A turn got its lane."""

    job: str
    waited: float  # seconds


@dataclass(frozen=True, slots=True)
class Said:
    """One token of a reply: the text that may be shown now (perhaps none) and its surprise."""

    job: str
    text: str
    surprise: float


@dataclass(frozen=True, slots=True)
class Learned:
    """A level was consolidated (or the update was refused)."""

    job: str
    consolidated: Consolidated
    seconds: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The job is done and `state` is what the session now is.

    `text` is the last text that had been held back; `surprise` the mean nats per token said.
    """

    job: str
    state: State
    reason: Reason
    text: str
    read: int
    said: int
    surprise: float | None


@dataclass(frozen=True, slots=True)
class Dropped:
    """The job was cancelled with nothing to keep; the session is what it was."""

    job: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The job ended in an error; the session is what it was."""

    job: str
    error: Exception


@dataclass(frozen=True, slots=True)
class Stepped:
    """One batch ran."""

    phase: Phase
    sessions: int
    tokens: int
    seconds: float


Fact = Seated | Said | Learned | Finished | Dropped | Failed | Stepped
