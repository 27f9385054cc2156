"""Nobody gets past the gate without a key, from a foreign page, or to another's sessions."""

import base64
import re

import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import WebSocketDenialResponse

from server.errors import ApiError
from server.security import LOCAL, Gate

ACME = "acme-key-0123456789"
OTHER = "other-key-0123456789"
KEYS = (f"acme:{ACME}", f"other:{OTHER}")
NEW = {
    "/v1/users/{user:path}/memory",
    "/v1/sessions/{session}/versions",
    "/v1/sessions/{session}/rollback",
    "/v1/sessions/{session}/fork",
    "/v1/sessions/{session}/freeze",
    "/v1/sessions/{session}/unfreeze",
    "/v1/sessions/{session}/diff",
    "/v1/sessions/{session}/export",
    "/v1/sessions/{session}/import",
}
OPEN = {"/", "/page/{name}", "/health/live", "/health/ready"}


def protocol(key):
    return "hope-key." + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


@pytest.fixture
async def locked(build, anyio_backend):
    """A server with two tenants."""
    async with build(api_keys=KEYS) as house:
        yield house


def leaves(routes):
    """Walk every route an application has, however it was put in."""
    for route in routes:
        inner = getattr(route, "routes", None) or getattr(
            getattr(route, "original_router", None), "routes", None
        )
        if inner:
            yield from leaves(inner)
        else:
            yield route


# --- every route --------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_every_route_is_known_to_this_test(locked):
    routes = list(leaves(locked.app.routes))

    assert {type(route) for route in routes} <= {APIRoute, Route} | {
        kind for kind in map(type, routes) if issubclass(kind, WebSocketRoute)
    }
    assert {"/v1/responses", "/v1/chat/completions", "/v1/sessions", "/metrics"} <= {
        route.path for route in routes
    }
    assert {route.path for route in routes} >= NEW
    assert len(routes) > 24


@pytest.mark.anyio
@pytest.mark.parametrize("key", [None, "wrong-key-0123456789", ""], ids=["no", "wrong", "empty"])
async def test_every_http_route_but_health_and_page_wants_a_key(locked, key):
    tried = 0
    async with locked.client(key) as client:
        for route in leaves(locked.app.routes):
            if route.path in OPEN or isinstance(route, WebSocketRoute):
                continue
            for method in route.methods:
                path = re.sub(r"{[^}]+}", "some", route.path)
                answer = await client.request(method, path, json={})
                assert answer.status_code == 401, (method, path)
                assert answer.headers["www-authenticate"] == "Bearer"
                assert method == "HEAD" or answer.json()["error"]["code"] == "invalid_api_key"
                tried += 1
    assert tried > 12


@pytest.mark.anyio
async def test_the_right_key_opens_every_http_route(locked):
    async with locked.client(ACME) as client:
        for route in leaves(locked.app.routes):
            if route.path in OPEN or isinstance(route, WebSocketRoute):
                continue
            for method in route.methods:
                path = re.sub(r"{[^}]+}", "some", route.path)
                assert (await client.request(method, path, json={})).status_code != 401


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/v1/none", "/pages", "/healthy", "/metrics/", "/page"])
async def test_what_is_no_route_wants_a_key_too(locked, path):
    async with locked.client() as client:
        assert (await client.get(path)).status_code == 401


@pytest.mark.anyio
async def test_health_and_page_are_open(locked):
    async with locked.client() as client:
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.get("/health/ready")).status_code == 200
        assert (await client.get("/")).status_code == 200
        assert (await client.get("/page/app.js")).status_code == 200


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/models", "/anywhere"])
def test_a_socket_without_a_key_is_refused_at_the_handshake(door, path):
    with door(api_keys=KEYS) as (client, house):
        for headers in ({}, {"Authorization": "Bearer wrong-key-0123456789"}):
            with (
                pytest.raises(WebSocketDenialResponse) as refused,
                client.websocket_connect(path, headers=headers),
            ):
                pass
            assert refused.value.status_code == 401
            assert refused.value.json()["error"]["code"] == "invalid_api_key"
        assert house.sample("hope_websocket_opened_total") == 0


@pytest.mark.parametrize(
    ("headers", "protocols"),
    [
        pytest.param({"Authorization": f"Bearer {ACME}"}, None, id="header"),
        pytest.param({"Authorization": f"bearer  {ACME}"}, None, id="another spelling"),
        pytest.param({}, ["hope", protocol(ACME)], id="subprotocol"),
    ],
)
def test_a_socket_with_a_key_is_let_in(door, headers, protocols):
    with (
        door(api_keys=KEYS) as (client, _),
        client.websocket_connect("/v1/responses", subprotocols=protocols, headers=headers) as line,
    ):
        assert line.accepted_subprotocol == ("hope" if protocols else None)
        line.send_text("?")
        assert line.receive_json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize(
    "offered", ["hope-key.%%%", "hope-key.", "hope-key._w", protocol("wrong-key-0123456789")]
)
def test_a_subprotocol_that_holds_no_known_key_is_refused(door, offered):
    with (
        door(api_keys=KEYS) as (client, _),
        pytest.raises(WebSocketDenialResponse) as refused,
        client.websocket_connect("/v1/responses", subprotocols=["hope", offered]),
    ):
        pass
    assert refused.value.status_code == 401


@pytest.mark.anyio
async def test_refusals_are_counted_by_reason(locked):
    async with locked.client("wrong-key-0123456789") as client:
        await client.get("/v1/models")
        await client.get("/v1/models", headers={"Origin": "https://evil.example"})

    assert locked.sample("hope_auth_failures_total", reason="invalid_api_key") == 1
    assert locked.sample("hope_auth_failures_total", reason="origin_not_allowed") == 1


# --- origins and hosts --------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://127.0.0.1:9999",
        "http://127.0.0.1:8000.evil.example",
        "https://evil.example/http://127.0.0.1:8000",
        "://",
        "http://[",
    ],
)
async def test_a_foreign_page_is_refused(house, origin):
    async with house.client(Origin=origin) as client:
        answer = await client.get("/v1/models")

    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "origin_not_allowed"
    assert "HOPE_ORIGINS" in answer.json()["error"]["message"]


@pytest.mark.anyio
async def test_the_servers_own_page_and_allowed_pages_are_let_in(build):
    async with build(origins=("https://app.example/",)) as house:
        for origin in ("http://127.0.0.1:8000", "https://app.example"):
            async with house.client(Origin=origin) as client:
                assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "10.0.0.5", "[", "", "a@[b"])
async def test_without_keys_a_foreign_host_name_is_refused(house, host):
    async with house.client(Host=host) as client:
        answer = await client.get("/v1/models")

    assert answer.status_code == 403
    assert repr(host) in answer.json()["error"]["message"]


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000"])
async def test_without_keys_every_name_of_loopback_will_do(house, host):
    async with house.client(Host=host) as client:
        assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.anyio
async def test_with_keys_any_host_name_will_do(locked):
    async with locked.client(ACME, Host="hope.example") as client:
        assert (await client.get("/v1/models")).status_code == 200


def test_a_socket_of_a_foreign_page_is_refused_even_with_a_key(door):
    headers = {"Authorization": f"Bearer {ACME}", "Origin": "https://evil.example"}
    with (
        door(api_keys=KEYS) as (client, _),
        pytest.raises(WebSocketDenialResponse) as refused,
        client.websocket_connect("/v1/responses", headers=headers),
    ):
        pass
    assert refused.value.status_code == 403


@pytest.mark.anyio
async def test_the_page_lets_no_foreign_code_in(house):
    async with house.client() as client:
        answer = await client.get("/")

    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy


# --- tenants ------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_session_of_another_tenant_is_not_there(locked):
    async with locked.client(ACME) as acme, locked.client(OTHER) as other:
        turn = {"input": "my name is Ada", "conversation": "s", "max_output_tokens": 4}
        turn |= {"turn_id": "t-1", "user": "ada"}
        await acme.post("/v1/responses", json=turn)

        for method, path in (
            ("GET", "/v1/sessions/s"),
            ("GET", "/v1/conversations/s"),
            ("GET", "/v1/conversations/s/items"),
            ("DELETE", "/v1/sessions/s"),
            ("DELETE", "/v1/conversations/s"),
            ("GET", "/v1/sessions/s/versions"),
            ("GET", "/v1/sessions/s/diff"),
            ("GET", "/v1/sessions/s/diff?from=1&to=1"),
            ("GET", "/v1/sessions/s/export"),
            ("GET", "/v1/sessions/s/export?version=1"),
            ("POST", "/v1/sessions/s/rollback"),
            ("POST", "/v1/sessions/s/fork"),
            ("POST", "/v1/sessions/s/freeze"),
            ("POST", "/v1/sessions/s/unfreeze"),
        ):
            known = len(locked.store._sessions)
            body = {"version": 1} if method == "POST" else None
            theirs = await other.request(method, path, json=body)
            never = await other.request(method, re.sub(r"/s(?=/|\?|$)", "/t", path), json=body)
            assert theirs.status_code == never.status_code == 404
            assert theirs.text.replace("'s'", "'t'") == never.text
            assert theirs.headers.keys() == never.headers.keys()
            assert len(locked.store._sessions) == known
        assert (await other.delete("/v1/users/ada/memory")).json()["sessions"] == []
        assert (await other.get("/v1/sessions")).json()["data"] == []
        assert (await acme.get("/v1/sessions/s")).status_code == 200


@pytest.mark.anyio
async def test_a_turn_id_tells_another_tenant_nothing(locked):
    turn = {"input": "hello", "conversation": "s", "max_output_tokens": 4, "turn_id": "t-1"}
    async with locked.client(ACME) as acme, locked.client(OTHER) as other:
        await acme.post("/v1/responses", json=turn)

        theirs = (await other.post("/v1/responses", json={**turn, "input": "goodbye"})).json()

        assert (theirs["memory"]["replayed"], theirs["memory"]["base_version"]) == (False, 0)


@pytest.mark.anyio
async def test_a_file_brought_in_and_a_copy_stay_with_their_tenant(locked):
    turn = {"input": "hello", "conversation": "s", "max_output_tokens": 4}
    async with locked.client(ACME) as acme, locked.client(OTHER) as other:
        await acme.post("/v1/responses", json=turn)
        await other.post("/v1/responses", json=turn)
        file = (await acme.get("/v1/sessions/s/export")).content
        assert (await acme.put("/v1/sessions/t/import", content=file)).status_code == 201
        assert (await acme.post("/v1/sessions/s/fork", json={"id": "u"})).status_code == 201

        assert (await other.get("/v1/sessions/t")).status_code == 404
        assert (await other.get("/v1/sessions/u")).status_code == 404
        assert (await other.put("/v1/sessions/t/import", content=file)).status_code == 201
        assert len((await other.get("/v1/sessions")).json()["data"]) == 2


@pytest.mark.anyio
async def test_the_same_name_is_another_session_for_another_tenant(locked):
    turn = {"input": "hello", "conversation": "s", "max_output_tokens": 4}
    async with locked.client(ACME) as acme, locked.client(OTHER) as other:
        await acme.post("/v1/responses", json=turn)
        first = (await other.post("/v1/responses", json=turn)).json()
        await other.delete("/v1/sessions/s")

        assert first["memory"]["base_version"] == 0
        assert (await acme.get("/v1/sessions/s")).json()["turns"] == 1


# --- the gate itself ----------------------------------------------------------------------------


def test_without_keys_everybody_is_local():
    assert Gate((), ()).tenant(None) == LOCAL


def test_a_key_tells_its_tenant_wherever_it_stands_in_the_list():
    gate = Gate(KEYS, ())

    assert gate.tenant(f"Bearer {ACME}") == "acme"
    assert gate.tenant(f"Bearer {OTHER}") == "other"
    assert gate.tenant(None, f"hope, {protocol(OTHER)}") == "other"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", f"Basic {ACME}", ACME])
def test_what_is_no_bearer_key_is_refused(header):
    with pytest.raises(ApiError, match="Authorization: Bearer"):
        Gate(KEYS, ()).tenant(header)


def test_keys_are_not_held_in_clear():
    gate = Gate(KEYS, ())

    assert ACME not in repr(vars(gate))
