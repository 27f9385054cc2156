"""A tenant's sessions in the order of their last commit, the latest first.

The index is a convenience: it is written after a commit, may lag, and is repaired by reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from memory_store.link import Link

YOUNG_S = 3600.0  # an entry is written before its session: so long that may still come


class Place(NamedTuple):
    """A session's place in the listing; as text it is the cursor of the next page.

    >>> Place.parse(str(Place(1723.25, "user:7")))
    Place(updated=1723.25, session='user:7')
    """

    updated: float
    session: str

    @classmethod
    def parse(cls, cursor: str) -> Place:
        updated, separator, session = cursor.partition(":")
        try:
            place = cls(float(updated), session)
        except ValueError:
            separator = ""
        if not separator:
            raise ValueError(f"cursor {cursor!r}: give back the one that came with the last page")
        return place

    def __str__(self) -> str:
        return f"{self.updated!r}:{self.session}"


def check_limit(limit: int) -> None:
    if limit < 1:
        raise ValueError(f"limit {limit}: ask for at least one")


async def put(link: Link, tenant: str, place: Place) -> None:
    await link.ask([("ZADD", _key(tenant), "GT", place.updated, place.session)])


async def remove(link: Link, tenant: str, sessions: Sequence[str]) -> None:
    if sessions:
        await link.ask([("ZREM", _key(tenant), *sessions)])


async def places(link: Link, tenant: str, after: Place | None, count: int) -> list[Place]:
    """Return the next `count` places after one of them (several may share a time)."""
    top = "+inf" if after is None else repr(after.updated)
    query = ("ZREVRANGEBYSCORE", _key(tenant), top, "-inf", "WITHSCORES", "LIMIT")
    found: list[Place] = []
    start, full = 0, True
    while full and len(found) < count:
        [flat] = await link.ask([(*query, start, count + 1)])
        page = [Place(float(s), n.decode()) for n, s in zip(flat[::2], flat[1::2], strict=True)]
        found += [place for place in page if after is None or place < after]
        start, full = start + len(page), len(page) > count
    return found[:count]


def _key(tenant: str) -> str:
    """ZSET: session ids by time of the last commit."""
    return f"hope:t:{tenant}:sessions"
