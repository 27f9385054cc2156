"""Real Valkey and Redis servers on loopback ports, one or several, for tests that hurt them.

Nothing outlives the test run: every server is killed at the end of its `with`, and by the kernel
if the run itself dies. Whatever is waited for has a deadline, and a failure shows the logs.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path

import pytest
from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry

from memory_store.embedded import find_binary

KINDS = ("valkey", "redis")
HOST = "127.0.0.1"
DEFAULTS = {
    "bind": HOST,
    "appendonly": "yes",
    "appendfsync": "everysec",
    "save": "",
    "maxmemory-policy": "noeviction",
}
SLOTS = 16384

_NOTHING = '""'  # as a server's file of settings wants it written
_START_S = 20.0
_POLL_S = 0.02

# Linux kills a server when the *thread* that forked it ends. This one ends with the process.
_forking = ThreadPoolExecutor(1, "engines")
# none that the kernel gives to outgoing connections: `restart` must find its port free
_ports = iter(random.sample(range(10_000, 32_000), 22_000))
_TIED = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class Engine:
    """One server. What `set` changes is forgotten by `restart`; `settings` is not."""

    def __init__(self, folder, kind="valkey", settings=None, *, mode=()):
        self.folder = Path(folder)
        self.kind = kind
        self.port = free_port()
        self._binary = binary(kind)
        self._mode = mode
        self._process = None
        self.folder.mkdir(parents=True, exist_ok=True)
        options = DEFAULTS | {"port": self.port, "dir": self.folder} | (settings or {})
        lines = (
            f"{name} {_NOTHING if value == '' else value}\n" for name, value in options.items()
        )
        self._options.write_text("".join(lines))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.kill()

    @property
    def url(self):
        return f"redis://{HOST}:{self.port}"

    @property
    def pid(self):
        return self._process.pid

    @property
    def alive(self):
        return self._process is not None and self._process.poll() is None

    @property
    def log(self):
        return self.folder / "log"

    def start(self):
        """Start the server and wait until it answers, its data read."""
        assert not self.alive, "it runs already"
        self._process = _forking.submit(self._fork).result()
        try:
            wait_until(self._answers, f"{self.kind} does not start", [self], _START_S)
        except BaseException:
            self.kill()
            raise

    def kill(self):
        """Kill -9, and wait for the end."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def restart(self):
        """Kill it if it still runs, and start it on the same port and data."""
        self.kill()
        self.start()

    def pause(self):
        """Let it hang: connections are accepted, nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self):
        os.kill(self.pid, signal.SIGCONT)

    def set(self, name, value):
        self.ask("CONFIG", "SET", name, value)

    def ask(self, *words, seconds=2.0):
        """Return the answer to one command, on a connection of its own."""
        with Redis(
            port=self.port,
            decode_responses=True,
            socket_timeout=seconds,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        ) as client:
            return client.execute_command(*words)

    @property
    def _options(self):
        return self.folder / "server.conf"

    def _fork(self):
        tie = [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid())]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*tie, self._binary, self._options, *self._mode],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _answers(self):
        assert self.alive, f"{self.kind} died; {last_words(self)}"
        return self.ask("PING")


class Cluster:
    """Three masters that share the slots."""

    def __init__(self, folder, kind="valkey", settings=None):
        own = {
            "cluster-enabled": "yes",
            "cluster-node-timeout": 1000,
            "cluster-announce-ip": HOST,
        } | (settings or {})
        self.masters = [
            Engine(Path(folder) / str(number), kind, own | {"cluster-port": free_port()})
            for number in range(3)
        ]
        edges = [SLOTS * number // 3 for number in range(4)]
        self._slots = [range(*edge) for edge in pairwise(edges)]
        self._started = ExitStack()

    def __enter__(self):
        with ExitStack() as started:
            for master in self.masters:
                started.enter_context(master)
            self._form()
            self.wait()
            self._started = started.pop_all()
        return self

    def __exit__(self, *error):
        self._started.close()

    @property
    def url(self):
        return "redis+cluster://" + ",".join(f"{HOST}:{one.port}" for one in self.masters)

    def master_of(self, key):
        """Return the engine that keeps a key."""
        slot = self.masters[0].ask("CLUSTER", "KEYSLOT", key)
        return next(
            one for one, slots in zip(self.masters, self._slots, strict=True) if slot in slots
        )

    def wait(self, seconds=20.0):
        """Wait until every master sees all of the others and all of the slots."""

        def formed():
            return all(
                "cluster_state:ok" in info and "cluster_known_nodes:3" in info
                for info in (master.ask("CLUSTER", "INFO") for master in self.masters)
            )

        wait_until(formed, "the cluster does not form", self.masters, seconds)

    def _form(self):
        first = self.masters[0]
        for number, (master, slots) in enumerate(zip(self.masters, self._slots, strict=True)):
            master.ask("CLUSTER", "ADDSLOTSRANGE", slots[0], slots[-1])
            master.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for master in self.masters[1:]:
            bus = master.ask("CONFIG", "GET", "cluster-port")[1]
            first.ask("CLUSTER", "MEET", HOST, master.port, bus)


class Sentinels:
    """A master and its replica under the eyes of one sentinel, or three."""

    NAME = "mymaster"

    def __init__(self, folder, kind="valkey", settings=None, *, sentinels=1):
        folder, settings = Path(folder), settings or {}
        quick = settings | {"repl-diskless-sync-delay": 0}
        first = Engine(folder / "a", kind, quick)
        self.engines = [first, Engine(folder / "b", kind, quick | {"replicaof": _at(first)})]
        watch = {
            "sentinel monitor": f"{self.NAME} {_at(first)} {sentinels // 2 + 1}",
            "sentinel down-after-milliseconds": f"{self.NAME} 500",
            "sentinel failover-timeout": f"{self.NAME} 3000",
        }
        self.sentinels = [
            Engine(folder / f"sentinel-{number}", kind, watch, mode=["--sentinel"])
            for number in range(sentinels)
        ]
        self._led = first  # the master as of the last failover
        self._started = ExitStack()

    def __enter__(self):
        with ExitStack() as started:
            for engine in [*self.engines, *self.sentinels]:
                started.enter_context(engine)
            for sentinel in self.sentinels:
                _hasten(sentinel)
            self.wait()
            self._started = started.pop_all()
        return self

    def __exit__(self, *error):
        self._started.close()

    @property
    def url(self):
        hosts = ",".join(f"{HOST}:{one.port}" for one in self.sentinels)
        return f"redis+sentinel://{hosts}/{self.NAME}"

    @property
    def master(self):
        """The engine that the first sentinel names now."""
        return self._named_by(self.sentinels[0])

    @property
    def replica(self):
        return next(one for one in self.engines if one is not self.master)

    def kill_master(self):
        """Kill -9 the master and return it."""
        master = self.master
        master.kill()
        return master

    def wait_for_failover(self, seconds=20.0):
        """Once the master is killed or paused: wait for another that all name, and return it."""

        def changed():
            named = {self._named_by(sentinel) for sentinel in self.sentinels}
            return self._led not in named and all(one.ask("ROLE")[0] == "master" for one in named)

        wait_until(changed, "no failover", [*self.engines, *self.sentinels], seconds)
        self._led = self.master
        return self._led

    def wait(self, seconds=20.0):
        """Wait until a master can die: its replica follows it, and all sentinels know all."""

        def ready():
            replica = self.replica.ask("INFO", "replication")
            return replica.get("master_link_status") == "up" and all(
                self._knows_all(sentinel) for sentinel in self.sentinels
            )

        wait_until(ready, "the sentinels are not ready", [*self.engines, *self.sentinels], seconds)

    def _named_by(self, sentinel):
        _, port = sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.NAME)
        return next(one for one in self.engines if one.port == int(port))

    def _knows_all(self, sentinel):
        master = _pairs(sentinel.ask("SENTINEL", "MASTER", self.NAME))
        replicas = [_pairs(one) for one in sentinel.ask("SENTINEL", "REPLICAS", self.NAME)]
        return (
            master["flags"] == "master"
            and master["num-other-sentinels"] == str(len(self.sentinels) - 1)
            and [one["flags"] for one in replicas] == ["slave"]
            and replicas[0]["master-link-status"] == "ok"
        )


def binary(kind):
    """Return the server's program; skip the test where it is not installed."""
    if kind == "valkey":
        return find_binary()
    found = shutil.which("redis-server")
    return Path(found) if found else pytest.skip("redis-server is not installed")


def free_port():
    """Return a port that nobody uses, and never the same one again."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind((HOST, port := next(_ports)))
            return port


def wait_until(condition, complaint, engines=(), seconds=20.0):
    """Ask again and again; a server that does not answer yet is asked again, too."""
    deadline = time.monotonic() + seconds
    error = None
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except RedisError as refused:
            error = refused
        time.sleep(_POLL_S)
    said = "\n".join(last_words(engine) for engine in engines)
    pytest.fail(f"{complaint} within {seconds} s ({error!r})\n{said}")


def last_words(engine):
    with engine.log.open(errors="replace") as log:
        return f"the end of {engine.log}:\n{''.join(deque(log, maxlen=12))}"


def _at(engine):
    return f"{HOST} {engine.port}"


def _pairs(answer):
    """Return a flat answer (or one that the client has read already) as a dictionary."""
    return answer if isinstance(answer, dict) else dict(zip(answer[::2], answer[1::2], strict=True))


def _hasten(sentinel):
    """Let a sentinel look round more often than every second, or every ten."""
    periods = {"info": 200, "ping": 100, "ask": 100, "publish": 200, "tilt": 1000}
    words = [word for name, ms in periods.items() for word in (f"{name}-period", ms)]
    sentinel.ask("SENTINEL", "DEBUG", *words)
