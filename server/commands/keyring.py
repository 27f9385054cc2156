"""`hope keyring`: the keys that seal sessions at rest, and sealing anew what older keys sealed."""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from memory_store import EmbeddedValkey, Keyring, SessionKey
from server.commands.terminal import Refusal, err, out, refusals, settings_from

keyring_commands = typer.Typer(
    help="Keys that seal sessions at rest: make, rotate, forget.", no_args_is_help=True
)

Ring = Annotated[
    str | None, typer.Option("--keyring", help="the keyring's file; else HOPE_KEYRING")
]
Tenant = Annotated[str, typer.Argument(help="whose key; `local` is who serves without API keys")]


@keyring_commands.command()
def new(tenant: Tenant = "local", keyring: Ring = None) -> None:
    """Make a key and use it from now on; earlier ones go on opening what they sealed."""
    with refusals():
        try:
            SessionKey(tenant, "any")
        except ValueError as error:
            raise Refusal(str(error)) from None
        path = _change(keyring, lambda ring: ring.with_new_key(tenant), create=True)
        made = Keyring.read(path).current(tenant)
        out.print(f"{tenant} is sealed with key {made} of {path}; keep a copy of it elsewhere:")
        out.print("whoever loses it loses the sessions, and who has it can read them.")
        out.print("Servers read it when they start. `hope keyring reseal` replaces older keys.")


@keyring_commands.command()
def show(keyring: Ring = None) -> None:
    """List tenants and key ids, never a key."""
    with refusals():
        ring = read_ring(_given(keyring))
        for tenant in sorted(ring.tenants):
            out.print(f"{tenant}: current {ring.current(tenant)}")


@keyring_commands.command()
def forget(
    tenant: Tenant,
    key: Annotated[str | None, typer.Option(help="only this older key")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    keyring: Ring = None,
) -> None:
    """Erase a tenant's keys, and with them everything they sealed, in every copy and backup."""
    with refusals():
        what = f"key {key} of tenant {tenant}" if key else f"every key of tenant {tenant}"
        if not yes and not typer.confirm(f"Erase {what}? What it sealed is lost for ever."):
            raise Refusal("nothing was erased")
        if key:
            _change(keyring, lambda ring: ring.without_key(tenant, key))
        else:
            _change(keyring, lambda ring: ring.without(tenant))
        out.print(f"{what} is erased from this file; erase its copies too")


@keyring_commands.command()
def reseal(
    tenant: Annotated[str | None, typer.Argument(help="only this tenant")] = None,
    keyring: Ring = None,
    redis_url: Annotated[str | None, typer.Option(help="else HOPE_REDIS_URL")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="of the embedded store; its server must be stopped")
    ] = None,
) -> None:
    """Seal everything with the current keys: what older keys sealed, and what was never sealed.

    Servers may go on serving from a Redis meanwhile. Stopped half-way, it can be run again.
    """
    with refusals():
        settings = settings_from(redis_url=redis_url, data_dir=data_dir, keyring=keyring)
        ring = read_ring(_given(settings.keyring))
        if tenant is not None and tenant not in ring.tenants:
            raise Refusal(f"tenant {tenant!r} has no key in the keyring")
        tenants = [tenant] if tenant is not None else sorted(ring.tenants)
        if settings.redis_url:
            asyncio.run(_reseal(settings.redis_url, ring, tenants))
        else:
            with EmbeddedValkey(settings.data_dir / "store") as valkey:
                asyncio.run(_reseal(valkey.url, ring, tenants))


async def _reseal(url: str, ring: Keyring, tenants: list[str]) -> None:
    from memory_store.reseal import Resealer

    try:
        resealer = await Resealer.open(url, ring)
    except ValueError as error:
        raise Refusal(f"--redis-url: {error}") from None
    try:
        with Progress(console=err, transient=True) as progress:
            for tenant in tenants:
                task = progress.add_task(f"sealing {tenant}", total=None)

                def tell(done: int, sessions: int, task: int = task) -> None:
                    progress.update(task, completed=done, total=sessions)  # type: ignore[arg-type]

                found = await resealer.tenant(tenant, tell)
                out.print(
                    f"{tenant}: {found.sessions} sessions, {found.resealed} values sealed with "
                    f"{ring.current(tenant)}, {found.kept} were"
                )
    finally:
        await resealer.close()


def read_ring(given: str) -> Keyring:
    """Read a keyring from its file, or from its own text (StoreError)."""
    return Keyring.parse(given) if given.lstrip().startswith("{") else Keyring.read(Path(given))


def _given(keyring: str | None) -> str:
    if (given := keyring or settings_from().keyring) is None:
        raise Refusal("which keyring? Name its file with --keyring, or in HOPE_KEYRING")
    return given


def _change(
    keyring: str | None, change: Callable[[Keyring], Keyring], *, create: bool = False
) -> Path:
    """Read, change and save the ring; two that do so at once wait for each other."""
    if (given := _given(keyring)).lstrip().startswith("{"):
        raise Refusal("this keyring is kept in the environment: change it where that is set")
    path = Path(given)
    if not create:
        Keyring.read(path)  # says where there is none
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f".{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            ring = Keyring() if create and not path.exists() else Keyring.read(path)
            change(ring).save(path)
    except OSError as error:
        raise Refusal(f"keyring {path} cannot be written: {error.strerror}") from None
    return path
