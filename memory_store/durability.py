"""What servers promise to keep, read from the servers themselves, and what is refused at start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redis.exceptions import ConnectionError, ResponseError

from memory_store.errors import Unsafe
from memory_store.link import Link
from memory_store.snapshot import Durability

UNKNOWN = "unknown"
_SAFE_POLICIES = ("noeviction", UNKNOWN)
_OLDEST = 7  # scripts with a header and EXPIRE ... XX came with Redis 7
_WEAKEST = ("none", UNKNOWN, "everysec", "always")  # a cluster keeps what its weakest master keeps
_WAITAOF = (7, 2)  # every Valkey has it


async def read_durability(link: Link) -> Durability:
    """Ask every server; where it refuses to tell, say `unknown` rather than guess."""
    infos = [_pairs(reply) for reply in await _each(link, "INFO")] or [{}]
    fsyncs = [_pairs(reply).get("appendfsync", UNKNOWN) for reply in await _fsync(link)]
    fsyncs += [UNKNOWN] * (len(infos) - len(fsyncs))
    modes = [_mode(info, fsync) for info, fsync in zip(infos, fsyncs, strict=False)]
    policies = [str(info.get("maxmemory_policy", UNKNOWN)) for info in infos]
    return Durability(
        mode=min(modes, key=_WEAKEST.index),
        engine=_engine(infos[0]),
        policy=next((p for p in policies if p not in _SAFE_POLICIES), policies[0]),
        aof=all(str(info.get("aof_enabled")) == "1" for info in infos),
        where=link.where,
        waits=all(_waits(info) for info in infos),
        replicas=min(int(info.get("connected_slaves", 0)) for info in infos),
        evicted=sum(int(info.get("evicted_keys", 0)) for info in infos),
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


def _mode(info: Mapping[str, Any], fsync: str) -> str:
    if "aof_enabled" not in info:
        return UNKNOWN
    if str(info["aof_enabled"]) != "1" or fsync == "no":
        return "none"
    return fsync if fsync in _WEAKEST else UNKNOWN


def _engine(info: Mapping[str, Any]) -> str:
    if "valkey_version" in info:
        return f"valkey {info['valkey_version']}"
    return f"redis {info.get('redis_version', UNKNOWN)}"


def _waits(info: Mapping[str, Any]) -> bool:
    """Tell whether WAITAOF can be had: the command is there, and there is an AOF to wait for."""
    if str(info.get("aof_enabled")) != "1":
        return False
    if "valkey_version" in info:
        return True
    release = str(info.get("redis_version", "0")).split(".")[:2]
    return tuple(int(part) for part in release if part.isdigit()) >= _WAITAOF


async def _fsync(link: Link) -> list[Any]:
    return await _each(link, "CONFIG", "GET", "appendfsync")


async def _each(link: Link, *command: str) -> list[Any]:
    try:
        return await link.each(*command)
    except ConnectionError:
        raise
    except ResponseError:
        return []


def _pairs(reply: Any) -> dict[str, Any]:
    """Return a reply as the mapping it is: as the client gives it, or as it came."""
    if isinstance(reply, Mapping):
        return {_text(name): _text(value) for name, value in reply.items()}
    if isinstance(reply, (bytes, str)):
        lines = (line.partition(":") for line in _text(reply).splitlines() if ":" in line)
        return {name: value for name, _, value in lines}
    flat = [_text(each) for each in reply]
    return dict(zip(flat[::2], flat[1::2], strict=False))


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
