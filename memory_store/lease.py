"""Who may write a session: one server at a time, by a fence that only ever rises."""

from __future__ import annotations

from memory_store.errors import Corrupt, Deleted, Held
from memory_store.keys import Keys
from memory_store.link import Link
from memory_store.row import decode_row
from memory_store.scripts import script
from memory_store.snapshot import Lease, SessionKey

_STILLBORN_S = 3600  # what is held but never committed to is gone so long after the last renewal

_ACQUIRE, _RENEW, _RELEASE = map(script, ("acquire.lua", "renew.lua", "release.lua"))


async def acquire(link: Link, key: SessionKey, owner: str, seconds: float) -> Lease:
    """Raise the fence and take the lease (Held, Deleted, Corrupt).

    May be sent twice: the second try raises the fence once more, and what counts is its reply.
    """
    arguments = (owner, _milliseconds(seconds), _STILLBORN_S)
    [reply] = await link.call(_ACQUIRE, Keys(key).leased, arguments)
    match reply:
        case [b"OK", int(fence), version, commits]:
            row = decode_row(key, [version, None, None, commits, None, None, None, None])
            return Lease(key, owner, fence, row.version, row.last_commit)
        case [b"HELD", int(left)]:
            raise Held(key.session, seconds=max(left, 0) / 1000)
        case [b"GONE"]:
            raise Deleted(key.session)
        case [b"DAMAGED"]:
            raise Corrupt(key.session, "head: its version is missing")
    raise Corrupt(key.session, f"head: the lease script answered {reply!r}")


async def renew(link: Link, lease: Lease, seconds: float) -> bool:
    arguments = (lease.owner, lease.fence, _milliseconds(seconds), _STILLBORN_S)
    [reply] = await link.call(_RENEW, Keys(lease.key).leased, arguments)
    return bool(reply == [b"OK"])


async def release(link: Link, lease: Lease) -> None:
    await link.call(_RELEASE, Keys(lease.key).leased, (lease.owner, lease.fence))


def _milliseconds(seconds: float) -> int:
    return max(1, round(1000 * seconds))
