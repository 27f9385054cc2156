"""The engine: many sessions, one batch. Submit jobs, call `step` until `idle`, read the facts.

It owns the lanes and nothing else: a session's state comes in with its job and goes out with
its `Finished`. One thread calls it; it knows no clock but the one it is given, no text but
what the job's tokenizer says, and no wire.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from hope_runtime import sampling
from hope_runtime.cadence import completed, marked, until_boundary
from hope_runtime.consolidation import consolidate, learnable
from hope_runtime.draft import Draft, asked
from hope_runtime.lanes import Lanes
from hope_runtime.layers import recall
from hope_runtime.layers.cms import Deltas
from hope_runtime.layers.recall import LOUD, Facts, Found
from hope_runtime.model import Hope, Read
from hope_runtime.reply import Reply
from hope_runtime.report import (
    Dropped,
    Fact,
    Failed,
    Finished,
    Learned,
    Phase,
    Reason,
    Said,
    Seated,
    Stepped,
)
from hope_runtime.sampling import Sampling
from hope_runtime.state import Mark, Piece, State, compact, extend, trim
from hope_runtime.tokenizer import Tokenizer

READ_ALONE = 256  # tokens read per step while nobody is being answered
READ_SHARED = 64  # and while someone is: a stream may not starve behind a document
READ_LEAST = 16  # of one session, however many read together


class NotFinite(RuntimeError):
    """The session's own model gave numbers that mean nothing; nothing of the turn is kept."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A job: read `given`, then say up to `most` tokens.

    `given` and `closing` are (token, loss weight); closing is the markup that ends the reply,
    read with the next turn. With `learn` off no chunk falls due.
    """

    id: str
    state: State
    given: tuple[tuple[int, float], ...]
    closing: tuple[tuple[int, float], ...]
    most: int
    said_weight: float
    sampling: Sampling
    stops: tuple[str, ...]
    learn: bool
    recalls: bool = True  # what a memory layer knows may answer
    told: tuple[bool, ...] | None = None  # which of `given` may be a fact; None: all that count


@dataclass(frozen=True, slots=True)
class Consolidation:
    """A job: apply the chunks that `state` has due."""

    id: str
    state: State


@dataclass(slots=True, eq=False)
class _Seat:
    """A turn on a lane."""

    turn: Turn
    state: State
    unread: deque[tuple[int, float]]
    deltas: Deltas
    reply: Reply
    source: torch.Generator
    history: list[int] = field(default_factory=list)  # this reply, for the repetition penalty
    hidden: Tensor | None = None  # of the last given token, from which the first word is drawn
    next: int | None = None  # said, not yet read
    told: deque[bool] = field(default_factory=deque)  # of `unread`: may it be a fact?
    telling: list[bool] = field(default_factory=list)  # of what is read now; said: never
    draft: Draft | None = None  # the reply answers from what the memory layer knows
    surprise: float = 0.0
    said: int = 0
    read: int = 0


class Engine:
    """Continuous batching: those who speak sit first, those who still read behind them."""

    def __init__(
        self, model: Hope, tokenizer: Tokenizer, *, lanes: int, clock: Callable[[], float]
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._full_stop = tokenizer.encode(".")[-1:]  # where answers of memory end
        self._lanes = Lanes(model, lanes)
        self._clock = clock
        self._waiting: deque[tuple[Turn, float]] = deque()  # and since when
        self._sleeping: deque[Consolidation] = deque()
        self._seats: list[_Seat] = []
        self._speaking = 0
        self._turn_to_work = 0
        self._cancelled: dict[str, bool] = {}

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._sleeping or self._seats)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def seated(self) -> int:
        return len(self._seats)

    @property
    def lane_bytes(self) -> int:
        return self._lanes.bytes

    def submit(self, job: Turn | Consolidation) -> None:
        """Queue a job; its facts come out of later steps."""
        if isinstance(job, Turn):
            self._waiting.append((job, self._clock()))
        else:
            self._sleeping.append(job)

    def cancel(self, job: str, *, keep: bool) -> None:
        """End a job at the next step; with `keep`, what was said so far is the reply."""
        self._cancelled[job] = keep

    def abandon(self, error: Exception) -> list[Fact]:
        """Drop every job (a pass failed in a way that concerns them all)."""
        jobs = [*(s.turn.id for s in self._seats), *(turn.id for turn, _ in self._waiting)]
        jobs += [c.id for c in self._sleeping]
        self._waiting.clear()
        self._sleeping.clear()
        self._seats.clear()
        self._speaking = 0
        return [Failed(job, error) for job in jobs]

    @torch.no_grad()
    def step(self) -> list[Fact]:
        """Let everyone who speaks say a token, then do one piece of reading or consolidation."""
        facts: list[Fact] = [*self._apply_cancels()]
        facts += self._admit()
        facts += self._speak()
        facts += self._work()
        return facts

    # --- who is where -------------------------------------------------------------------------

    def _admit(self) -> Iterator[Fact]:
        while self._waiting and len(self._seats) < self._lanes.count:
            turn, since = self._waiting[0]  # in line until seated: `abandon` must see it
            told = turn.told if turn.told is not None else [w > 0 for _, w in turn.given]
            self._lanes.load(len(self._seats), turn.state)
            self._seats.append(
                _Seat(
                    turn=turn,
                    state=replace(turn.state, carry=()),
                    unread=deque([*turn.state.carry, *turn.given]),
                    told=deque([*(False for _ in turn.state.carry), *told]),
                    deltas=self._working(turn.state),
                    reply=Reply(self._tokenizer, turn.stops),
                    source=sampling.generator(turn.sampling),
                )
            )
            self._waiting.popleft()
            yield Seated(turn.id, self._clock() - since)

    def _working(self, state: State) -> Deltas:
        """Return the session's deltas as the batch uses them: on the device, in its precision."""
        model = self._model
        return {name: d.to(model.device, model.dtype) for name, d in state.deltas.items()}

    def _promote(self, row: int) -> None:
        """Move a seat that has read everything to the speakers."""
        seats, place = self._seats, self._speaking
        self._lanes.swap(row, place)
        seats[row], seats[place] = seats[place], seats[row]
        self._speaking += 1

    def _leave(self, row: int) -> None:
        """Free a seat; the last speaker, then the last reader, close the gap."""
        if row < self._speaking:
            self._speaking -= 1
            self._move(self._speaking, row)
            row = self._speaking
        self._move(len(self._seats) - 1, row)
        self._seats.pop()

    def _move(self, source: int, target: int) -> None:
        self._lanes.move(source, target)
        self._seats[target] = self._seats[source]

    def _apply_cancels(self) -> Iterator[Fact]:
        cancelled, self._cancelled = self._cancelled, {}
        for job, keep in cancelled.items():
            row = next((i for i, s in enumerate(self._seats) if s.turn.id == job), None)
            if row is not None:
                if keep and self._seats[row].said:
                    yield self._finish(row, Reason.CANCELLED)
                else:
                    self._leave(row)
                    yield Dropped(job)
            elif any(turn.id == job for turn, _ in self._waiting):
                self._waiting = deque(each for each in self._waiting if each[0].id != job)
                yield Dropped(job)

    # --- speaking -----------------------------------------------------------------------------

    def _speak(self) -> list[Fact]:
        if not self._speaking:
            return []
        began = self._clock()
        seats = self._seats[: self._speaking]
        tokens = [seat.next for seat in seats if seat.next is not None]
        weights = [seat.turn.said_weight for seat in seats]
        read = self._pass([[pair] for pair in zip(tokens, weights, strict=True)], 0, seats)
        logits = self._recalled(seats, self._model.logits(read.hidden[:, -1]))
        for row, seat in enumerate(seats):
            self._extend(row, read, row, [(tokens[row], seat.turn.said_weight)])
        facts: list[Fact] = []
        for row in reversed(range(len(seats))):  # from the last, since a leaver changes the rows
            facts += self._say(row, logits[row])
        took = self._clock() - began
        return [*facts, Stepped(Phase.DECODE, len(seats), len(seats), took)]

    def _say(self, row: int, logits: Tensor) -> Iterator[Fact]:
        """Draw the next token of a seat that speaks; it may be its last."""
        seat = self._seats[row]
        if not bool(logits.isfinite().all()):
            yield self._fail(row)
            return
        if seat.draft is not None and seat.draft.over:
            seat.next = None
            yield self._finish(row, Reason.STOP)
            return
        if seat.draft is not None and seat.draft.fixed:
            token = seat.draft.fixed.popleft()
            surprise = sampling.surprise(logits.float().cpu(), token)
        else:
            # what is known is not drawn by chance, nor held against an answer that it says it twice
            how = seat.turn.sampling if seat.draft is None else Sampling(temperature=0.0)
            token, surprise = sampling.sample(logits, seat.history, how, seat.source)
        seat.surprise += surprise
        if token in self._tokenizer.stop_ids:
            seat.next = None
            yield self._finish(row, Reason.STOP)
            return
        seat.said += 1
        seat.next = token
        seat.history.append(token)
        yield Said(seat.turn.id, seat.reply.push(token), surprise)
        if seat.reply.stopped:
            seat.next = None  # the stop string is not part of the reply
            yield self._finish(row, Reason.STOP)
        elif seat.said >= seat.turn.most:
            yield self._finish(row, Reason.LENGTH)

    def _fail(self, row: int) -> Failed:
        job = self._seats[row].turn.id
        self._leave(row)
        return Failed(job, NotFinite("the model's numbers are not finite"))

    def _finish(self, row: int, reason: Reason) -> Finished | Failed:
        seat = self._seats[row]
        turn = seat.turn
        unread = [] if seat.next is None else [(seat.next, turn.said_weight)]
        memories, facts = turn.state.memories, turn.state.facts
        if seat.state.position > turn.state.position:
            memories, facts = self._lanes.memories(row), self._facts(row)
            # what the last token wrote has not been recalled yet: nobody else would see it
            if not all(bool(held.isfinite().all()) for held in (*(memories or ()), *(facts or ()))):
                return self._fail(row)
        self._leave(row)
        state = compact(seat.state, turn.state.position, self._model.config)
        drawn = seat.said + (reason is Reason.STOP and not seat.reply.stopped)
        return Finished(
            turn.id,
            replace(
                state,
                carry=(*unread, *turn.closing),
                memories=memories,
                facts=facts,
                recall_digest=self._digest if facts else "",
            ),
            reason,
            "" if seat.reply.stopped else seat.reply.flush(),
            seat.read,
            seat.said,
            seat.surprise / drawn if drawn else None,
        )

    # --- reading and consolidating ------------------------------------------------------------

    def _work(self) -> list[Fact]:
        """Do one piece of work for one of those who wait for it, in turn."""
        readers = range(self._speaking, len(self._seats))
        count = len(readers) + bool(self._sleeping)
        if not count:
            return []
        self._turn_to_work += 1
        pick = self._turn_to_work % count
        if pick == len(readers):
            return self._sleep()
        row = readers[pick]
        if self._seats[row].state.due:
            return self._consolidate(row)
        return self._read(row)

    def _read(self, row: int) -> list[Fact]:
        """Let the seat at `row`, and the readers beside it, read on together."""
        began = self._clock()
        first, seats = self._readers_around(row)
        parts = self._parts(seats)
        read = self._pass(parts, first, seats)
        facts: list[Fact] = []
        for b, (seat, part) in enumerate(zip(seats, parts, strict=True)):
            seat.hidden = read.hidden[b, len(part) - 1]
            if not bool(read.hidden[b, : len(part)].isfinite().all()):
                facts.append(self._fail(self._seats.index(seat)))
                continue
            self._extend(self._seats.index(seat), read, b, part)
            seat.read += len(part)
            facts += self._begin(self._seats.index(seat))
        took, tokens = self._clock() - began, sum(map(len, parts))
        return [*facts, Stepped(Phase.PREFILL, len(seats), tokens, took)]

    def _readers_around(self, row: int) -> tuple[int, list[_Seat]]:
        """Return the unbroken run of seats around `row` that can read, and its first row."""
        most = (READ_SHARED if self._speaking else READ_ALONE) // READ_LEAST
        first, end = row, row + 1
        while end < len(self._seats) and end - first < most and self._can_read(end):
            end += 1
        while first > self._speaking and end - first < most and self._can_read(first - 1):
            first -= 1
        return first, self._seats[first:end]

    def _can_read(self, row: int) -> bool:
        return not self._seats[row].state.due and bool(self._seats[row].unread)

    def _parts(self, seats: list[_Seat]) -> list[list[tuple[int, float]]]:
        """Take from each seat what it reads now: the same share, up to its next boundary."""
        config = self._model.config
        share = (READ_SHARED if self._speaking else READ_ALONE) // len(seats)
        parts = []
        for seat in seats:
            limit = min(share, len(seat.unread))
            if config.attention_blocks:
                limit = min(limit, config.window)
            if seat.turn.learn or config.memory_blocks:
                levels = seat.state.under(config)
                limit = min(limit, until_boundary(seat.state.position, levels) or limit)
            parts.append([seat.unread.popleft() for _ in range(limit)])
            seat.telling = [seat.told.popleft() for _ in range(limit)]
        return parts

    def _begin(self, row: int) -> Iterator[Fact]:
        """Once all is read and consolidated, draw the first token, or end a turn that has none."""
        seat = self._seats[row]
        if seat.unread or seat.state.due or seat.hidden is None:
            return
        if not seat.turn.most:
            yield self._finish(row, Reason.LENGTH)
            return
        seat.telling = []
        self._promote(row)
        row = self._speaking - 1
        self._begin_draft(row)
        yield from self._say(row, self._model.logits(seat.hidden))

    def _consolidate(self, row: int) -> list[Fact]:
        seat = self._seats[row]
        try:
            seat.state, learned = self._update(seat.turn.id, seat.state)
            seat.deltas = self._working(seat.state)
        except RuntimeError as error:  # torch's, out of memory among them: it concerns one session
            self._leave(row)
            return [Failed(seat.turn.id, error)]
        return [learned, Stepped(Phase.UPDATE, 1, 0, learned.seconds), *self._begin(row)]

    def _sleep(self) -> list[Fact]:
        job = self._sleeping[0]
        if not job.state.due:
            self._sleeping.popleft()
            return [Finished(job.id, job.state, Reason.STOP, "", 0, 0, None)]
        try:
            state, learned = self._update(job.id, job.state)
        except RuntimeError as error:
            self._sleeping.popleft()
            return [Failed(job.id, error)]
        self._sleeping.popleft()
        facts: list[Fact] = [learned, Stepped(Phase.UPDATE, 1, 0, learned.seconds)]
        if state.due:
            self._sleeping.append(replace(job, state=state))
        else:
            facts.append(Finished(job.id, state, Reason.STOP, "", 0, 0, None))
        return facts

    def _update(self, job: str, state: State) -> tuple[State, Learned]:
        began = self._clock()
        state, consolidated = consolidate(self._model, state)
        return state, Learned(job, consolidated, self._clock() - began)

    # --- one pass -----------------------------------------------------------------------------

    def _pass(
        self, parts: Sequence[Sequence[tuple[int, float]]], first: int, seats: list[_Seat]
    ) -> Read:
        """Read each seat's (token, loss weight)s; `first` is the lane of the first of them.

        Shorter rows are filled up: a filler comes after the row's own tokens, which therefore
        cannot see it, and is not written to the lane.
        """
        model = self._model
        lengths = [len(part) for part in parts]
        longest = max(lengths)
        filled = torch.tensor(
            [[token for token, _ in part] + [0] * (longest - len(part)) for part in parts]
        )
        positions = [seat.state.position for seat in seats]
        start = torch.tensor(positions, device=model.device)
        past = self._lanes.view(first, first + len(seats), max(positions))
        filled = filled.to(model.device)
        x = model.embed(filled)
        filled_up = min(lengths) < max(lengths)
        own = torch.tensor(lengths, device=model.device) if filled_up else None
        read = model.run(x, start, past, [seat.deltas for seat in seats], lengths=own)
        self._lanes.append(first, start, read, lengths)
        if (held := self._lanes.facts(first, first + len(seats))) is not None:
            stated = torch.zeros(filled.shape, dtype=torch.bool)
            for row, (seat, part) in enumerate(zip(seats, parts, strict=True)):
                if seat.turn.learn and seat.telling:
                    stated[row, : len(part)] = torch.tensor(seat.telling)
            facts = model.state_facts(held, read, filled, stated.to(model.device), own)
            self._lanes.keep_facts(first, facts)
        return read

    # --- answering from what the memory layer knows -----------------------------------------------

    @property
    def _digest(self) -> str:
        recall = self._model.config.recall
        return recall.digest if recall else ""

    def _facts(self, row: int) -> Facts | None:
        """Return what a session's memory layer holds now, in host memory."""
        held = self._lanes.facts(row, row + 1)
        return held and Facts(*(t.cpu() for t in held.session(0)))

    def _begin_draft(self, row: int) -> None:
        """See whether the user asks for something about himself, and whether it is known."""
        seat, config = self._seats[row], self._model.config.recall
        held = self._lanes.facts(row, row + 1)
        if held is None or config is None or not seat.turn.recalls:
            return
        if not bool(held.matrix.any()):
            return  # nothing was ever told: the base answers as it can
        found = self._found(held)

        @cache
        def known() -> float:
            return float(self._model.familiar(self._model.likeness(found.read[:, 0]), held.matrix))

        if asked(config, float(found.asks[0, 0]), known):
            seat.draft = Draft(config, known(), self._tokenizer.encode)

    def _recalled(self, seats: list[_Seat], logits: Tensor) -> Tensor:
        """Return logits with what memory says to those who answer from it."""
        rows = [
            row
            for row, seat in enumerate(seats)
            if seat.draft is not None and seat.draft.recalls and not seat.draft.fixed
        ]
        held = self._lanes.facts(0, len(seats))
        if not rows or held is None:
            return logits
        found = self._found(Facts(*(t[rows] for t in held)))
        alike = self._model.likeness(found.read[:, 0])
        said = [id for row in rows if (id := seats[row].next) is not None]
        texts = [self._tokenizer.decode([id]) for id in said]
        for at, (id, text) in enumerate(zip(said, texts, strict=True)):
            if not text[-1:].isdigit():
                alike[at, id] = -1.0  # read again where nothing comes next; none has it twice
        stop = logits[rows, self._full_stop[0]]  # as the base would have it
        leads = (self._model.recalled(logits[rows], alike).amax(-1) - stop).tolist()
        logits[rows] = self._model.recalled(logits[rows], alike, LOUD)
        best = alike.argmax(-1).tolist()
        for row, id, text, lead, likely in zip(rows, said, texts, leads, best, strict=True):
            draft = seats[row].draft
            assert draft is not None
            draft.see(lead, text, self._tokenizer.decode([id, likely]).removeprefix(text))
        return logits

    def _found(self, held: Facts) -> Found:
        assert self._model.recall is not None
        return recall.last(self._model.recall, held)

    def _extend(self, row: int, read: Read, b: int, part: list[tuple[int, float]]) -> None:
        """Add what row `b` of a pass read to a seat's state, and the chunks that it completed."""
        seat = self._seats[row]
        config = seat.state.under(self._model.config)
        start, n = seat.state.position, len(part)
        piece = Piece(
            start,
            torch.tensor([token for token, _ in part]),
            torch.tensor([weight for _, weight in part], dtype=torch.float32),
            read.keys[:, b, :, :n].cpu(),
            read.values[:, b, :, :n].cpu(),
            read.inputs[b, :n].cpu(),
        )
        state = extend(seat.state, piece, config)
        if state.position in marked(state.position, (), config):
            state = replace(state, marks=(*state.marks, self._mark(row, state.position)))
        if seat.turn.learn:
            due = completed(start, start + n, config)
            found = tuple(each for each in due if learnable(state, each))
            state = replace(state, due=(*state.due, *found))
        seat.state = trim(state, config)

    def _mark(self, row: int, position: int) -> Mark:
        config = self._model.config
        memories = self._lanes.memories(row)
        assert memories is not None
        below = sum(i < config.first_level_block for i in config.memory_blocks)
        return Mark(position, memories.blocks(below))
