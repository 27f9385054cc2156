"""What a server promises to keep, read from the server itself, and what is refused at start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ConnectionError, ResponseError

from memory_store.errors import Unsafe
from memory_store.snapshot import Durability

UNKNOWN = "unknown"
_SAFE_POLICIES = ("noeviction", UNKNOWN)
_OLDEST = 7  # scripts with a header and EXPIRE ... XX came with Redis 7


async def read_durability(client: Redis, where: str) -> Durability:
    """Ask the server; where it refuses to tell, say `unknown` rather than guess."""
    info = await _info(client)
    aof = info.get("aof_enabled") == 1
    return Durability(
        mode=_mode(info, aof, await _setting(client, "appendfsync")),
        engine=_engine(info),
        policy=str(info.get("maxmemory_policy", UNKNOWN)),
        aof=aof,
        where=where,
    )


def refuse_unsafe(found: Durability, *, allow_eviction: bool) -> None:
    """Refuse a server that would lose acknowledged sessions without an error.

    Raises:
        Unsafe: it evicts, or it is too old for the commit script.
    """
    name, _, release = found.engine.partition(" ")
    major = release.partition(".")[0]
    if major.isdigit() and int(major) < _OLDEST:
        raise Unsafe(f"{found.where} is {name} {release}; use Redis {_OLDEST} or later, or Valkey")
    if found.policy not in _SAFE_POLICIES and not allow_eviction:
        raise Unsafe(
            f"{found.where} has maxmemory-policy {found.policy}, which silently drops sessions "
            "when memory runs out; set `maxmemory-policy noeviction` there, or start with "
            "--allow-eviction if losing sessions is acceptable"
        )


def _mode(info: Mapping[str, Any], aof: bool, fsync: str) -> str:
    if "aof_enabled" not in info:
        return UNKNOWN
    if not aof or fsync == "no":
        return "none"
    return fsync


def _engine(info: Mapping[str, Any]) -> str:
    if "valkey_version" in info:
        return f"valkey {info['valkey_version']}"
    return f"redis {info.get('redis_version', UNKNOWN)}"


async def _info(client: Redis) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = await client.info()
    except ConnectionError:
        raise
    except ResponseError:
        return {}
    return found


async def _setting(client: Redis, name: str) -> str:
    try:
        found = await client.config_get(name)
    except ResponseError:
        return UNKNOWN
    return str(found.get(name, UNKNOWN))
