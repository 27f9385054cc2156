"""The client's side of the wire, without a socket, a clock or a thread in sight.

Give a `Connection` the turns to ask for and it returns what to send; feed it what arrived and it
says which turn that was about and what it means. `client.py` and `sync.py` only carry the words.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, NamedTuple, TypedDict, Unpack
from urllib.parse import urlsplit, urlunsplit

from pydantic import ValidationError

from clients.errors import ConnectionLost, HopeError, ProtocolViolation, Refused, Unreachable
from server import wire

# --- asking -----------------------------------------------------------------------------------


class Options(TypedDict, total=False):
    """What may be said about a turn besides its text; what is left out is the server's choice."""

    instructions: str | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | list[str] | None
    max_output_tokens: int | None
    metadata: dict[str, str] | None
    user: str | None
    mode: wire.Mode
    on_cancel: Literal["keep", "rollback"]
    wait: Literal["committed", "durable"] | None
    window: Literal["kept", "fresh"]
    if_version: int | None
    rates: dict[wire.Role, float] | None


Said = str | Sequence[wire.InputMessage]

_MEMORY_OPTIONS = wire.MemoryOptions.model_fields.keys()


def request(
    session: str | None, said: Said, turn_id: str, include: list[str], **options: Unpack[Options]
) -> wire.ResponseCreate:
    """Build the request of a turn; one id names it as event, as stream and as idempotency key.

    >>> request("nora", "hello", "t1", [], temperature=0.5).conversation
    'nora'
    """
    given: dict[str, Any] = dict(options)
    if unknown := given.keys() - Options.__annotations__.keys():
        raise TypeError(f"a turn has no option {', '.join(sorted(unknown))}")
    memory = {name: given.pop(name) for name in _MEMORY_OPTIONS & given.keys()}
    return wire.ResponseCreate.model_validate(
        {
            **given,
            "type": "response.create",
            "conversation": session,
            "input": said if isinstance(said, str) else list(said),
            "include": include or None,
            "memory": memory,
            "event_id": turn_id,
            "stream_id": turn_id,
            "turn_id": turn_id,
        }
    )


def socket_url(url: str) -> str:
    """Return where the socket is, given where the server is.

    >>> socket_url("https://hope.example/brain/")
    'wss://hope.example/brain/v1/responses'
    """
    parts = urlsplit(url)
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme)
    if scheme is None or not parts.netloc:
        raise ValueError(f"the server's url must look like http://host:port, not {url!r}")
    return urlunsplit((scheme, parts.netloc, parts.path.rstrip("/") + "/v1/responses", "", ""))


# --- hearing ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    response_id: str


@dataclass(frozen=True, slots=True)
class Text:
    piece: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The turn ended as it should, or was cut short; `response.memory` says what was kept."""

    response: wire.Response


@dataclass(frozen=True, slots=True)
class Failed:
    error: HopeError


MemoryNews = wire.ConsolidationEvent | wire.MemoryCommitted


@dataclass(frozen=True, slots=True)
class MemoryEvent:
    """News of the session's memory; may come after its turn has ended."""

    news: MemoryNews


Fact = Started | Text | Finished | Failed | MemoryEvent


class Heard(NamedTuple):
    """A fact and the turn it is about, if it is about one."""

    turn_id: str | None
    fact: Fact


# --- one turn ---------------------------------------------------------------------------------


class Phase(StrEnum):
    ASKED = "asked"
    CREATED = "created"
    RUNNING = "running"
    ITEM = "item"
    SPEAKING = "speaking"
    SAID = "said"
    PART_DONE = "part_done"
    ITEM_DONE = "item_done"
    ENDED = "ended"


_NEXT = {
    (Phase.ASKED, "response.created"): Phase.CREATED,
    (Phase.CREATED, "response.in_progress"): Phase.RUNNING,
    (Phase.RUNNING, "response.output_item.added"): Phase.ITEM,
    (Phase.ITEM, "response.content_part.added"): Phase.SPEAKING,
    (Phase.SPEAKING, "response.output_text.delta"): Phase.SPEAKING,
    (Phase.SPEAKING, "response.output_text.done"): Phase.SAID,
    (Phase.SAID, "response.content_part.done"): Phase.PART_DONE,
    (Phase.PART_DONE, "response.output_item.done"): Phase.ITEM_DONE,
}
_TERMINAL = frozenset({"response.completed", "response.incomplete", "response.failed"})


class Turn:
    """One request and its reply: what was asked, what has been said, how it ended.

    An event out of order raises `ProtocolViolation` and leaves the turn as it was. A turn that
    failed may be had `again`; what was shown of its reply then has to come first once more, and
    a reply that begins otherwise ends the turn as `diverged`.
    """

    def __init__(self, request: wire.ResponseCreate, turn_id: str) -> None:
        self.request = request
        self.id = turn_id
        self.phase = Phase.ASKED
        self.text = ""
        self.response: wire.Response | None = None
        self.error: HopeError | None = None
        self.tries = 1
        self.diverged = False
        self.failures: list[HopeError] = []  # of the tries before this one
        self._heard = ""  # in this try
        self._number = -1

    @property
    def ended(self) -> bool:
        return self.phase is Phase.ENDED

    @property
    def learns(self) -> bool:
        return self.request.memory.mode is wire.Mode.READ_WRITE

    @property
    def behind(self) -> bool:
        """Whether this try has yet to say again what was shown."""
        return len(self._heard) < len(self.text)

    def receive(self, event: wire.Event) -> list[Fact]:
        phase = self._phase_after(event)
        if event.sequence_number <= self._number:
            raise ProtocolViolation(
                f"event {event.sequence_number} ({event.type}) came after event {self._number}"
            )
        self.phase, self._number = phase, event.sequence_number
        match event:
            case wire.TextDelta():
                return self._say(event.delta)
            case wire.ResponseEvent():
                return self._progress(event)
            case _:
                return []

    def fail(self, error: HopeError) -> list[Fact]:
        self.phase, self.error = Phase.ENDED, error
        return [Failed(error)]

    def again(self, error: HopeError, shown: int) -> None:
        """Forget a try that failed, to be asked for once more under the same id.

        Args:
            error: what the try failed with.
            shown: how many characters of the reply somebody has been given.
        """
        self.failures.append(error)
        self.tries += 1
        self.text, self._heard = self.text[:shown], ""
        self.phase, self.response, self.error, self._number = Phase.ASKED, None, None, -1

    def verdict(self, error: HopeError) -> HopeError:
        """Return what to raise after a last try that failed with `error`.

        A passing trouble says nothing of the tries before it: if one of them may have been
        committed, that is what the caller has to know.
        """
        if error.may_be_committed or not passes(error):
            return error
        return next((one for one in self.failures if one.may_be_committed), error)

    def _phase_after(self, event: wire.Event) -> Phase:
        if event.type in _TERMINAL and self.phase not in (Phase.ASKED, Phase.ENDED):
            return Phase.ENDED
        phase = _NEXT.get((self.phase, event.type))
        if phase is None:
            raise ProtocolViolation(f"{event.type} is out of order: the turn is {self.phase}")
        return phase

    def _progress(self, event: wire.ResponseEvent) -> list[Fact]:
        match event.type:
            case "response.created":
                self.response = event.response
                return [Started(event.response.id)]
            case "response.in_progress":
                return []
            case "response.failed":
                self.response = event.response
                return self.fail(_failure(event.response))
            case _:
                self.response = event.response
                facts = self._say(self._unsaid(event.response))
                if self.diverged:
                    return facts
                return self._diverge() if self.behind else [*facts, Finished(event.response)]

    def _say(self, piece: str) -> list[Fact]:
        self._heard += piece
        if self.behind and self.text.startswith(self._heard):
            return []
        if not self._heard.startswith(self.text):
            return self._diverge()
        fresh = self._heard[len(self.text) :]
        self.text = self._heard
        return [Text(fresh)] if fresh else []

    def _diverge(self) -> list[Fact]:
        """Fail with what the shown reply broke off with; this one may be learned for all we know.

        Nobody gets the beginning of one reply and the end of another.
        """
        self.diverged = True
        error = self.failures[-1]
        error.may_be_committed = self.learns
        return self.fail(error)

    def _unsaid(self, response: wire.Response) -> str:
        """Return what a reply holds beyond what was streamed: all of it, when it is replayed."""
        whole = "".join(part.text for item in response.output for part in item.content)
        return whole[len(self._heard) :] if whole.startswith(self._heard) else ""


def _failure(response: wire.Response) -> Refused:
    detail = response.error or wire.ErrorDetail(
        type="server_error", code="response_failed", message="The server could not finish the turn."
    )
    memory = response.memory
    unknown = memory is not None and memory.outcome is wire.Outcome.UNKNOWN
    return Refused(detail, may_be_committed=unknown)


# --- sending it again -------------------------------------------------------------------------

# what a server says that may answer in a moment, or whose neighbour may
_PASSING = frozenset(
    {
        "draining",
        "store_unavailable",
        "session_busy",
        "session_moved",
        "http_502",  # of a proxy whose server is being restarted
        "http_503",
        "http_504",
    }
)


def passes(error: HopeError) -> bool:
    """Tell whether the same turn, sent again, may well fare better.

    >>> passes(Refused.from_http(503, "")), passes(Refused.from_http(401, ""))
    (True, False)
    """
    match error:
        case Refused():
            return error.code in _PASSING
        case ConnectionLost() | Unreachable():
            return True
        case _:
            return False


@dataclass(frozen=True, slots=True)
class Patience:
    """How often a turn is sent, under one id, until it is answered, and how long that may take.

    The id makes it safe: the server learns a turn once and answers it from the store after that.
    Pauses double from `pause`, or are as long as the server asks, and together stay under
    `seconds`. `Patience(tries=1)` sends every turn once.
    """

    tries: int = 3
    pause: float = 0.5
    seconds: float = 15.0

    def wait(self, turn: Turn, error: HopeError, *, waited: float, chance: float) -> float | None:
        """Return the seconds to wait before a turn is sent again; None: it is not.

        Args:
            turn: the turn that failed.
            error: what it failed with.
            waited: seconds waited between its tries so far.
            chance: from 0 to 1; spreads out clients that failed together.
        """
        if turn.diverged or turn.tries >= self.tries or not passes(error):
            return None
        if isinstance(error, Unreachable) and turn.tries == 1:
            return None  # a wrong address, rather than a server that is being restarted
        asked = error.retry_after_s if isinstance(error, Refused) else None
        pause = max(asked or 0.0, self.pause * 2 ** (turn.tries - 1)) * (1 + chance / 2)
        return pause if waited + pause <= self.seconds else None


PATIENT = Patience()


class Record:
    """What can be read of a reply, while it arrives and after."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn

    @property
    def text(self) -> str:
        return self.turn.text

    @property
    def ended(self) -> bool:
        return self.turn.ended

    @property
    def status(self) -> str:
        """One of in_progress, completed, incomplete, failed."""
        if self.turn.error is not None:
            return "failed"
        return self.turn.response.status if self.turn.response else "in_progress"

    @property
    def cut_short_by(self) -> str | None:
        """Why the reply is incomplete: `cancelled` or `max_output_tokens`."""
        details = self.turn.response.incomplete_details if self.turn.response else None
        return details.reason if details else None

    @property
    def usage(self) -> wire.Usage | None:
        return self.turn.response.usage if self.turn.response else None

    @property
    def memory(self) -> wire.MemoryResult | None:
        return self.turn.response.memory if self.turn.response else None

    @property
    def version(self) -> int | None:
        """The version of the session that holds this turn; None if it was not committed."""
        return self.memory.committed_version if self.memory else None

    @property
    def tries(self) -> int:
        """How often the turn was sent, under one id; it is learned once."""
        return self.turn.tries


# --- sessions as files ------------------------------------------------------------------------


class Exported(NamedTuple):
    """Which version of a session a file holds, and in how many bytes."""

    version: int
    bytes: int


# --- one connection ---------------------------------------------------------------------------

_EVENTS: dict[str, type[wire.Event] | type[wire.Wire]] = {
    "response.created": wire.ResponseEvent,
    "response.in_progress": wire.ResponseEvent,
    "response.output_item.added": wire.ItemEvent,
    "response.content_part.added": wire.PartEvent,
    "response.output_text.delta": wire.TextDelta,
    "response.output_text.done": wire.TextDone,
    "response.content_part.done": wire.PartEvent,
    "response.output_item.done": wire.ItemEvent,
    "response.completed": wire.ResponseEvent,
    "response.incomplete": wire.ResponseEvent,
    "response.failed": wire.ResponseEvent,
    "hope:consolidation.completed": wire.ConsolidationEvent,
    "hope:consolidation.failed": wire.ConsolidationEvent,
    "hope:memory.committed": wire.MemoryCommitted,
    "error": wire.ErrorEvent,
}


class Connection:
    """One socket's worth of turns, told apart by their ids."""

    def __init__(self) -> None:
        self._turns: dict[str, Turn] = {}
        self._complaint: HopeError | None = None

    def ask(self, turn: Turn) -> str:
        """Take on a turn and return the message that asks for it."""
        self._turns[turn.id] = turn
        return turn.request.model_dump_json(exclude_none=True)

    def cancel(self, turn: Turn) -> str:
        """Return the message that stops a turn; what became of it is in the terminal event."""
        return wire.ResponseCancel(
            type="response.cancel",
            event_id=f"{turn.id}.cancel",
            stream_id=turn.id,
            response_id=turn.response.id if turn.response else None,
        ).model_dump_json(exclude_none=True)

    def receive(self, message: str | bytes) -> list[Heard]:
        """Say what a message means; raises `ProtocolViolation` if it is no event at all."""
        match parse(message):
            case wire.ErrorEvent() as event:
                return self._refused(event)
            case wire.ConsolidationEvent() | wire.MemoryCommitted() as news:
                return [Heard(news.stream_id, MemoryEvent(news))]
            case wire.Event() as event:
                return self._advance(event)
            case _:
                return []

    def lose(self, reason: str) -> list[Heard]:
        """The line is gone: every open turn fails, its fate unknown."""
        if self._complaint is not None:
            reason = self._complaint.message
        turns, self._turns = list(self._turns.values()), {}
        return [Heard(turn.id, fact) for turn in turns for fact in turn.fail(_lost(turn, reason))]

    def _advance(self, event: wire.Event) -> list[Heard]:
        turn = self._turns.get(event.stream_id or "")
        if turn is None:
            return []
        try:
            facts = turn.receive(event)
        except ProtocolViolation as error:
            facts = turn.fail(error)
        return self._tell(turn, facts)

    def _refused(self, event: wire.ErrorEvent) -> list[Heard]:
        error = Refused(event.error, status=event.status, retry_after_s=event.retry_after_s)
        turn = self._turns.get(event.stream_id or event.event_id or "")
        if turn is None:
            if event.stream_id is None and event.event_id is None:
                self._complaint = error  # about the socket itself: explains why it closes
            return []
        if event.event_id not in (None, turn.id):
            return []  # our cancel came too late; the turn itself is well
        return self._tell(turn, turn.fail(error))

    def _tell(self, turn: Turn, facts: list[Fact]) -> list[Heard]:
        if turn.ended:
            del self._turns[turn.id]
        return [Heard(turn.id, fact) for fact in facts]


def parse(message: str | bytes) -> wire.Wire | None:
    """Read one server event; None for a type this client does not know.

    >>> parse('{"type": "hope:session.moved"}') is None
    True
    """
    try:
        event = json.loads(message)
    except ValueError as error:
        raise ProtocolViolation(f"the server sent what is not JSON: {error}") from error
    if not isinstance(event, dict):
        raise ProtocolViolation("the server sent JSON that is not an event")
    model = _EVENTS.get(str(event.get("type")))
    if model is None:
        return None
    try:
        return model.model_validate(event)
    except ValidationError as error:
        raise ProtocolViolation(f"the server sent a malformed {event['type']}: {error}") from error


def _lost(turn: Turn, reason: str) -> ConnectionLost:
    fate = "the turn may have been committed" if turn.learns else "nothing was to be learned"
    return ConnectionLost(
        f"The connection was lost in the middle of a turn ({reason}); {fate}.",
        turn_id=turn.id,
        may_be_committed=turn.learns,
    )
