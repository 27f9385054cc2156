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
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

from hope_runtime.consolidation import Consolidated
from hope_runtime.consolidation import Outcome as Update
from hope_runtime.engine import Consolidation, Turn
from hope_runtime.report import Dropped, Failed, Finished, Learned, Reason, Said
from hope_runtime.state import State
from hope_runtime.tokenizer import Message, Role, Tokenizer
from memory_store import (
    Committed,
    Deleted,
    Durability,
    MemoryStore,
    SessionKey,
    StoreError,
    Unavailable,
)
from server.book import Book, digest
from server.errors import ApiError, answer
from server.metrics import Metrics
from server.open_turn import OpenTurn
from server.prompt import Prompter
from server.queues import Queues
from server.record import record, replayed
from server.residency import NOBODY, Found, Residency, Resident
from server.tenure import Hold, Tenures
from server.turn import Ask, Began, Ended, Grown, Kept, Words
from server.wire import METADATA_KEYS, MemoryResult, Mode, Outcome
from server.worker import Worker

log = logging.getLogger(__name__)

WHY_NOT_DURABLE = (
    "the store ({0.engine}, durability {0.mode}) cannot say when a turn is on disk: that takes "
    "WAITAOF (Valkey, or Redis 7.2 with appendonly yes) or appendfsync always"
)


@dataclass(frozen=True, slots=True)
class Limits:
    input_tokens: int
    waiting: int


class Turns:
    """Everything a turn needs, put together once."""

    def __init__(
        self,
        worker: Worker,
        store: MemoryStore,
        residency: Residency,
        tenures: Tenures,
        tokenizer: Tokenizer,
        metrics: Metrics,
        *,
        limits: Limits,
        learning: bool,
        promised: Callable[[], Durability],
    ) -> None:
        self._worker = worker
        self._store = store
        self._residency = residency
        self._tenures = tenures
        self._prompter = Prompter(
            tokenizer, residency.config, most=limits.input_tokens, learning=learning
        )
        self._metrics = metrics
        self._promised = promised
        self._queues = Queues(limits.waiting)
        self._tasks: dict[asyncio.Task[None], OpenTurn] = {}
        self.draining = False

    def start(self, ask: Ask) -> OpenTurn:
        """Begin a turn; it goes on until it ends or is cancelled, whoever listens.

        Raises:
            ApiError: 503 `draining`; 400 `durability_unavailable`.
        """
        if self.draining:
            raise _stopping()
        if ask.durable:
            _check_durable(self._promised())
        turn = OpenTurn(ask, lambda job, keep: self._worker.cancel(job, keep=keep))
        task = asyncio.create_task(self._run(turn), name=f"turn-{turn.id}")
        self._tasks[task] = turn
        task.add_done_callback(self._over)
        return turn

    def _over(self, task: asyncio.Task[None]) -> None:
        turn = self._tasks.pop(task)
        if not turn.over:  # cancelled before it took its first step
            self._fail(turn, _why(turn))
            turn.put(None)

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

    def expel(self, key: SessionKey) -> None:
        """End every turn of a session that was deleted, and forget it."""
        self._end(lambda ask: ask.key == key)
        self._residency.forget(key)

    def expel_user(self, tenant: str, user: str) -> None:
        """End every turn that a person asked for, in sessions that may not exist yet."""
        self._end(lambda ask: ask.user == user and ask.key is not None and ask.key.tenant == tenant)

    def _end(self, concerned: Callable[[Ask], bool]) -> None:
        for task, turn in self._tasks.items():
            if concerned(turn.ask):
                turn.deleted = True
                task.cancel()

    @asynccontextmanager
    async def writing(self, key: SessionKey) -> AsyncIterator[Hold]:
        """Hold the session here and everywhere: no turn runs meanwhile.

        Raises:
            ApiError: 409 `session_busy` behind a full queue.
            StoreError: its lease cannot be had, or was lost.
        """
        async with self._queues.alone(key), self._tenures.hold(key) as hold:
            yield hold

    # --- one turn -----------------------------------------------------------------------------

    async def _run(self, turn: OpenTurn) -> None:
        ask = turn.ask
        try:
            if ask.key is None or ask.mode is Mode.OFF:
                nobody = Found(Resident(NOBODY, 0, State(), Book()), "new")
                await self._perform(turn, nobody, None)
            elif ask.mode is Mode.READ_ONLY:
                async with self._queues.alone(ask.key):
                    found = await self._timed(self._residency.look(ask.key))
                    if found.resident.state.due and not found.resident.book.frozen:
                        found = await self._woken(ask.key, found)
                    await self._perform(turn, found, None)
            else:
                async with self.writing(ask.key) as hold:
                    await self._write(turn, hold)
        except asyncio.CancelledError:
            self._fail(turn, _why(turn))
            raise
        except Exception as error:
            self._fail(turn, error)
        finally:
            turn.put(None)

    async def _write(self, turn: OpenTurn, hold: Hold) -> None:
        """Have the turn, and consolidate what it left due; or tell what became of it before."""
        if await self._replayed(turn, hold):
            return
        found = await self.current(hold)
        # the store may have lost the turn, and have got it back from RAM only now
        if found.recovered is not None and await self._replayed(turn, hold, found.recovered):
            return
        after = await self._perform(turn, found, hold)
        if after is not None and after.state.due and not self.draining:
            await self._consolidate(turn, after, hold)

    async def current(self, hold: Hold) -> Found:
        """Return the session as it stands, with nothing due, to be written (see `writing`)."""
        found = await self._timed(self._residency.get(hold.lease))
        resident = found.resident
        # a server may have stopped between a turn and its consolidation
        if resident.state.due and not resident.book.frozen:
            found = replace(found, resident=await self._consolidate(None, resident, hold))
        return found

    async def _woken(self, key: SessionKey, found: Found) -> Found:
        """Apply what an earlier turn left due before somebody only looks; if it can be had now."""
        try:
            async with self._tenures.hold(key) as hold:
                return await self.current(hold)
        except StoreError as error:
            log.info("session %s is read with chunks due: %s", key, error)
            return found

    async def _timed(self, loading: Awaitable[Found]) -> Found:
        began = time.perf_counter()
        found = await loading
        self._metrics.loaded(found.source, time.perf_counter() - began)
        return found

    async def _replayed(self, turn: OpenTurn, hold: Hold, recovered: str | None = None) -> bool:
        """Answer a turn that was committed before under its id; it is not learned again."""
        ask, key = turn.ask, hold.lease.key
        if not ask.turn_id:
            return False
        found = await self._store.turn(key, ask.turn_id)
        if found is None:
            return False
        promised = self._promised()
        before = replayed(found, durability=promised.mode, durable=None, recovered=recovered)
        if before is None:
            return False
        if found.payload["asked"] != ask.digest:
            raise ApiError(
                409,
                "turn_id_reused",
                f"turn {ask.turn_id!r} of session {key.session!r} asked something else before; "
                "a new turn needs a new turn_id (or event_id)",
                param="turn_id",
            )
        self._metrics.duplicate_turns.inc()
        text, ended = before
        if ask.durable:
            confirmed = await self._residency.confirm(hold.lease, durable=promised.waits)
            durable = confirmed or promised.mode == "always"
            memory = ended.memory.model_copy(update={"durable": durable})
            ended = replace(ended, memory=memory)
        turn.put(Began(ended.memory.base_version, "host"))
        if text:
            turn.put(Words(text))
        turn.put(ended)
        return True

    async def _perform(self, turn: OpenTurn, found: Found, hold: Hold | None) -> Resident | None:
        """Read, answer, commit; return the session as committed, if it was."""
        ask, base = turn.ask, found.resident
        self._check(ask, base)
        # encoding a long text takes long enough to be felt in everybody's stream
        new, skipped = await asyncio.to_thread(self._prompter.unread, ask, base)
        job = await asyncio.to_thread(self._prompter.job, turn.id, ask, base, new)
        self._metrics.skipped(skipped)
        turn.put(Began(base.version, found.source))
        grown: list[Consolidated] = []
        finished = None if turn.cancelled else await self._answer(turn, job, grown)
        if finished is None or turn.dropped:
            self._metrics.rolled_back("cancelled")
            result = self._result(base, base, None, grown, Outcome.ROLLED_BACK, found.recovered)
            turn.put(_ended(turn, None, 0, result))
            return None
        if finished.text:
            turn.put(Words(finished.text))
        if hold is None or base.book.frozen:
            outcome = Outcome.OFF if base.key is NOBODY else Outcome.READ_ONLY
            result = self._result(base, base, finished, grown, outcome, found.recovered)
            turn.put(_ended(turn, finished, skipped, result))
            return None
        ended = _ended(
            turn,
            finished,
            skipped,
            self._result(
                base,
                replace(base, version=base.version + 1, state=finished.state),
                finished,
                grown,
                Outcome.COMMITTED,
                found.recovered,
            ),
        )
        after, done = await self._commit(turn, hold, base, new, finished, ended, grown)
        confirmed = done.durable or self._promised().mode == "always" if ask.durable else None
        memory = ended.memory.model_copy(
            update={"committed_version": after.version, "durable": confirmed}
        )
        turn.put(Kept(after.version))
        turn.put(replace(ended, memory=memory))
        return after

    def _check(self, ask: Ask, base: Resident) -> None:
        if ask.fresh and self._residency.config.memory_blocks:
            raise ApiError(
                400,
                "invalid_request",
                "this model's blocks remember what they read, and it has no window apart from "
                "them; begin another session",
                param="memory.window",
            )
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
        if ask.user is not None and base.owner not in (None, ask.user):
            raise ApiError(
                409,
                "user_mismatch",
                f"session {base.key.session!r} belongs to another user than {ask.user!r}; "
                "give every user sessions of their own",
                param="user",
            )

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
        hold: Hold,
        base: Resident,
        new: tuple[Message, ...],
        finished: Finished,
        ended: Ended,
        grown: list[Consolidated],
    ) -> tuple[Resident, Committed]:
        book = base.book
        messages = [*new, Message(Role.ASSISTANT, turn.text)] if turn.ask.most else [*new]
        for message in messages:
            book = book.with_item(message)
        if turn.ask.instructions:
            book = replace(book, instructions=digest(turn.ask.instructions))
        now = time.time()
        book = replace(
            book,
            turns=book.turns + 1,
            surprise=finished.surprise,
            learned_at={**book.learned_at, **dict.fromkeys((each.level for each in grown), now)},
            metadata={**book.metadata, **dict(turn.ask.metadata)},
        )
        kept = record(
            turn.ask.turn_id or turn.id,
            turn.ask,
            messages,
            str(finished.reason),
            turn.text,
            ended,
        )
        turn.committing = True
        with hold.deciding():
            after, done = await self._residency.commit(
                base,
                finished.state,
                book,
                lease=hold.lease,
                commit_id=turn.id,
                turns=(kept,),
                owner=turn.ask.user,
                durable=turn.ask.durable and self._promised().waits,
            )
        self._metrics.committed(done, after.state)
        return after, done

    async def _consolidate(self, turn: OpenTurn | None, base: Resident, hold: Hold) -> Resident:
        """Apply what is due, as a commit of its own; a failure leaves it due."""
        id = uuid.uuid4().hex
        with self._metrics.consolidating(base.state.due):
            state, book = await self._apply(turn, Consolidation(id, base.state), base.book)
            with hold.deciding():
                after, done = await self._residency.commit(
                    base, state, book, lease=hold.lease, commit_id=id
                )
        self._metrics.committed(done, after.state)
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

    def _result(
        self,
        base: Resident,
        after: Resident,
        finished: Finished | None,
        grown: list[Consolidated],
        outcome: Outcome,
        recovered: str | None = None,
    ) -> MemoryResult:
        kept = outcome is Outcome.COMMITTED
        moved = [each.level for each in grown if kept and each.outcome is not Update.REJECTED]
        return MemoryResult(
            conversation=None if base.key is NOBODY else base.key.session,
            base_version=base.version,
            committed_version=after.version if kept else None,
            outcome=outcome,
            durability=self._promised().mode,
            updates=len(moved),
            consolidated_levels=sorted(set(moved)),
            due_levels=sorted({due.level for due in after.state.due}) if kept else [],
            surprise=finished.surprise if finished else None,
            recovered=recovered,
        )

    def _fail(self, turn: OpenTurn, error: Exception) -> None:
        said = answer(error)
        if said.status >= 500 and said.code != "draining":
            log.error("turn %s failed: %s", turn.id, error, exc_info=said.code == "internal_error")
        else:
            log.info("turn %s refused: %s", turn.id, said.message)
        if isinstance(error, Deleted) and turn.ask.key is not None:
            self._residency.forget(turn.ask.key)
        if turn.ended:  # the turn stands; only its consolidation failed and stays due
            self._metrics.consolidation_failed()
            return
        # an answer of the store is certain; its silence is not, nor is anything else that came
        # between the commit and its answer
        certain = isinstance(error, StoreError) and not isinstance(error, Unavailable)
        unknown = turn.committing and not certain
        if turn.began is not None and not unknown:
            self._metrics.rolled_back("failed")
        version = turn.began.base_version if turn.began else 0
        nothing = Resident(turn.ask.key or NOBODY, version, State(), Book())
        outcome = Outcome.UNKNOWN if unknown else Outcome.ROLLED_BACK
        result = self._result(nothing, nothing, None, [], outcome)
        turn.put(Ended("failed", None, 0, 0, 0, result, said))


def can_wait(promised: Durability) -> bool:
    """Tell whether a commit can wait until it is on disk."""
    return promised.waits or promised.mode == "always"


def _check_durable(promised: Durability) -> None:
    if not can_wait(promised):
        why = WHY_NOT_DURABLE.format(promised)
        raise ApiError(
            400, "durability_unavailable", f"{why}; leave memory.wait out", param="memory.wait"
        )


def _ended(turn: OpenTurn, finished: Finished | None, skipped: int, memory: MemoryResult) -> Ended:
    if finished is None:
        return Ended("incomplete", "cancelled", 0, 0, 0, memory)
    counts = (finished.read, skipped, finished.said)
    if finished.reason is Reason.STOP or not turn.ask.most:
        return Ended("completed", None, *counts, memory)
    cut = finished.reason is Reason.CANCELLED
    return Ended("incomplete", "cancelled" if cut else "max_output_tokens", *counts, memory)


def _why(turn: OpenTurn) -> Exception:
    """Return why a turn was cut off."""
    if turn.deleted and turn.ask.key is not None:
        return Deleted(turn.ask.key.session)
    return _stopping()


def _stopping() -> ApiError:
    return ApiError(503, "draining", "the server is stopping; send the turn again", retry_after=1)
