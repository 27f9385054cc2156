"""Where the store is: one server, the master that sentinels name, or a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff

Client = Redis | RedisCluster

BAD_URL = (
    "the Redis address cannot be read; write redis://[user:password@]host[:port][/database], "
    "rediss://... for TLS, unix:///path/to/socket, redis+sentinel://host:port,.../master, or "
    "redis+cluster://host:port,..., and percent-encode special characters of a password"
)
_PORTS = {"redis+sentinel": 26379, "rediss+sentinel": 26379}


@dataclass(frozen=True, slots=True)
class Several:
    """An address of more than one host.

    >>> Several.parse("redis+sentinel://:pw@a,b:2/mymaster")
    Several(hosts=(('a', 26379), ('b', 2)), path='mymaster', tls=False, user=None, database=0)
    """

    hosts: tuple[tuple[str, int], ...]
    path: str
    tls: bool
    user: str | None
    database: int
    password: str | None = None

    def __repr__(self) -> str:  # never the password
        return (
            f"Several(hosts={self.hosts!r}, path={self.path!r}, tls={self.tls}, "
            f"user={self.user!r}, database={self.database})"
        )

    @classmethod
    def parse(cls, url: str) -> Several:
        parts = urlsplit(url)
        credentials, _, names = parts.netloc.rpartition("@")
        user, _, password = credentials.partition(":")
        hosts = []
        for name in names.split(","):
            one = urlsplit(f"//{name}")
            if not one.hostname:
                raise ValueError(BAD_URL)
            hosts.append((one.hostname, one.port or _PORTS.get(parts.scheme, 6379)))
        path, _, database = parts.path.strip("/").partition("/")
        if parse_qs(parts.query):
            raise ValueError(BAD_URL)
        return cls(
            tuple(hosts),
            path,
            parts.scheme.startswith("rediss"),
            unquote(user) or None,
            int(database or 0),
            unquote(password) or None,
        )


def connect(url: str, *, connections: int, timeout: float) -> tuple[Client, str]:
    """Return a client that has not connected yet, and its address without credentials.

    Retries are ours alone: the client's own would send a command twice without saying so.

    Raises:
        ValueError: the address cannot be read (it is not repeated: it may hold a password).
    """
    options: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "health_check_interval": 15,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    scheme = url.partition("://")[0]
    try:
        if scheme.endswith("+sentinel"):
            return _sentinel(Several.parse(url), options)
        if scheme.endswith("+cluster"):
            return _cluster(Several.parse(url), options, connections)
        pool = _LivingFirst.from_url(url, **options)
        pool.make_connection()  # type: ignore[no-untyped-call]  # finds unknown options
    except (ValueError, TypeError):
        raise ValueError(BAD_URL) from None
    known = pool.connection_kwargs
    where = f"{known.get('host', 'localhost')}:{known.get('port', 6379)}"
    return Redis.from_pool(pool), f"unix://{known['path']}" if known.get("path") else where


class _LivingFirst(ConnectionPool):
    """Takes connections that live before those that would have to be made.

    The library's own pool hands out what came back last. When a server takes no new connections,
    that is again and again the one that could not be made, while others lie there and work.
    """

    def get_available_connection(self) -> Any:
        self._available_connections.sort(key=lambda connection: connection.is_connected)
        return super().get_available_connection()  # type: ignore[no-untyped-call]


class _LivingMasterFirst(SentinelConnectionPool):
    """The same of the connections to whichever server is the master."""

    def get_available_connection(self) -> Any:
        self._available_connections.sort(key=lambda connection: connection.is_connected)
        return super().get_available_connection()  # type: ignore[no-untyped-call]


def _sentinel(at: Several, options: dict[str, Any]) -> tuple[Client, str]:
    if not at.path:
        raise ValueError(BAD_URL)  # whose master?
    login = {"username": at.user, "password": at.password}
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        list(at.hosts),
        sentinel_kwargs={"socket_timeout": 1.0, "socket_connect_timeout": 1.0, "ssl": at.tls},
        ssl=at.tls,
        db=at.database,
        **login,
        **options,
    )
    client: Redis = sentinel.master_for(at.path, connection_pool_class=_LivingMasterFirst)
    return client, f"master {at.path!r} of sentinels {_listed(at)}"


def _cluster(at: Several, options: dict[str, Any], connections: int) -> tuple[Client, str]:
    if at.path or at.database:
        raise ValueError(BAD_URL)  # a cluster has no databases
    client = RedisCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in at.hosts],
        username=at.user,
        password=at.password,
        ssl=at.tls,
        max_connections=connections,
        **options,
    )
    return client, f"cluster {_listed(at)}"


def _listed(at: Several) -> str:
    return ",".join(f"{host}:{port}" for host, port in at.hosts)
