"""Real servers that start in a moment: one process imports everything once, and forks them.

A child runs what `hope serve` runs, from the open listener on; only its imports and its tiny
model were made before the fork. Nothing has computed by then, so no thread is lost in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.faults.death import DieAt, Reaper

ROOT = Path(__file__).parents[2]
MODEL = {
    "model": "random",
    "device": "cpu",
    "dtype": "float32",
    "threads": 1,
    "window": 32,
    "sinks": 2,
}
# One server that is started again: it takes its own leases over at once.
# Numbers are kept as they are: what is rounded at rest could hide what differs.
HABITS = {"shutdown_timeout": 5, "server_id": "hope", "lease_seconds": 30, "storage": "fp32"}
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_MOST = 1 << 16  # bytes of one request


class Gone(Exception):
    """A child ended where it should have gone on; says what it left in its log."""


class Child:
    """A forked server. What it says of itself comes through a pipe, one JSON object a line."""

    def __init__(self, report: int, control: int, log: Path) -> None:
        self.log = log
        self.ended_turns = 0
        self._report, self._control = report, control
        self._read = b""
        self._port: int | None = None
        self._status: int | None = None
        self._pidfd = -1
        self._armed = 0
        self._take_until(lambda: self.pid != 0, 30)

    pid = 0
    died: str | None = None  # the step it died (or stood still) at, by its own hand

    @property
    def url(self) -> str:
        """The address, as soon as the server answers there."""
        self._take_until(lambda: self._port is not None, 30)
        self._take(0)  # a server whose reports nobody reads would wait for ever in the end
        return f"http://127.0.0.1:{self._port}"

    @property
    def alive(self) -> bool:
        self._take(0)
        return self._status is None

    def kill(self) -> None:
        """Let it die as by `kill -9`."""
        self._signal(signal.SIGKILL)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def arm(self, die: DieAt) -> None:
        """Let it die at a step that is counted from now on."""
        os.write(self._control, json.dumps(asdict(die)).encode() + b"\n")
        before = self._armed
        self._take_until(lambda: self._armed > before, 10)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def wait(self, seconds: float = 30.0) -> int:
        """Return the exit status, -9 after a kill."""
        self._take_until(lambda: self._status is not None, seconds)
        assert self._status is not None
        return self._status

    def turn_over(self, turns: int = 1, seconds: float = 30.0) -> bool:
        """Wait until so many turns since `arm` are over, with all that follows.

        Returns False where it died first.
        """
        with contextlib.suppress(Gone):
            self._take_until(lambda: self.ended_turns >= turns, seconds)
        return self.alive

    def close(self) -> None:
        """Kill it if it runs, and forget it."""
        if self._report >= 0:
            self.kill()
            with contextlib.suppress(TimeoutError):
                self.wait(5)
            os.close(self._report)
            os.close(self._control)
            self._report = -1
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _signal(self, number: signal.Signals) -> None:
        if self._status is None and self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _take_until(self, true: Any, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            if self._status is not None:
                raise Gone(f"the server ended with {self._status}:\n{self._last_words()}")
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError(f"nothing from the server in {seconds} s: {self._last_words()}")
            self._take(left)

    def _take(self, seconds: float) -> None:
        if self._report < 0 or self._status is not None:
            return
        if not select.select([self._report], [], [], seconds)[0]:
            return
        data = os.read(self._report, 1 << 16)
        if not data:
            self._status = self._status if self._status is not None else -signal.SIGKILL
            return
        *lines, self._read = (self._read + data).split(b"\n")
        for line in lines:
            self._note(json.loads(line))

    def _note(self, said: dict[str, Any]) -> None:
        match said:
            case {"pid": pid}:
                self.pid, self._pidfd = pid, os.pidfd_open(pid)
            case {"port": port}:
                self._port = port
            case {"armed": _}:
                self._armed += 1
                self.ended_turns = 0
            case {"died": step}:
                self.died = step
            case {"over": _}:
                self.ended_turns += 1
            case {"exit": status}:
                self._status = status

    def _last_words(self) -> str:
        return self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""


class Zygote:
    """Forks servers: `with Zygote(folder) as zygote: child = zygote.spawn(url)`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._children: list[Child] = []
        self._born = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Zygote:
        self._folder.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HOPE_")}
        quiet = dict.fromkeys(_ONE_THREAD, "1") | {"TOKENIZERS_PARALLELISM": "false"}
        with theirs, (self._folder / "zygote.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.zygote", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
                env=kept | quiet,
                start_new_session=True,  # Ctrl-C is for us
            )
        self._line = ours
        ours.settimeout(60)
        if not ours.recv(_MOST):
            raise Gone((self._folder / "zygote.log").read_text())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for child in self._children:
            child.close()
        self._line.close()  # it ends, and its children with it
        self._process.wait(30)

    def spawn(
        self,
        url: str | None,
        port: int = 0,
        die: DieAt | None = None,
        settings: Mapping[str, Any] | None = None,
        constants: Mapping[str, Any] | None = None,
    ) -> Child:
        """Fork a server on a store, or on none that lasts; returns before it listens.

        `child.url` waits until it does, so a spare one may be started ahead of its time.
        `constants` are of modules, such as `{"server.tenure._POLL_S": 0.01}`.
        """
        with self._lock:
            self._born += 1
            log = self._folder / f"child-{self._born:05d}.log"
        chosen = {
            **MODEL,
            **HABITS,
            "store": "redis" if url else "memory",
            "redis_url": url,
            "port": port,
            **(settings or {}),
        }
        request = {
            "settings": chosen,
            "constants": dict(constants or {}),
            "die": asdict(die) if die else None,
            "log": str(log),
        }
        ours, theirs = os.pipe()
        control, commands = os.pipe()
        with self._lock:
            socket.send_fds(self._line, [json.dumps(request).encode()], [theirs, control])
        os.close(theirs)
        os.close(control)
        child = Child(ours, commands, log)
        with self._lock:
            self._children = [each for each in self._children if each._report >= 0] + [child]
        return child


# --- the process that forks ---------------------------------------------------------------------


def _main(line: socket.socket) -> None:
    loaded = _prepare()
    line.send(b"ready")
    bell, ringing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(ringing, warn_on_full_buffer=False)
    reports: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([line, bell], [], [])
        if bell in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(bell, 4096)
            _bury(reports)
        if line in ready:
            data, fds, _, _ = socket.recv_fds(line, _MOST, 2)
            if not data:
                return
            report, control = fds
            if (pid := os.fork()) == 0:
                inherited = [*reports.values(), line.fileno(), bell, ringing]
                _live(json.loads(data), report, control, inherited, loaded)
            os.close(control)
            _say(report, pid=pid)
            reports[pid] = report


def _prepare() -> Any:
    """Import all that a server imports, and make the model; compute nothing."""
    import gc

    import uvicorn

    import server.app  # with all its routes
    import server.cli  # noqa: F401
    from server.loading import load
    from server.settings import Settings

    loaded = load(Settings(**MODEL, store="memory"), lambda _: None)
    uvicorn.Config(_nothing, log_config=None).load()  # it imports its protocols only now
    _stretch(loaded)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a fork would lose threads"
    gc.freeze()
    return loaded


def _stretch(loaded: Any) -> None:
    """Let the model read once: what torch does at its first time every child would do again.

    It reads only. A gradient would start autograd's threads, and a fork loses them.
    """
    from hope_runtime.engine import Turn
    from hope_runtime.sampling import Sampling
    from hope_runtime.state import State

    engine = loaded[3]
    given = tuple((id, 0.0) for id in range(40))
    engine.submit(Turn("warm", State(), given, (), 8, 0.0, Sampling(temperature=0.0), (), False))
    while not engine.idle:
        engine.step()


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    """Be an application."""


def _bury(reports: dict[int, int]) -> None:
    for pid in list(reports):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            _say(reports[pid], exit=os.waitstatus_to_exitcode(status))
            os.close(reports.pop(pid))


def _say(report: int, **what: Any) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(report, json.dumps(what).encode() + b"\n")


def _live(
    request: dict[str, Any], report: int, control: int, inherited: list[int], loaded: Any
) -> None:
    """Be a server, to the end of the process."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        for number in inherited:
            os.close(number)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.register(signal.SIGUSR2)  # `kill -USR2` tells where it is
        _serve(request, report, control, loaded)
        status = 0
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve(request: dict[str, Any], report: int, control: int, loaded: Any) -> None:
    import asyncio
    import logging

    import uvloop

    from server import cli
    from server.settings import Settings

    began = time.perf_counter()
    logging.basicConfig(level="WARNING", format="%(asctime)s %(name)s %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for name, value in request["constants"].items():
        module, _, constant = name.rpartition(".")
        assert hasattr(importlib.import_module(module), constant), f"no constant {name}"
        setattr(importlib.import_module(module), constant, value)
    settings = Settings(**request["settings"])
    reaper = Reaper(lambda **what: _say(report, **what))
    reaper.install()
    if request["die"]:
        reaper.arm(DieAt(**request["die"]))
    listener = cli._listen(settings)
    port = listener.getsockname()[1]

    def obey() -> None:
        if not (line := os.read(control, _MOST)):
            asyncio.get_running_loop().remove_reader(control)
            return
        reaper.arm(DieAt(**json.loads(line)))
        _say(report, armed=True)

    def greet(*_: Any) -> None:
        asyncio.get_running_loop().add_reader(control, obey)
        _say(report, port=port)

    cli._greet = greet
    url = settings.redis_url
    with listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(cli._run(settings, loaded, url, listener, f"http://127.0.0.1:{port}", began))


if __name__ == "__main__":
    _main(socket.socket(fileno=int(sys.argv[1])))
