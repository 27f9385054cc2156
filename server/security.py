"""Who may come in, and with how much: keys, tenants, origins, size. Refuses at the door."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError
from server.settings import LOCAL, Settings, is_loopback

SUBPROTOCOL = "hope"
_KEY_PROTOCOL = "hope-key."


class Gate:
    """The configured keys (hashed) and origins."""

    def __init__(self, keys: Iterable[str], origins: Iterable[str]) -> None:
        pairs = (entry.split(":", 1) for entry in keys)
        self._tenants = [(_digest(key), tenant) for tenant, key in pairs]
        self._origins = frozenset(origin.rstrip("/") for origin in origins)

    @property
    def open(self) -> bool:
        """No key is configured: the server is on loopback and everybody is `local`."""
        return not self._tenants

    def tenant(self, authorization: str | None, protocols: str | None = None) -> str:
        """Return the tenant of a request.

        Args:
            authorization: the Authorization header.
            protocols: Sec-WebSocket-Protocol, where browsers put the key as `hope-key.<base64url>`.

        Raises:
            ApiError: 401 `invalid_api_key`.
        """
        if self.open:
            return LOCAL
        key = _bearer(authorization) or _offered(protocols)
        found = None
        for digest, tenant in self._tenants:  # all of them: the time tells nothing
            if hmac.compare_digest(digest, _digest(key or "")):
                found = tenant
        if found is None:
            raise ApiError(
                401,
                "invalid_api_key",
                "the API key is missing or unknown; send `Authorization: Bearer KEY`",
            )
        return found

    def check_origin(self, origin: str | None, host: str | None) -> None:
        """Refuse browsers on foreign pages (403 `origin_not_allowed`); others send no Origin.

        A server without keys trusts whoever reaches loopback, so there the page itself must
        come from a loopback name: a foreign name that resolves here (DNS rebinding) is refused.
        """
        if self.open and host is not None and not is_loopback(_hostname(host)):
            raise ApiError(
                403, "origin_not_allowed", f"host {host!r} is not a loopback name; use 127.0.0.1"
            )
        if origin is None or origin.rstrip("/") in self._origins:
            return
        if host is not None and origin.partition("://")[2] == host:
            return
        raise ApiError(
            403,
            "origin_not_allowed",
            f"origin {origin!r} is not allowed; add it to HOPE_ORIGINS",
        )


class Guard:
    """ASGI middleware: no request and no handshake gets past it without tenant and origin.

    Deny by default: only health, and the page's own files (which hold no data), are open.
    """

    def __init__(self, app: ASGIApp, gate: Gate, refused: Callable[[str], None]) -> None:
        self._app, self._gate, self._refused = app, gate, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._gate.check_origin(headers.get("origin"), headers.get("host"))
            if not _is_open(scope["path"]):
                protocols = headers.get("sec-websocket-protocol")
                scope["tenant"] = self._gate.tenant(headers.get("authorization"), protocols)
        except ApiError as error:
            self._refused(error.code)
            await _refuse(error, scope, receive, send)
            return
        await self._app(scope, receive, send)


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """How many bytes a body may have, and by which setting."""

    usual: int
    file: int  # of a session that is brought in

    @classmethod
    def of(cls, settings: Settings) -> BodyLimits:
        return cls(settings.max_body_bytes, settings.max_import_mib << 20)

    def at(self, method: str, path: str) -> tuple[int, str]:
        if method == "PUT" and path.endswith("/import"):
            return self.file, "HOPE_MAX_IMPORT_MIB"
        return self.usual, "HOPE_MAX_BODY_BYTES"


class BodyLimit:
    """ASGI middleware: a larger body is refused, and never held in memory."""

    def __init__(self, app: ASGIApp, limits: BodyLimits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most, setting = self._limits.at(scope["method"], scope["path"])
        error = ApiError(
            413,
            "message_too_large",
            f"the body is larger than {most} bytes; send less, or raise {setting}",
        )
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > most:
            await _refuse(error, scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise HTTPException(error.status, error.message)
            return message

        await self._app(scope, counted, send)


def _is_open(path: str) -> bool:
    return path == "/" or path.startswith(("/page/", "/health/"))


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    body = json.dumps({"error": error.detail.model_dump()}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    prefix = ""
    if scope["type"] == "websocket":
        await receive()  # the handshake
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008, "reason": error.code})
            return
        prefix = "websocket."
    await send({"type": f"{prefix}http.response.start", "status": error.status, "headers": headers})
    await send({"type": f"{prefix}http.response.body", "body": body})


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # half an IPv6 address
        return ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _bearer(authorization: str | None) -> str | None:
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


def _offered(protocols: str | None) -> str | None:
    for protocol in (protocols or "").split(","):
        name = protocol.strip()
        if name.startswith(_KEY_PROTOCOL):
            encoded = name.removeprefix(_KEY_PROTOCOL)
            padded = encoded + "=" * (-len(encoded) % 4)
            try:
                return base64.urlsafe_b64decode(padded).decode()
            except (binascii.Error, ValueError):
                return None
    return None
