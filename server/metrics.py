"""The only file that knows Prometheus: facts in, counters out.

Labels come from closed sets and are created at start, so that `rate()` works from the first
scrape. No session, user or path ever becomes a label.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from hope_runtime.cadence import Due
from hope_runtime.config import HopeConfig
from hope_runtime.consolidation import Outcome
from hope_runtime.engine import Engine
from hope_runtime.report import (
    Dropped,
    Fact,
    Failed,
    Finished,
    Learned,
    Phase,
    Said,
    Seated,
    Stepped,
)
from hope_runtime.state import State
from memory_store import Committed, Durability, StoreError
from memory_store import errors as store_errors
from server.residency import Residency

CONTENT_TYPE = CONTENT_TYPE_LATEST

FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SLOW = (0.3, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 240, 480, 960)
FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80, 160)
RATIO = (1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1)
NATS = (0.25, 0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
BYTES = tuple(float(1 << n) for n in range(12, 34, 2))

ENDPOINTS = ("responses", "chat_completions")
TRANSPORTS = ("websocket", "http", "sse")
OUTCOMES = ("completed", "incomplete", "cancelled", "failed", "rejected")
CLOSE_CODES = ("1000", "1001", "1005", "1006", "1008", "1009", "1011", "1012", "1013")
STORE_OPS = ("load", "commit", "delete", "scan", "lease")
STORE_OUTCOMES = (
    "ok",
    "dup",
    "conflict",
    "fenced",
    "held",
    "gone",
    "oom",
    "timeout",
    "incomplete",
    "error",
)
LEASE_EVENTS = ("acquired", "renewed", "released", "lost", "refused", "fenced")


class Metrics:
    """The server's metrics, in a registry of their own."""

    def __init__(self, config: HopeConfig) -> None:
        self.registry = CollectorRegistry()
        self._said_at: dict[str, float] = {}
        self._requests(config)
        self._sessions(config)
        self._memory(config)
        self._store()

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _makers(self) -> tuple[partial[Counter], partial[Gauge], partial[Histogram]]:
        return (
            partial(Counter, registry=self.registry),
            partial(Gauge, registry=self.registry),
            partial(Histogram, registry=self.registry),
        )

    # --- requests -----------------------------------------------------------------------------

    def _requests(self, config: HopeConfig) -> None:
        counter, gauge, histogram = self._makers()
        self.requests = counter(
            "hope_requests",
            "Requests by how they ended.",
            ["endpoint", "transport", "outcome", "code"],
        )
        for endpoint in ENDPOINTS:
            for transport in TRANSPORTS:
                for outcome in OUTCOMES:
                    self.requests.labels(endpoint, transport, outcome, "")
        self.in_progress = gauge("hope_requests_in_progress", "Turns being worked on.")
        self.queued = gauge("hope_requests_queued", "Turns waiting for a lane.")
        self.duration = histogram(
            "hope_request_duration_seconds",
            "From request to its terminal event.",
            ["transport", "outcome"],
            buckets=SLOW,
        )
        for transport in TRANSPORTS:
            for outcome in OUTCOMES:
                self.duration.labels(transport, outcome)
        self.queue_seconds = histogram(
            "hope_request_queue_seconds", "From the engine's door to a lane.", buckets=FIRST
        )
        self.first_token = histogram(
            "hope_time_to_first_token_seconds",
            "From request to the first text of the reply.",
            ["session_state"],
            buckets=FIRST,
        )
        for state in ("hot", "warm", "cold", "new"):
            self.first_token.labels(state)
        self.inter_token = histogram(
            "hope_inter_token_seconds", "Between two tokens of a reply.", buckets=FAST
        )
        self.connections = gauge("hope_websocket_connections", "Open sockets.")
        # not hope_websocket_connections_total: OpenMetrics knows one family of a name
        self.opened = counter("hope_websocket_opened", "Sockets accepted.")
        self.closes = counter("hope_websocket_close", "Sockets closed, by code.", ["code"])
        for code in (*CLOSE_CODES, "other"):
            self.closes.labels(code)
        self.auth_failures = counter(
            "hope_auth_failures", "Requests refused at the gate.", ["reason"]
        )
        for reason in ("invalid_api_key", "origin_not_allowed"):
            self.auth_failures.labels(reason)
        self.tokens = counter("hope_tokens", "Tokens by kind.", ["kind"])
        for kind in ("prompt", "generated", "skipped_prefix"):
            self.tokens.labels(kind)
        self.batch = histogram(
            "hope_batch_size",
            "Sessions in one pass.",
            ["phase"],
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
        )
        self.step = histogram(
            "hope_batch_step_seconds", "One pass of the device.", ["phase"], buckets=FAST
        )
        for phase in Phase:
            self.batch.labels(phase)
            self.step.labels(phase)

    @contextmanager
    def request(self, endpoint: str, transport: str) -> Iterator[Request]:
        """Measure one request; say how it ended on what this yields."""
        request = Request(self, endpoint, transport)
        self.in_progress.inc()
        try:
            yield request
        finally:
            self.in_progress.dec()
            request.close()

    def rejected(self, endpoint: str, transport: str, code: str) -> None:
        """Count a request that was refused before it became a turn."""
        self.requests.labels(endpoint, transport, "rejected", code).inc()

    def refused(self, reason: str) -> None:
        self.auth_failures.labels(reason).inc()

    @contextmanager
    def connection(self) -> Iterator[None]:
        self.connections.inc()
        self.opened.inc()
        try:
            yield
        finally:
            self.connections.dec()

    def closed(self, code: int) -> None:
        self.closes.labels(str(code) if str(code) in CLOSE_CODES else "other").inc()

    def skipped(self, tokens: int) -> None:
        self.tokens.labels("skipped_prefix").inc(tokens)

    # --- the engine's facts -------------------------------------------------------------------

    def observe(self, fact: Fact) -> None:
        """Take a fact of the engine."""
        match fact:
            case Stepped(phase=phase, sessions=sessions, tokens=tokens, seconds=seconds):
                self.batch.labels(phase).observe(sessions)
                self.step.labels(phase).observe(seconds)
                if phase is Phase.PREFILL:
                    self.tokens.labels("prompt").inc(tokens)
            case Seated(waited=waited):
                self.queue_seconds.observe(waited)
            case Said(job=job):
                now = time.perf_counter()
                if (before := self._said_at.get(job)) is not None:
                    self.inter_token.observe(now - before)
                self._said_at[job] = now
                self.tokens.labels("generated").inc()
            case Learned(consolidated=c, seconds=seconds):
                self.updates.labels(c.level, c.outcome).inc()
                self.update_seconds.labels(c.level).observe(seconds)
                self.consolidations.labels(c.level, "tokens", c.outcome).inc()
                self.consolidation_seconds.labels(c.level).observe(seconds)
                self.consolidation_tokens.labels(c.level).inc(c.tokens)
                if math.isfinite(c.loss):  # one NaN would stay in the sum for ever
                    self.surprise.labels(c.level).observe(c.loss)
                else:
                    self.nonfinite.labels(c.level).inc()
                if c.outcome is not Outcome.REJECTED:
                    self.norm_ratio.labels(c.level).observe(c.step)
            case Finished(job=job) | Failed(job=job) | Dropped(job=job):
                self._said_at.pop(job, None)

    # --- sessions and memory ------------------------------------------------------------------

    def _sessions(self, config: HopeConfig) -> None:
        counter, gauge, histogram = self._makers()
        self.resident = gauge("hope_sessions_resident", "Sessions held, by tier.", ["tier"])
        for tier in ("device", "host"):
            self.resident.labels(tier)
        self.loads = counter(
            "hope_session_loads", "Sessions brought in for a turn.", ["source", "outcome"]
        )
        self.load_seconds = histogram(
            "hope_session_load_seconds", "Time to bring a session in.", ["source"], buckets=FAST
        )
        for source in ("host", "store", "new"):
            self.loads.labels(source, "ok")
            self.load_seconds.labels(source)
        self.evictions = counter(
            "hope_session_evictions",
            "Sessions dropped from a tier to make room; the store has them.",
            ["from", "reason"],
        )
        self.evictions.labels("host", "budget")
        self.state_bytes = histogram(
            "hope_session_state_bytes",
            "Size of a session's parts when committed.",
            ["level"],
            buckets=BYTES,
        )
        # tokens that wait to be consolidated are all the context of a model without attention
        self._context = "window" if config.attention_blocks else "context"
        parts = [self._context, "memory"] if config.memory_blocks else [self._context]
        for part in (*parts, *(level.name for level in config.levels)):
            self.state_bytes.labels(part)
        self.device_memory = gauge("hope_device_memory_bytes", "Memory by pool.", ["pool"])
        for pool in ("weights", "session_memory"):
            self.device_memory.labels(pool)

    def describe(self, version: str, torch: str, fingerprint: str) -> None:
        self.build_info.labels(version, torch).set(1)
        self.model_info.labels(fingerprint).set(1)

    def watch(self, engine: Engine, residency: Residency, *, weights: int) -> None:
        """Read these at every scrape: they change too often to be told."""
        self.queued.set_function(lambda: engine.waiting)
        self.resident.labels("device").set_function(lambda: engine.seated)
        self.resident.labels("host").set_function(lambda: len(residency))
        self.device_memory.labels("weights").set(weights)
        self.device_memory.labels("session_memory").set(engine.lane_bytes)

    def evicted(self) -> None:
        """Count a session dropped from RAM."""
        self.evictions.labels("host", "budget").inc()

    def loaded(self, source: str, seconds: float) -> None:
        self.loads.labels(source, "ok").inc()
        self.load_seconds.labels(source).observe(seconds)

    def rolled_back(self, reason: str) -> None:
        """Count a turn that had begun and left no trace."""
        self.rollbacks.labels(reason).inc()

    def committed(self, done: Committed, state: State) -> None:
        """Take note of a committed state and of the bytes its commit wrote."""
        self.store_bytes.labels("out").inc(done.written)
        context = state.bytes
        for name, level in state.levels.items():
            self.state_bytes.labels(name).observe(level.bytes)
            context -= level.bytes
        if state.memories is not None:
            self.state_bytes.labels("memory").observe(state.memory_bytes)
            context -= state.memory_bytes
        self.state_bytes.labels(self._context).observe(context)

    def _memory(self, config: HopeConfig) -> None:
        counter, gauge, histogram = self._makers()
        levels = [level.name for level in config.levels]
        self.updates = counter("hope_memory_updates", "Updates of a level.", ["level", "outcome"])
        self.update_seconds = histogram(
            "hope_memory_update_seconds", "One update of a level.", ["level"], buckets=FAST
        )
        self.norm_ratio = histogram(
            "hope_memory_update_norm_ratio",
            "Size of an update over that of the base weights.",
            ["level"],
            buckets=RATIO,
        )
        self.surprise = histogram(
            "hope_memory_surprise",
            "Nats per learnable token before it was learned.",
            ["level"],
            buckets=NATS,
        )
        self.nonfinite = counter(
            "hope_memory_nonfinite", "Updates that were not finite.", ["level"]
        )
        self.rollbacks = counter("hope_memory_rollbacks", "Turns that left no trace.", ["reason"])
        for reason in ("cancelled", "failed"):
            self.rollbacks.labels(reason)
        self.consolidations = counter(
            "hope_consolidations", "Consolidations.", ["level", "trigger", "outcome"]
        )
        self.consolidation_seconds = histogram(
            "hope_consolidation_seconds", "One consolidation.", ["level"], buckets=FAST
        )
        self.consolidation_tokens = counter(
            "hope_consolidation_tokens", "Tokens that were learned from.", ["level"]
        )
        self.backlog = gauge(
            "hope_consolidation_backlog_sessions", "Sessions with a due chunk.", ["level"]
        )
        self.oldest = gauge(
            "hope_consolidation_oldest_pending_seconds",
            "How long the session that has waited longest for a level has waited.",
            ["level"],
        )
        self._pending = {level: Pending() for level in levels}
        for level, pending in self._pending.items():
            self.backlog.labels(level).set_function(pending.count)
            self.oldest.labels(level).set_function(pending.oldest)
        self.failures = counter(
            "hope_consolidation_failures", "Consolidations that stay due after an error."
        )
        for level in levels:
            for outcome in Outcome:
                self.updates.labels(level, outcome)
                self.consolidations.labels(level, "tokens", outcome)
            for metric in (
                self.update_seconds,
                self.norm_ratio,
                self.surprise,
                self.nonfinite,
                self.consolidation_seconds,
                self.consolidation_tokens,
            ):
                metric.labels(level)
        self.build_info = gauge("hope_build_info", "1, with versions.", ["version", "torch"])
        self.model_info = gauge("hope_model_info", "1, with the model.", ["fingerprint"])
        self.draining = gauge("hope_draining", "1 while shutting down.")

    @contextmanager
    def consolidating(self, due: Sequence[Due]) -> Iterator[None]:
        """Count a session as waiting for its levels until this is left."""
        with ExitStack() as stack:
            for level in {each.level for each in due}:
                stack.enter_context(self._pending[level].one())
            yield

    def consolidation_failed(self) -> None:
        self.failures.inc()

    # --- the store ----------------------------------------------------------------------------

    def _store(self) -> None:
        counter, gauge, histogram = self._makers()
        self.store_ops = counter("hope_store_ops", "Operations of the store.", ["op", "outcome"])
        self.store_seconds = histogram(
            "hope_store_op_seconds", "One operation of the store.", ["op"], buckets=FAST
        )
        for op in STORE_OPS:
            self.store_seconds.labels(op)
            for outcome in STORE_OUTCOMES:
                self.store_ops.labels(op, outcome)
        self.store_bytes = counter("hope_store_bytes", "Bytes moved.", ["direction"])
        for direction in ("in", "out"):
            self.store_bytes.labels(direction)
        self.store_up = gauge("hope_store_up", "1 while the store answers.")
        self._uncommitted = Pending()
        self.uncommitted = gauge(
            "hope_store_uncommitted_turns",
            "Versions on their way to the store: what a crash now would roll back.",
        )
        self.uncommitted.set_function(self._uncommitted.count)
        self.oldest_uncommitted = gauge(
            "hope_store_oldest_uncommitted_seconds", "How long the oldest of them is on its way."
        )
        self.oldest_uncommitted.set_function(self._uncommitted.oldest)
        self.durability = gauge(
            "hope_store_durability_info", "1, with what is promised.", ["mode", "policy", "aof"]
        )
        self.evicted_keys = gauge(
            "hope_store_evicted_keys", "Keys that the store's servers threw away: lost sessions."
        )
        self.corrupt = counter("hope_store_corrupt", "Sessions found damaged.")
        self.incompatible = counter(
            "hope_store_incompatible", "Sessions of another model asked for."
        )
        self.regressions = counter(
            "hope_store_version_regressions", "Sessions whose acknowledged versions were lost."
        )
        self.duplicate_turns = counter(
            "hope_duplicate_turns", "Turns that were asked for again and answered from the store."
        )
        self.leases_held = gauge("hope_leases_held", "Sessions this server may write now.")
        self.lease_events = counter("hope_lease_events", "What became of leases.", ["event"])
        for event in LEASE_EVENTS:
            self.lease_events.labels(event)
        self.renew_margin = histogram(
            "hope_lease_renew_margin_seconds",
            "Life that a lease had left when it was renewed.",
            buckets=(*FAST, 20, 30),
        )

    def read(self, stored: int) -> None:
        """Count the bytes of a session that was loaded."""
        self.store_bytes.labels("in").inc(stored)

    def promised(self, durability: Durability) -> None:
        """Tell what the store promises now."""
        self.durability.clear()
        aof = str(durability.aof).lower()
        self.durability.labels(durability.mode, durability.policy, aof).set(1)
        self.evicted_keys.set(durability.evicted)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Count a lease as held until this is left."""
        self.leases_held.inc()
        try:
            yield
        finally:
            self.leases_held.dec()

    def lease(self, event: str) -> None:
        self.lease_events.labels(event).inc()

    def renewed(self, margin: float) -> None:
        self.lease("renewed")
        self.renew_margin.observe(max(margin, 0.0))

    def regressed(self) -> None:
        self.regressions.inc()

    @asynccontextmanager
    async def store_op(self, op: str) -> AsyncIterator[Operation]:
        """Measure one operation of the store and name how it ended."""
        began = time.perf_counter()
        operation = Operation()
        try:
            with self._uncommitted.one() if op == "commit" else nullcontext():
                yield operation
        except StoreError as error:
            operation.outcome = _store_outcome(error)
            self.corrupt.inc(isinstance(error, store_errors.Corrupt))
            self.incompatible.inc(isinstance(error, store_errors.Incompatible))
            if isinstance(error, store_errors.Fenced):
                self.lease("fenced")
            if isinstance(error, store_errors.Unavailable):
                self.store_up.set(0)
            raise
        except asyncio.CancelledError:
            operation.outcome = "error"
            raise
        else:
            self.store_up.set(1)
        finally:
            self.store_ops.labels(op, operation.outcome).inc()
            self.store_seconds.labels(op).observe(time.perf_counter() - began)


@dataclass(slots=True)
class Operation:
    """How an operation of the store ended, as its label."""

    outcome: str = "ok"


class Pending:
    """What is under way, and since when."""

    def __init__(self) -> None:
        self._since: dict[object, float] = {}

    @contextmanager
    def one(self) -> Iterator[None]:
        token = object()
        self._since[token] = time.perf_counter()
        try:
            yield
        finally:
            del self._since[token]

    def count(self) -> int:
        return len(self._since)

    def oldest(self) -> float:
        """Return the age of the oldest in seconds, 0 where there is none."""
        now = time.perf_counter()
        return max((now - since for since in self._since.values()), default=0.0)


class Request:
    """How one request went; `close` writes it down."""

    def __init__(self, metrics: Metrics, endpoint: str, transport: str) -> None:
        self._metrics = metrics
        self._endpoint, self._transport = endpoint, transport
        self._began = time.perf_counter()
        self._spoke = False
        self.outcome, self.code = "failed", "disconnected"
        self.source = "new"  # where the session was before the turn

    def spoke(self) -> None:
        """The first text was sent (later calls do nothing)."""
        if not self._spoke:
            self._spoke = True
            took = time.perf_counter() - self._began
            state = {"host": "warm", "store": "cold"}.get(self.source, "new")
            self._metrics.first_token.labels(state).observe(took)

    def ended(self, outcome: str, code: str = "") -> None:
        self.outcome, self.code = outcome, code

    def close(self) -> None:
        took = time.perf_counter() - self._began
        metrics = self._metrics
        metrics.requests.labels(self._endpoint, self._transport, self.outcome, self.code).inc()
        metrics.duration.labels(self._transport, self.outcome).observe(took)


def _store_outcome(error: StoreError) -> str:
    match error:
        case store_errors.Conflict() | store_errors.Repeated():
            return "conflict"
        case store_errors.Fenced() | store_errors.Regressed():
            return "fenced"
        case store_errors.Held():
            return "held"
        case store_errors.Deleted() | store_errors.NotFound() | store_errors.NoVersion():
            return "gone"
        case store_errors.Full():
            return "oom"
        case store_errors.Unavailable():
            return "timeout"
        case store_errors.Incomplete():
            return "incomplete"
        case _:
            return "error"
