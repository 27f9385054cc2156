"""A turn as a transaction: state, engine, commit, terminal event. One path for every endpoint.

Each session takes one turn at a time, first come first served. The new state exists beside the
old one until the store has it; then, and only then, the client hears that the turn is complete.
Chunks that the reply completed are consolidated right after, as a commit of their own, before
the session's next turn.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

from hope_runtime.consolidation import Consolidated
from hope_runtime.consolidation import Outcome as Update
from hope_runtime.engine import Consolidation, Turn
from hope_runtime.report import Dropped, Failed, Finished, Learned, Reason, Said
from hope_runtime.state import State
from hope_runtime.tokenizer import Message, Role, Span, Tokenizer
from memory_store import SessionKey, TurnRecord
from server.errors import ApiError, answer
from server.metrics import Metrics
from server.residency import Book, Residency, Resident, known_prefix, link
from server.turn import Ask, Began, Ended, Grown, Happening, Kept, Words
from server.wire import METADATA_KEYS, MemoryResult, Mode, Outcome
from server.worker import Worker

log = logging.getLogger(__name__)

RATES = {Role.USER: 1.0, Role.DOCUMENT: 1.0}  # who is learned from; everyone else: 0


@dataclass(frozen=True, slots=True)
class Limits:
    input_tokens: int
    waiting: int


class OpenTurn:
    """A turn in flight: iterate over what happens; `cancel` when a person presses stop."""

    def __init__(self, ask: Ask, stop: Callable[[str, bool], None]) -> None:
        self.ask = ask
        self.id = uuid.uuid4().hex
        self.cancelled = False
        self.dropped = False  # by a client that left, or that wants nothing of it kept
        self.committing = False  # from here on the store may have it, whatever goes wrong
        self.ended = False
        self.text = ""  # the reply so far
        self.began: Began | None = None
        self._stop = stop
        self._happenings: asyncio.Queue[Happening | None] = asyncio.Queue()

    def cancel(self, *, keep: bool) -> None:
        """End the turn at its next token, with what was said kept or rolled back."""
        self.cancelled = True
        self.dropped = self.dropped or not keep
        self._stop(self.id, keep)

    def put(self, happening: Happening | None) -> None:
        match happening:
            case Began():
                self.began = happening
            case Words(text=text):
                self.text += text
            case Ended():
                self.ended = True
        self._happenings.put_nowait(happening)

    def __aiter__(self) -> AsyncIterator[Happening]:
        """Go on to the end; what comes after `Ended` is the consolidation it left due."""
        return self

    async def __anext__(self) -> Happening:
        if (happening := await self._happenings.get()) is None:
            self._happenings.put_nowait(None)  # it stays over
            raise StopAsyncIteration
        return happening


class Turns:
    """Everything a turn needs, put together once."""

    def __init__(
        self,
        worker: Worker,
        residency: Residency,
        tokenizer: Tokenizer,
        metrics: Metrics,
        *,
        limits: Limits,
        learning: bool,
        durability: str,
    ) -> None:
        self._worker = worker
        self._residency = residency
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._limits = limits
        self._learning = learning
        self._durability = durability
        self._locks: dict[SessionKey, _Queue] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.draining = False

    def start(self, ask: Ask) -> OpenTurn:
        """Begin a turn; it goes on until it ends or is cancelled, whoever listens.

        Raises:
            ApiError: 503 `draining`.
        """
        if self.draining:
            raise _stopping()
        turn = OpenTurn(ask, lambda job, keep: self._worker.cancel(job, keep=keep))
        task = asyncio.create_task(self._run(turn), name=f"turn-{turn.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return turn

    async def drain(self, seconds: float) -> None:
        """Take no new turns, wait for the open ones, and drop those that take longer."""
        self.draining = True
        self._metrics.draining.set(1)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        self.drop()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def drop(self) -> None:
        """End every open turn now; what is not committed is rolled back."""
        for task in self._tasks:
            task.cancel()

    @asynccontextmanager
    async def alone(self, key: SessionKey) -> AsyncIterator[None]:
        """Hold the session: no turn runs meanwhile (409 `session_busy` behind a full queue)."""
        queue = self._locks.setdefault(key, _Queue())
        if queue.waiting > self._limits.waiting:
            raise ApiError(
                409,
                "session_busy",
                f"session {key.session!r} has {queue.waiting} turns waiting; retry when one ended",
                retry_after=1,
            )
        queue.waiting += 1
        try:
            async with queue.lock:
                yield
        finally:
            queue.waiting -= 1
            if not queue.waiting:
                self._locks.pop(key, None)

    # --- one turn -----------------------------------------------------------------------------

    async def _run(self, turn: OpenTurn) -> None:
        ask = turn.ask
        try:
            if ask.key is None or ask.mode is Mode.OFF:
                await self._perform(turn, Resident(_NOBODY, 0, State(), Book()), "new")
            else:
                async with self.alone(ask.key):
                    resident, source = await self._load(ask.key)
                    after = await self._perform(turn, resident, source)
                    if after is not None and after.state.due and not self.draining:
                        await self._consolidate(turn, after)
        except asyncio.CancelledError:
            self._fail(turn, _stopping())
            raise
        except Exception as error:
            self._fail(turn, error)
        finally:
            turn.put(None)

    async def _load(self, key: SessionKey) -> tuple[Resident, str]:
        began = time.perf_counter()
        resident, source = await self._residency.get(key)
        self._metrics.loaded(source, time.perf_counter() - began)
        if resident.state.due:  # a server stopped between a turn and its consolidation
            resident = await self._consolidate(None, resident)
        return resident, source

    async def _perform(self, turn: OpenTurn, base: Resident, source: str) -> Resident | None:
        """Read, answer, commit; return the session as committed, if it was."""
        ask = turn.ask
        if ask.if_version is not None and ask.if_version != base.version:
            raise ApiError(
                412,
                "precondition_failed",
                f"the session is at version {base.version}, not {ask.if_version}; reload it",
                param="memory.if_version",
            )
        kept = len(base.book.metadata.keys() | dict(ask.metadata).keys())
        if kept > METADATA_KEYS:
            raise ApiError(
                400,
                "invalid_request",
                f"the session would have {kept} metadata keys, more than {METADATA_KEYS}; "
                "use fewer",
                param="metadata",
            )
        # encoding a long text takes long enough to be felt in everybody's stream
        new, skipped = await asyncio.to_thread(self._new_messages, ask, base)
        job = await asyncio.to_thread(self._job, turn, base, new)
        self._metrics.skipped(skipped)
        turn.put(Began(base.version, source))
        grown: list[Consolidated] = []
        finished = None if turn.cancelled else await self._answer(turn, job, grown)
        if finished is None or turn.dropped:
            self._metrics.rolled_back("cancelled")
            turn.put(self._ended(turn, base, None, grown, Outcome.ROLLED_BACK))
            return None
        if finished.text:
            turn.put(Words(finished.text))
        if base.key is _NOBODY or ask.mode is not Mode.READ_WRITE:
            outcome = Outcome.READ_ONLY if ask.mode is Mode.READ_ONLY else Outcome.OFF
            turn.put(self._ended(turn, base, finished, grown, outcome, skipped))
            return None
        after = await self._commit(turn, base, new, finished, grown)
        turn.put(Kept(after.version))
        turn.put(
            self._ended(turn, after, finished, grown, Outcome.COMMITTED, skipped, base.version)
        )
        return after

    async def _answer(
        self, turn: OpenTurn, job: Turn, grown: list[Consolidated]
    ) -> Finished | None:
        """Run the job and tell what happens; None: it was cancelled with nothing to keep."""
        async with aclosing(self._worker.perform(job)) as facts:
            async for fact in facts:
                match fact:
                    case Said(text=text) if text:
                        turn.put(Words(text))
                    case Learned(consolidated=consolidated, seconds=seconds):
                        grown.append(consolidated)
                        turn.put(Grown(consolidated, seconds))
                    case Failed(error=error):
                        raise error
                    case Dropped():
                        return None
                    case Finished():
                        return fact
                    case _:
                        pass
        raise AssertionError("a job ends in Finished, Dropped or Failed")

    async def _commit(
        self,
        turn: OpenTurn,
        base: Resident,
        new: tuple[Message, ...],
        finished: Finished,
        grown: list[Consolidated],
    ) -> Resident:
        book = base.book
        messages = [*new, Message(Role.ASSISTANT, turn.text)] if turn.ask.most else [*new]
        for message in messages:
            book = book.with_item(message)
        if turn.ask.instructions:
            book = replace(book, instructions=_digest(turn.ask.instructions))
        now = time.time()
        book = replace(
            book,
            turns=book.turns + 1,
            surprise=finished.surprise,
            learned_at={**book.learned_at, **dict.fromkeys((each.level for each in grown), now)},
            metadata={**book.metadata, **dict(turn.ask.metadata)},
        )
        record = TurnRecord(
            turn.id,  # the client's own may come twice, and both turns were had
            {
                "turn_id": turn.ask.turn_id,
                "items": [[str(m.role), m.text] for m in messages],
                "reason": str(finished.reason),
                "at": now,
            },
        )
        turn.committing = True
        after, written = await self._residency.commit(
            base, finished.state, book, commit_id=turn.id, turn=record
        )
        self._metrics.committed(written, after.state)
        return after

    async def _consolidate(self, turn: OpenTurn | None, base: Resident) -> Resident:
        """Apply what is due, as a commit of its own; a failure leaves it due."""
        id = uuid.uuid4().hex
        with self._metrics.consolidating(base.state.due):
            state, book = await self._apply(turn, Consolidation(id, base.state), base.book)
            after, written = await self._residency.commit(
                base, state, book, commit_id=id, turn=None
            )
        self._metrics.committed(written, after.state)
        if turn is not None:
            turn.put(Kept(after.version))
        return after

    async def _apply(
        self, turn: OpenTurn | None, job: Consolidation, book: Book
    ) -> tuple[State, Book]:
        async with aclosing(self._worker.perform(job)) as facts:
            async for fact in facts:
                match fact:
                    case Learned(consolidated=consolidated, seconds=seconds):
                        at = {**book.learned_at, consolidated.level: time.time()}
                        book = replace(book, learned_at=at)
                        if turn is not None:
                            turn.put(Grown(consolidated, seconds))
                    case Failed(error=error):
                        raise error
                    case Finished(state=state):
                        return state, book
                    case _:
                        pass
        raise AssertionError("a consolidation ends in Finished or Failed")

    # --- its parts ----------------------------------------------------------------------------

    def _new_messages(self, ask: Ask, base: Resident) -> tuple[tuple[Message, ...], int]:
        """Return the messages the session has not read, and the tokens that are skipped."""
        known = known_prefix(base.book, ask.messages) if ask.history else 0
        if known is None:
            raise ApiError(
                409,
                "history_diverged",
                f"the messages begin like session {base.key.session!r} but do not go on from all "
                "that it has read; send only new messages, or use another session",
                param="messages",
            )
        new = ask.messages[known:]
        if ask.instructions and base.book.instructions != _digest(ask.instructions):
            new = (Message(Role.SYSTEM, ask.instructions), *new)
        skipped = sum(len(self._tokenizer.encode(m.text)) for m in ask.messages[:known])
        return new, skipped

    def _job(self, turn: OpenTurn, base: Resident, messages: tuple[Message, ...]) -> Turn:
        ask = turn.ask
        spans = self._spans(base, messages)
        tokens = sum(len(span.ids) for span in spans)
        if tokens > self._limits.input_tokens:
            raise ApiError(
                413,
                "message_too_large",
                f"the input has {tokens} tokens, more than {self._limits.input_tokens}; "
                "send it in several turns, or raise HOPE_MAX_INPUT_TOKENS",
                param="input",
            )
        learn = self._learning and ask.mode is Mode.READ_WRITE and base.key is not _NOBODY
        rates = RATES | dict(ask.rates) if learn else {}
        closing = self._tokenizer.closing() if ask.most else Span(Role.MARKUP, ())
        return Turn(
            id=turn.id,
            state=base.state,
            given=tuple((id, rates.get(span.role, 0.0)) for span in spans for id in span.ids),
            closing=tuple((id, 0.0) for id in closing.ids),
            most=ask.most,
            said_weight=rates.get(Role.ASSISTANT, 0.0),
            sampling=ask.sampling,
            stops=ask.stops,
            learn=learn,
        )

    def _spans(self, base: Resident, messages: tuple[Message, ...]) -> list[Span]:
        if base.state.position or base.state.carry:
            return self._tokenizer.following(messages)
        return self._tokenizer.opening(messages)

    def _ended(
        self,
        turn: OpenTurn,
        after: Resident,
        finished: Finished | None,
        grown: list[Consolidated],
        outcome: Outcome,
        skipped: int = 0,
        base_version: int | None = None,
    ) -> Ended:
        kept = outcome is Outcome.COMMITTED
        moved = [each.level for each in grown if kept and each.outcome is not Update.REJECTED]
        memory = MemoryResult(
            conversation=None if after.key is _NOBODY else after.key.session,
            base_version=after.version if base_version is None else base_version,
            committed_version=after.version if kept else None,
            outcome=outcome,
            durability=self._durability,
            updates=len(moved),
            consolidated_levels=sorted(set(moved)),
            due_levels=sorted({due.level for due in after.state.due}) if kept else [],
            surprise=finished.surprise if finished else None,
        )
        if finished is None:
            return Ended("incomplete", "cancelled", 0, 0, 0, memory)
        reason = finished.reason
        return Ended(
            "completed" if reason is Reason.STOP or not turn.ask.most else "incomplete",
            None
            if reason is Reason.STOP or not turn.ask.most
            else ("cancelled" if reason is Reason.CANCELLED else "max_output_tokens"),
            finished.read,
            skipped,
            finished.said,
            memory,
        )

    def _fail(self, turn: OpenTurn, error: Exception) -> None:
        said = answer(error)
        if said.status >= 500 and said.code != "draining":
            log.error("turn %s failed: %s", turn.id, error, exc_info=said.code == "internal_error")
        else:
            log.info("turn %s refused: %s", turn.id, said.message)
        if turn.ended:  # the turn stands; only its consolidation failed and stays due
            self._metrics.consolidation_failed()
            return
        # an answer of the store is certain; silence is not, and stopping is not asking
        unknown = turn.committing and said.code in ("store_unavailable", "draining")
        if turn.began is not None and not unknown:
            self._metrics.rolled_back("failed")
        version = turn.began.base_version if turn.began else 0
        nothing = Resident(turn.ask.key or _NOBODY, version, State(), Book())
        outcome = Outcome.UNKNOWN if unknown else Outcome.ROLLED_BACK
        ended = self._ended(turn, nothing, None, [], outcome)
        turn.put(replace(ended, status="failed", reason=None, error=said))


def _stopping() -> ApiError:
    return ApiError(503, "draining", "the server is stopping; send the turn again", retry_after=1)


_NOBODY = SessionKey("nobody", "nobody")


def _digest(instructions: str) -> str:
    return link("", Message(Role.SYSTEM, instructions))


class _Queue:
    """Who waits for a session, the one it answers included."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting = 0
