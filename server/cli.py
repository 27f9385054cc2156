"""The `hope` command; the only place of the server that prints."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import uvicorn
import uvloop
from rich.logging import RichHandler

from memory_store import SessionKey
from server.commands.demo import demo
from server.commands.evaluate import evaluate
from server.commands.keyring import keyring_commands
from server.commands.recall import recall
from server.commands.terminal import Refusal, err, out, refusals, settings_from
from server.commands.train import train
from server.settings import Settings

if TYPE_CHECKING:  # torch takes seconds to import; --help should not
    from hope_runtime.engine import Engine
    from hope_runtime.model import Hope
    from hope_runtime.tokenizer import Tokenizer
    from memory_store import Durability, Keyring, MemoryStore
    from server.service import Card
    from server.turns import Turns

    Loaded = tuple[Card, Hope, Tokenizer, Engine]

app = typer.Typer(
    name="hope",
    help="HOPE Server: language models that go on learning while they talk.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.add_typer(train, name="train")
evaluate.command()(recall)
app.add_typer(evaluate, name="eval")
app.add_typer(keyring_commands, name="keyring")
_BACKLOG = 2048  # connections that may wait to be accepted
_HANGING_UP = 2  # seconds for clients to take the last bytes of their replies

_LOG_SECONDS = 2.0  # between two lines of progress where nobody watches


def _about(name: str) -> str:
    return Settings.model_fields[name].description or ""


@app.command()
def serve(
    model: Annotated[str | None, typer.Option(help=_about("model"))] = None,
    memory_layer: Annotated[str | None, typer.Option(help=_about("memory_layer"))] = None,
    levels: Annotated[Path | None, typer.Option(help=_about("levels"))] = None,
    host: Annotated[str | None, typer.Option(help=_about("host"))] = None,
    port: Annotated[int | None, typer.Option(help=_about("port"))] = None,
    device: Annotated[str | None, typer.Option(help=_about("device"))] = None,
    dtype: Annotated[str | None, typer.Option(help=_about("dtype"))] = None,
    window: Annotated[int | None, typer.Option(help=_about("window"))] = None,
    sinks: Annotated[int | None, typer.Option(help=_about("sinks"))] = None,
    learning: Annotated[
        bool | None, typer.Option("--learning/--no-learning", help=_about("learning"))
    ] = None,
    lanes: Annotated[int | None, typer.Option(help=_about("lanes"))] = None,
    threads: Annotated[int | None, typer.Option(help=_about("threads"))] = None,
    store: Annotated[str | None, typer.Option(help=_about("store"))] = None,
    redis_url: Annotated[str | None, typer.Option(help=_about("redis_url"))] = None,
    data_dir: Annotated[Path | None, typer.Option(help=_about("data_dir"))] = None,
    allow_eviction: Annotated[
        bool | None, typer.Option("--allow-eviction", help=_about("allow_eviction"))
    ] = None,
    storage: Annotated[str | None, typer.Option(help=_about("storage"))] = None,
    keyring: Annotated[str | None, typer.Option(help=_about("keyring"))] = None,
    wait: Annotated[str | None, typer.Option(help=_about("wait"))] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="log every request")] = False,
) -> None:
    """Serve a model; settings not given here come from HOPE_* environment variables."""
    flags = {name: value for name, value in locals().items() if name != "verbose"}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as good as Ctrl-C
    with refusals():
        _log(verbose)
        settings = settings_from(**flags)
        _serve(settings)


@app.command()
def keys(tenant: Annotated[str, typer.Argument(help="who the key is for")] = "default") -> None:
    """Make an API key; put the printed line into HOPE_API_KEYS (comma-separated)."""
    with refusals():
        try:
            SessionKey(tenant, "any")
        except ValueError as error:
            raise Refusal(str(error)) from None
        out.print(f"{tenant}:{secrets.token_urlsafe(32)}")


@app.command()
def models(
    model: Annotated[str, typer.Argument(help=_about("model"))] = "smollm2",
) -> None:
    """Fetch a model if need be, and show what would be served."""
    with refusals():
        settings = settings_from(model=model)
        card, *_ = _load(settings)
        config = card.config
        out.print(f"[bold]{card.name}[/bold]  {card.fingerprint}")
        out.print(f"{config.blocks} blocks of width {config.width}, vocabulary {config.vocabulary}")
        out.print(f"{card.mixers}; {card.dtype} on {card.device}")
        for level in config.levels:
            first, last = level.blocks[0], level.blocks[-1]
            mlps = f"MLPs {first} to {last}"
            if config.chain > 1:
                mlps = f"MLP {level.mlp + 1} of blocks {first} to {last}"
            out.print(f"level {level.name}: every {level.chunk} tokens, {mlps}")


def main() -> None:
    app()


# --- serve ------------------------------------------------------------------------------------


def _serve(settings: Settings) -> None:
    began = time.perf_counter()
    listener = _listen(settings)
    with contextlib.ExitStack() as stack:
        stack.enter_context(listener)
        url = stack.enter_context(_store_url(settings))
        loaded = _load(settings)
        port = listener.getsockname()[1]
        where = f"[{settings.host}]" if ":" in settings.host else settings.host
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(settings, loaded, url, listener, f"http://{where}:{port}", began))


def _listen(settings: Settings) -> socket.socket:
    """Take the port before anything slow: a taken one is told at once, and who comes waits."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(_BACKLOG)  # two that are only bound would both think the port is theirs
    except OSError as error:
        listener.close()
        taken = error.errno == errno.EADDRINUSE
        remedy = "stop what uses it, or choose another --port" if taken else "choose another --host"
        raise Refusal(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); {remedy}"
        ) from None
    return listener


@contextlib.contextmanager
def _store_url(settings: Settings) -> Iterator[str | None]:
    """Start the embedded store where it is the one."""
    if settings.store == "redis":
        yield settings.redis_url
    elif settings.store == "memory":
        err.print("[yellow]--store memory: nothing will last beyond this process[/yellow]")
        yield None
    else:
        from memory_store.embedded import EmbeddedValkey

        valkey = EmbeddedValkey(settings.data_dir / "store")
        with err.status("starting the embedded store"):
            valkey.start()
        try:
            yield valkey.url
        finally:
            valkey.stop()


def _load(settings: Settings) -> Loaded:
    """Read the model and put it on its device (torch is imported here, not for --help)."""
    with _progress("starting") as report:
        from server.loading import load

        return load(settings, report)


@contextlib.contextmanager
def _progress(first: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done: a moving line on a terminal, now and then a line in a log."""
    if err.is_terminal:
        with err.status(first) as status:
            yield status.update
        return
    told = time.monotonic()  # what is quick needs no line

    def tell(text: str) -> None:
        nonlocal told
        if time.monotonic() - told >= _LOG_SECONDS:
            told = time.monotonic()
            err.print(text)

    yield tell


async def _run(
    settings: Settings,
    loaded: Loaded,
    url: str | None,
    listener: socket.socket,
    address: str,
    began: float,
) -> None:
    from server.app import serving

    if not isinstance(asyncio.get_running_loop(), uvloop.Loop):
        raise Refusal("uvloop is required: on asyncio's own loop one large commit stalls everybody")
    store = await _open(settings, url)
    try:
        async with serving(settings, *loaded, store) as application:
            config = uvicorn.Config(
                application,
                log_config=None,
                access_log=logging.getLogger().level <= logging.INFO,
                ws_max_size=settings.max_body_bytes,
                ws_max_queue=32,
                ws_ping_interval=20,
                ws_ping_timeout=20,
                ws_per_message_deflate=False,
                backlog=_BACKLOG,
                timeout_graceful_shutdown=_HANGING_UP,  # by then no turn is open
                server_header=False,
            )
            _greet(settings, loaded[0], await store.durability(), address, began)
            turns = application.state.service.turns
            await _Server(config, turns, settings.shutdown_timeout).serve(sockets=[listener])
    finally:
        await store.close()


async def _open(settings: Settings, url: str | None) -> MemoryStore:
    from memory_store import LocalStore, RedisStore, Unavailable

    if url is None:
        return LocalStore(kept_versions=settings.kept_versions)
    try:
        return await RedisStore.open(
            url,
            kept_versions=settings.kept_versions,
            allow_eviction=settings.allow_eviction,
            keyring=_keyring(settings),
            replicas=settings.wait_replicas,
            patience=settings.store_timeout,
        )
    except ValueError as error:
        raise Refusal(f"--redis-url: {error}") from None
    except Unavailable as error:
        raise Refusal(f"{error}; start it, or name another with --redis-url") from None


def _keyring(settings: Settings) -> Keyring | None:
    """Read the keyring, and see that everybody who may come in has a key."""
    if settings.keyring is None:
        return None
    from server.commands.keyring import read_ring

    keyring = read_ring(settings.keyring)
    for tenant in settings.tenants:
        if tenant not in keyring.tenants:
            raise Refusal(
                f"tenant {tenant!r} has no key in the keyring; make one with "
                f"`hope keyring new {tenant} --keyring FILE`"
            )
    return keyring


class _Server(uvicorn.Server):
    """Stops when told to: first no new turns, then the open ones, and the sockets last."""

    def __init__(self, config: uvicorn.Config, turns: Turns, patience: float) -> None:
        super().__init__(config)
        self._turns, self._patience = turns, patience

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own would raise the signal once more at the end, and die of it
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._told_to_stop)
        yield

    def _told_to_stop(self) -> None:
        if self.should_exit:  # the second time: now
            self._turns.drop()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._turns.drain(self._patience)
        await super().shutdown(sockets)


def _greet(
    settings: Settings, card: Card, durability: Durability, address: str, began: float
) -> None:
    learning = "learning on" if settings.learning else "learning off"
    took = time.perf_counter() - began
    kept = f" in {settings.data_dir}" if settings.store == "embedded" else ""
    kept += ", sealed" if settings.keyring else ""
    out.print(f"[bold]HOPE Server[/bold] serves [bold]{card.name}[/bold] on {address}")
    facts = ", a memory layer for facts" if card.config.recall else ""
    out.print(f"  model   {card.dtype} on {card.device}, {card.mixers}, {learning}{facts}")
    out.print(f"  store   {durability.engine}, {durability.mode}{kept}")
    out.print(f"  chat    open {address} or run hope-chat; Ctrl-C stops ({took:.1f} s to start)")
    sys.stdout.flush()


# --- manners ----------------------------------------------------------------------------------


def _log(verbose: bool) -> None:
    level = "INFO" if verbose else os.environ.get("HOPE_LOG_LEVEL", "WARNING").upper()
    if level not in logging.getLevelNamesMapping():
        raise Refusal(f"HOPE_LOG_LEVEL {level!r} is not a level; use DEBUG, INFO, WARNING or ERROR")
    handler = RichHandler(console=err, show_path=False, markup=False)
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler])


if __name__ == "__main__":
    main()
