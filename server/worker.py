"""The device thread: the only one that runs torch. Jobs in, facts out, nothing shared.

The event loop submits and cancels; the thread steps the engine while there is work and hands
the facts of each step back to the loop in one call.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from queue import SimpleQueue

from hope_runtime.engine import Consolidation, Engine, Turn
from hope_runtime.report import Dropped, Fact, Failed, Finished, Stepped

log = logging.getLogger(__name__)

Command = Callable[[], None]


class Worker:
    """Owns the engine and its thread: `async with Worker(engine, observe) as worker`."""

    def __init__(self, engine: Engine, observe: Callable[[Fact], None]) -> None:
        self._engine = engine
        self._observe = observe
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        self._jobs: dict[str, asyncio.Queue[Fact]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="hope-device", daemon=True)

    async def __aenter__(self) -> Worker:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    @property
    def running(self) -> int:
        return len(self._jobs)

    async def perform(self, job: Turn | Consolidation) -> AsyncGenerator[Fact, None]:
        """Run a job; yield its facts, the last of which is Finished, Dropped or Failed.

        Closing it early (or being cancelled in it) drops the job.
        """
        facts: asyncio.Queue[Fact] = asyncio.Queue()
        self._jobs[job.id] = facts
        self._commands.put(lambda: self._engine.submit(job))
        try:
            while True:
                fact = await facts.get()
                yield fact
                if isinstance(fact, Finished | Dropped | Failed):
                    return
        finally:
            del self._jobs[job.id]
            self.cancel(job.id, keep=False)  # nothing happens where the job is over

    def cancel(self, job: str, *, keep: bool) -> None:
        """End a job at its next token; with `keep`, what was said so far is the reply."""
        self._commands.put(lambda: self._engine.cancel(job, keep=keep))

    # --- on the device thread -----------------------------------------------------------------

    def _run(self) -> None:
        while self._take_commands():
            if self._engine.idle:
                continue
            try:
                facts = self._engine.step()
            except Exception as error:  # handed over to every job it may concern
                log.exception("a step of the engine failed")
                facts = self._engine.abandon(error)
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._deliver, facts)

    def _take_commands(self) -> bool:
        """Apply what the loop asked for; wait for it when there is nothing else to do."""
        block = self._engine.idle
        while block or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command()
            block = False
        return True

    # --- on the event loop --------------------------------------------------------------------

    def _deliver(self, facts: list[Fact]) -> None:
        for fact in facts:
            self._observe(fact)
            if not isinstance(fact, Stepped) and (queue := self._jobs.get(fact.job)) is not None:
                queue.put_nowait(fact)
