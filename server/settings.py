"""Every setting of the server, documented; from flags, else HOPE_* environment variables."""

from __future__ import annotations

import ipaddress
import os
import socket
import uuid
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from memory_store import SessionKey

LOCAL = "local"  # the tenant of a server without keys, which only loopback reaches


def _data_home() -> Path:
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "hope"


class Settings(BaseSettings):
    """The server's settings; `docs/running.md` has a row for each."""

    model_config = SettingsConfigDict(env_prefix="HOPE_", extra="ignore")

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    model: str = Field(
        "smollm2",
        description="`smollm2` (fetched on first use), `hope-nano` (native, shipped with it), "
        "`random` or `random-native` (tiny, for trying things), a model's directory, "
        "or a .gguf file",
    )
    memory_layer: str = Field(
        "auto",
        description="what remembers facts beside a pre-trained model: auto (the layer that comes "
        "for it, if any), none, or a file of hope train memory",
    )
    levels: Path | None = Field(
        None,
        description="file of levels (JSON) that learn in place of the model's own: "
        "docs/learning.md",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="precision of weights and window; auto: bfloat16 where it is fast"
    )
    window: int = Field(1024, ge=16, description="attention window in tokens")
    sinks: int = Field(4, ge=0, description="first tokens of a session that stay in view for ever")
    learning: bool = Field(True, description="consolidate what users and documents say")
    lanes: int = Field(16, ge=1, le=1024, description="sessions that may be answered at once")
    threads: int = Field(0, ge=0, description="CPU threads of the model; 0: all cores")

    store: Literal["embedded", "redis", "memory"] = Field(
        "embedded",
        description="embedded: an own Valkey under --data-dir; redis: --redis-url; "
        "memory: nothing lasts",
    )
    redis_url: str | None = Field(None, description="redis://, rediss:// or unix:// address")
    data_dir: Path = Field(default_factory=_data_home, description="where the embedded store keeps")
    kept_versions: int = Field(
        4, ge=1, le=64, description="older versions kept beside each session's current one"
    )
    storage: str = Field(
        "bf16",
        description="numbers at rest: fp32, bf16 or int8 for every level, or for one, such as "
        "`slow=int8`; `memory=bf16` is the fast memory",
    )
    keyring: str | None = Field(
        None,
        repr=False,
        description="file of the keys that seal each tenant's sessions at rest; or its JSON itself",
    )
    wait: Literal["committed", "durable"] = Field(
        "committed",
        description="when a turn is complete: once committed, or once the store has it on disk",
    )
    wait_replicas: int = Field(
        0, ge=0, le=16, description="replicas that must have a durable turn on disk as well"
    )
    store_timeout: float = Field(
        5.0, ge=0.1, le=60, description="seconds until a store that says nothing counts as silent"
    )
    server_id: str = Field(
        "", description="this server's name in leases; where empty, host and port"
    )
    lease_seconds: float = Field(
        30.0, ge=0.2, le=600, description="life of a lease; a dead server's sessions wait so long"
    )
    allow_eviction: bool = Field(
        False, description="start on a Redis that may evict (lose) sessions"
    )
    host_memory_mib: int = Field(2048, ge=16, description="sessions kept in RAM between turns")

    api_keys: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="comma-separated `tenant:key`; without any, only loopback is served"
    )
    origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="comma-separated browser origins allowed besides the server's own"
    )
    session_headers: Annotated[tuple[str, ...], NoDecode] = Field(
        ("x-session-id", "session-id"), description="headers that may carry the session id"
    )

    max_input_tokens: int = Field(32768, ge=1, description="longest input of one turn")
    max_output_tokens: int = Field(4096, ge=1, description="longest reply that may be asked for")
    default_output_tokens: int = Field(512, ge=1, description="longest reply where none is asked")
    max_body_bytes: int = Field(1 << 20, ge=1024, description="largest request or socket message")
    temperature: float = Field(0.0, ge=0, le=2, description="default temperature; 0 is greedy")
    top_p: float = Field(0.9, gt=0, le=1, description="default nucleus")
    repetition_penalty: float = Field(
        1.1, gt=0, le=10, description="default penalty on tokens the reply has used; 1 is none"
    )
    turns_waiting: int = Field(
        4, ge=0, description="turns that may queue for one session before `session_busy`"
    )
    max_import_mib: int = Field(512, ge=1, description="largest session file that is imported")
    shutdown_timeout: float = Field(30.0, ge=0, description="seconds for open turns at shutdown")

    @model_validator(mode="before")
    @classmethod
    def _split(cls, values: dict[str, object]) -> dict[str, object]:
        for name in ("api_keys", "origins", "session_headers"):
            value = values.get(name)
            if isinstance(value, str):
                values[name] = tuple(part.strip() for part in value.split(",") if part.strip())
        if values.get("redis_url") and values.get("store") in (None, "embedded"):
            values["store"] = "redis"
        return values

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if self.store == "redis" and not self.redis_url:
            raise ValueError("--store redis needs --redis-url, such as redis://127.0.0.1:6379/0")
        if not self.api_keys and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} is not loopback and no API key is configured: anyone who "
                "reaches it could read every session; set HOPE_API_KEYS=tenant:key, "
                "or use --host 127.0.0.1"
            )
        for entry in self.api_keys:
            tenant, colon, key = entry.partition(":")
            if not colon:
                raise ValueError("an API key names no tenant: write HOPE_API_KEYS=tenant:key")
            SessionKey(tenant, "any")  # says what a tenant may be called
            if len(key) < 16:
                raise ValueError(
                    f"the API key of tenant {tenant!r} has {len(key)} characters: write tenant:key "
                    "with a key of at least 16 (`hope keys` makes one)"
                )
        return self

    @property
    def tenants(self) -> tuple[str, ...]:
        """Everybody who may come in."""
        return tuple({entry.partition(":")[0]: None for entry in self.api_keys}) or (LOCAL,)

    @property
    def owner(self) -> str:
        """This server's name in leases.

        A server that is started again under its name takes its leases over at once. Of the
        embedded store there is only one user; without a fixed port there is no name to come back.
        """
        if self.server_id:
            return self.server_id
        if self.store == "embedded":
            return "embedded"
        return f"{socket.gethostname()}:{self.port or uuid.uuid4().hex}"


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach the address.

    >>> [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "10.0.0.5")]
    [True, True, True, False, False]
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
