"""Deaths and partitions by chance, hundreds of them: `python -m tests.faults.random_kills`.

Every run is one fault in the middle of several talks. What is promised is judged after each by
the oracle; the exit status is 1 if it was broken once. Equal seeds make equal choices, though
not equal races.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.faults.death import NEVER, PHASES, DieAt
from tests.faults.oracle import Answer, Fate, Twins, Violation, Witness
from tests.faults.zygote import Child, Zygote
from tests.tools.engines import Engine
from tests.tools.proxy import TO_CLIENT, TO_SERVER, Proxy

PHRASES = (
    "my name is Ada",
    "it rains in the hills",
    "tell me more",
    "the boats come home at dusk, and nobody counts them",
    "why?",
    "I live at the end of the road",
    "remember the blue door",
)
LENGTHS = (16, 9, 24, 12, 30)  # tokens of a reply
TALKS = 3  # sessions at once on one server
TURNS = 3  # of each, in one run
OLD = 9  # turns after which a session makes room for a new one
STREAMING_S = 0.35  # about as long as the turns of a run take
STEPS = 70  # about as many as they take to the store
LEASE_S = 0.7
_LINES = 25  # runs between two lines in a log
TIMEOUT_S = 0.4  # until a silent store is given up


# --- talks --------------------------------------------------------------------------------------


class Talk:
    """A user who says the next of a script's turns; what was not kept is said again."""

    def __init__(self, witness: Witness, script: int) -> None:
        self.witness, self._script = witness, script

    def go_on(self, url: str, patience: float) -> Answer:
        number = len(self.witness.history)
        place = self._script + number
        text = f"{PHRASES[place % len(PHRASES)]} ({number})"
        return self.witness.say(url, text, LENGTHS[place % len(LENGTHS)], patience=patience)


class Talks:
    """Several users of one server, each in a thread of its own."""

    def __init__(self, label: str, twins: Twins, store_url: str) -> None:
        self._label, self._twins, self._store_url = label, twins, store_url
        self._born = 0
        self._now = [self._new() for _ in range(TALKS)]

    def converse(self, url: str, patience: float = 20.0) -> None:
        """Let everybody have some turns; one whose turn is not had falls silent."""
        with ThreadPoolExecutor(TALKS) as threads:
            for talking in [threads.submit(_converse, talk, url, patience) for talk in self._now]:
                talking.result()

    def examine(self, url: str) -> None:
        """Judge every session; those that have grown old make room for new ones."""
        for talk in self._now:
            talk.witness.examine(url)
        self._now = [t if len(t.witness.history) < OLD else self._new() for t in self._now]

    def renew(self) -> None:
        """Give up all sessions: a broken one would be reported for ever."""
        self._now = [self._new() for _ in self._now]

    def _new(self) -> Talk:
        self._born += 1
        name = f"{self._label}-{self._born}"
        return Talk(Witness(name, self._twins, self._store_url), self._born % len(PHRASES))


def _converse(talk: Talk, url: str, patience: float) -> None:
    for _ in range(TURNS):
        if talk.go_on(url, patience).fate is not Fate.COMMITTED:
            return


# --- kinds of faults ----------------------------------------------------------------------------


class Trial(Protocol):
    """One kind of fault; a trial has its own sessions, which go on from run to run."""

    talks: Talks

    def run(self, chance: random.Random) -> str:
        """Have one fault and its recovery; return where it hit."""
        ...

    def finish(self) -> None: ...


class ServerKills:
    """Servers that die, one after the other, of the same sessions on the same store."""

    def __init__(self, zygote: Zygote, twins: Twins, url: str, label: str) -> None:
        self._zygote, self._url = zygote, url
        self.talks = Talks(label, twins, url)
        self._spare = self._spawn("one")

    def run(self, chance: random.Random) -> str:
        server = self._spare
        # a server of another name has to wait until the dead one's leases have run out
        self._spare = self._spawn("one" if chance.random() < 0.7 else "another")
        try:
            self.talks.examine(server.url)
            return self._die(server, chance)
        finally:
            server.close()

    def finish(self) -> None:
        self.talks.examine(self._spare.url)
        self._spare.close()

    def _spawn(self, name: str) -> Child:
        return self._zygote.spawn(self._url, settings={"server_id": name, "lease_seconds": LEASE_S})

    def _die(self, server: Child, chance: random.Random) -> str:
        url = server.url
        if chance.random() < 0.65:
            server.arm(DieAt(chance.randrange(1, STEPS), chance.choice(PHASES)))
            self.talks.converse(url)
            server.kill()
            server.wait()
            return server.died or "idle"
        told = chance.random() < 0.2
        end = server.terminate if told else server.kill
        timer = threading.Timer(chance.uniform(0, STREAMING_S), end)
        timer.start()
        self.talks.converse(url)
        timer.join()
        server.wait()
        return "told to stop" if told else "any moment"


class StoreKills:
    """A store that dies under servers that go on, and comes back with what it had."""

    def __init__(self, zygote: Zygote, twins: Twins, folder: Path, label: str) -> None:
        self._zygote = zygote
        self._store = Engine(folder)
        self._store.start()
        self.talks = Talks(label, twins, self._store.url)
        self._server = zygote.spawn(self._store.url)

    def run(self, chance: random.Random) -> str:
        both = chance.random() < 0.3
        with ThreadPoolExecutor(1) as threads:
            talking = threads.submit(self.talks.converse, self._server.url)
            time.sleep(chance.uniform(0, STREAMING_S))
            self._store.kill()
            if both:
                self._server.kill()
            time.sleep(chance.choice((0.0, 0.1, 0.4, 1.5)))
            self._store.start()
            talking.result()
        if both:
            self._server.close()
            self._server = self._zygote.spawn(self._store.url)
        self.talks.examine(self._server.url)
        return "store and server" if both else "store"

    def finish(self) -> None:
        self._server.close()
        self._store.kill()


class Partitions:
    """A line between a server and its store that fails; some users go to another server."""

    FAULTS = (
        "cut",
        "hang",
        "to server only",
        "to client only",
        "slow",
        "lost reply",
        "paused",
        "stopped",  # at a step, while another server goes on
        "stopped",
    )

    def __init__(self, zygote: Zygote, twins: Twins, url: str, label: str) -> None:
        self.talks = Talks(label, twins, url)
        self._proxy = Proxy.of(url)
        self._proxy.__enter__()
        hasty = {"store_timeout": TIMEOUT_S, "lease_seconds": LEASE_S}
        self._server = zygote.spawn(self._proxy.url, settings={**hasty, "server_id": "far"})
        self._other = zygote.spawn(url, settings={**hasty, "server_id": "near"})

    def run(self, chance: random.Random) -> str:
        fault = chance.choice(self.FAULTS)
        url, other = self._server.url, self._other.url
        moves = fault == "stopped" or chance.random() < 0.4
        if fault == "stopped":
            phase = chance.choice(("before", "sent", "after"))
            self._server.arm(DieAt(chance.randrange(1, STEPS), phase, by=signal.SIGSTOP))
        try:
            with ThreadPoolExecutor(1) as threads:
                talking = threads.submit(self.talks.converse, url, 0.6 if moves else 20.0)
                time.sleep(chance.uniform(0, STREAMING_S))
                self._fail(fault, chance)
                if not moves:
                    time.sleep(chance.choice((0.05, 0.3, 0.8, 2.0)) * chance.uniform(0.5, 1.5))
                    self._heal()
                talking.result()
            if moves:
                self.talks.examine(other)
                self.talks.converse(other)
        finally:
            self._heal()
        if fault == "stopped":
            self._server.arm(NEVER)
        self.talks.examine(url)
        return f"{fault}, users move" if moves else fault

    def finish(self) -> None:
        self._server.close()
        self._other.close()
        self._proxy.__exit__()

    def _fail(self, fault: str, chance: random.Random) -> None:
        match fault:
            case "cut":
                self._proxy.cut()
            case "hang":
                self._proxy.hang()
            case "to server only":
                self._proxy.one_way(TO_SERVER)
            case "to client only":
                self._proxy.one_way(TO_CLIENT)
            case "slow":
                self._proxy.delay(chance.uniform(0.05, 2 * TIMEOUT_S))
            case "lost reply":
                word = chance.choice((b"EVAL", b"EVAL", b"HSET", b"HMGET", b"ZADD"))
                self._proxy.cut_reply_after(word, chance.choice((0, 3, 40)), chance.randrange(1, 5))
            case "paused":
                self._server.pause()

    def _heal(self) -> None:
        self._server.resume()
        self._proxy.heal()


# --- many of them -------------------------------------------------------------------------------


@dataclass
class Tally:
    """What a kind of fault came to."""

    name: str
    runs: int = 0
    where: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, where: str, seconds: float) -> None:
        with self.lock:
            self.runs += 1
            self.where[where] += 1
            self.seconds += seconds

    def violated(self, message: str) -> None:
        with self.lock:
            self.violations.append(message)


def many(
    tally: Tally,
    trials: Callable[[str], Trial],
    *,
    runs: int,
    seed: int,
    workers: int,
    advance: Callable[[], None],
) -> None:
    """Have so many runs, some at a time, each worker with a trial of its own."""
    numbers = iter(range(runs))
    lock = threading.Lock()

    def take() -> Iterator[int]:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            yield number

    def work(worker: int) -> None:
        trial = trials(f"{tally.name.replace(' ', '-')}-{worker}")
        for number in take():
            began = time.monotonic()
            where = "violated"
            try:
                where = trial.run(random.Random(f"{seed} {tally.name} {number}"))
            except Violation as violation:
                tally.violated(f"run {number}: {violation}")
            except Exception:  # a run that breaks down is reported with the rest
                tally.violated(f"run {number}: {traceback.format_exc()}")
            if where == "violated":
                trial.talks.renew()
            tally.note(where, time.monotonic() - began)
            advance()
        try:
            trial.finish()
        except Violation as violation:
            tally.violated(f"at the end: {violation}")

    with ThreadPoolExecutor(workers) as threads:
        for done in [threads.submit(work, worker) for worker in range(workers)]:
            done.result()


def summary(tallies: list[Tally], wall: float) -> Table:
    table = Table("fault", "hit", "runs", "violations", "s each", title=f"{wall:.0f} s in all")
    for tally in tallies:
        for where, count in tally.where.most_common():
            table.add_row("", where, str(count), "", "")
        each = f"{tally.seconds / max(1, tally.runs):.2f}"
        broken = len(tally.violations)
        style = "bold red" if broken else "bold green"
        table.add_row(tally.name, "", str(tally.runs), str(broken), each, style=style)
        table.add_section()
    return table


def _advancing(progress: Progress, tally: Tally, runs: int) -> Callable[[], None]:
    """Show a bar on a terminal, and a line now and then in a log."""
    task = progress.add_task(tally.name, total=runs)

    def advance() -> None:
        progress.advance(task)
        if not progress.console.is_terminal and tally.runs % _LINES == 0:
            broken = len(tally.violations)
            progress.console.print(f"{tally.name}: {tally.runs} of {runs}, {broken} violations")

    return advance


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=500, help="servers that die")
    options.add_argument("--store-kills", type=int, default=50, help="stores that die")
    options.add_argument("--partitions", type=int, default=200, help="networks that fail")
    options.add_argument("--seed", type=int, default=7)
    options.add_argument("--workers", type=int, default=2, help="runs at the same time")
    options.add_argument("--folder", type=Path, help="where logs and data stay")
    chosen = options.parse_args()
    console = Console()
    began = time.monotonic()
    with ExitStack() as stack:
        passing = tempfile.TemporaryDirectory(prefix="hope-faults-")
        folder = chosen.folder or Path(stack.enter_context(passing))
        zygote = stack.enter_context(Zygote(folder / "zygote"))
        store = stack.enter_context(Engine(folder / "store"))
        twins = Twins(zygote.spawn(None).url)
        kinds: list[tuple[Tally, Callable[[str], Trial], int, int]] = [
            (
                Tally("server kill"),
                lambda label: ServerKills(zygote, twins, store.url, label),
                chosen.kills,
                chosen.workers,
            ),
            (
                Tally("store kill"),
                lambda label: StoreKills(zygote, twins, folder / label, label),
                chosen.store_kills,
                chosen.workers,
            ),
            (
                Tally("partition"),
                lambda label: Partitions(zygote, twins, store.url, label),
                chosen.partitions,
                2 * chosen.workers,  # they mostly wait
            ),
        ]
        progress = stack.enter_context(
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=console,
            )
        )
        for tally, trials, runs, workers in kinds:
            advance = _advancing(progress, tally, runs)
            many(
                tally,
                trials,
                runs=runs,
                seed=chosen.seed,
                workers=min(workers, max(1, runs)),
                advance=advance,
            )
    tallies = [tally for tally, *_ in kinds]
    for tally in tallies:
        for message in tally.violations:
            console.print(f"[red]{tally.name}[/red]: ", end="")
            console.print(message, markup=False, highlight=False)
    console.print(summary(tallies, time.monotonic() - began))
    return 1 if any(tally.violations for tally in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
