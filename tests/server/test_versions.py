"""Sessions as things: older versions, copies, frozen ones, and the end of them."""

import asyncio

import pytest

from hope_runtime.tokenizer import Role
from memory_store import LocalStore, NotFound, SessionKey
from server.security import LOCAL
from server.turn import Ended, Grown, Words
from server.wire import Mode, Outcome

pytestmark = pytest.mark.anyio

QUIET = {"rates": ((Role.USER, 0.0),)}  # one version a turn
LEARN = "it rains in the hills today and all week"
S = "/v1/sessions/s"


@pytest.fixture
async def http(endless):
    async with endless.client() as client:
        yield client


def refused(answer, status, code):
    assert answer.status_code == status, answer.text
    body = answer.json()["error"]
    assert body["code"] == code
    return body


async def until_said(turn, words=2):
    while words:
        words -= isinstance(await anext(turn), Words)


async def end_of(turn):
    [ended] = [each async for each in turn if isinstance(each, Ended)]
    return ended


async def transcript(http, session="s"):
    answer = await http.get(f"/v1/conversations/{session}/items")
    return [item["content"][0]["text"] for item in answer.json()["data"] if item["role"] == "user"]


# --- versions -----------------------------------------------------------------------------------


async def test_kept_versions_are_listed_the_newest_first(endless, http):
    for number in range(7):
        await endless.turn(f"hello {number}", **QUIET)

    body = (await http.get(f"{S}/versions")).json()

    assert [version["version"] for version in body["data"]] == [7, 6, 5, 4, 3]
    assert [version["parent"] for version in body["data"]] == [6, 5, 4, 3, 2]
    assert [version["turns"] for version in body["data"]] == [7, 6, 5, 4, 3]
    tokens = [version["tokens"] for version in body["data"]]
    assert tokens == sorted(tokens, reverse=True)
    assert body["data"][0]["levels"][0]["name"] == "fast"
    assert not body["data"][0]["frozen"]


async def test_a_rolled_back_session_is_what_it_was(build):
    store = LocalStore()
    async with build(store, stops=False) as house, house.client() as http:
        await house.turn("my name is Ada")
        await house.idle()
        version, before = (await house.head()).version, await house.probe()
        for text in (LEARN, "and snows"):
            await house.turn(text)
        await house.idle()
        last = (await house.head()).version
        assert await house.probe() != before

        made = (await http.post(f"{S}/rollback", json={"version": version})).json()

        assert made["version"] == last + 1
        assert made["turns"] == 1
        assert await house.probe() == before
        assert await transcript(http) == ["my name is Ada"]
        versions = (await http.get(f"{S}/versions")).json()["data"]
        assert versions[0]["parent"] == version
    async with build(store, stops=False) as house:
        assert await house.probe() == before


async def test_after_a_rollback_a_session_goes_on_as_if_the_turns_had_never_been(build):
    async with build(stops=False) as house, build(stops=False) as twin, house.client() as http:
        for each in (house, twin):
            await each.turn("my name is Ada")
            await each.idle()
        version = (await house.head()).version
        await house.turn(LEARN)
        await http.post(f"{S}/rollback", json={"version": version})

        for text in ("it snows", LEARN, "who am I?"):
            assert await house.reply(text) == await twin.reply(text)
        assert await transcript(http) == ["my name is Ada", "it snows", LEARN, "who am I?"]


async def test_a_rollback_can_be_rolled_back(endless, http):
    for text in ("hello", "my name is Ada"):
        await endless.turn(text, **QUIET)
    known = await endless.probe()
    await http.post(f"{S}/rollback", json={"version": 1})

    await http.post(f"{S}/rollback", json={"version": 2})

    assert await endless.probe() == known
    assert await transcript(http) == ["hello", "my name is Ada"]


async def test_a_rollback_may_name_the_version_it_expects(endless, http):
    for _ in range(2):
        await endless.turn("hello", **QUIET)

    for name in ('"7"', "7", 'W/"1"'):
        answer = await http.post(f"{S}/rollback", json={"version": 1}, headers={"If-Match": name})
        assert "is at version 2" in refused(answer, 412, "precondition_failed")["message"]
    answer = await http.post(f"{S}/rollback", json={"version": 1}, headers={"If-Match": "x"})
    assert refused(answer, 400, "invalid_request")["param"] == "If-Match"
    for name, expected in (('"2"', 3), ("*", 4)):
        answer = await http.post(f"{S}/rollback", json={"version": 1}, headers={"If-Match": name})
        assert answer.json()["version"] == expected


@pytest.mark.parametrize("version", [8, 1])
async def test_a_version_that_is_not_kept_is_not_found(endless, http, version):
    for _ in range(7):
        await endless.turn("hello", **QUIET)

    answer = await http.post(f"{S}/rollback", json={"version": version})
    error = refused(answer, 404, "version_not_found")
    assert error["param"] == "version"
    assert "versions 3 to 7 are kept" in error["message"]
    refused(await http.post(f"{S}/fork", json={"version": version}), 404, "version_not_found")
    refused(await http.get(f"{S}/export", params={"version": version}), 404, "version_not_found")
    refused(await http.get(f"{S}/diff", params={"from": version}), 404, "version_not_found")
    assert (await endless.head()).version == 7


@pytest.mark.parametrize("body", [{}, {"version": 0}, {"version": "x"}, None])
async def test_a_rollback_to_no_version_is_refused(endless, http, body):
    await endless.turn("hello")

    refused(await http.post(f"{S}/rollback", json=body), 400, "invalid_request")


async def test_a_rollback_waits_for_the_turn_that_runs(build, fragile):
    async with build(fragile, stops=False) as house, house.client() as http:
        await house.turn("hello", **QUIET)
        turn = house.start("my name is Ada", most=200, **QUIET)
        await until_said(turn)

        made = (await http.post(f"{S}/rollback", json={"version": 1})).json()

        assert (await end_of(turn)).memory.committed_version == 2
        assert made["version"] == 3


# --- frozen sessions ----------------------------------------------------------------------------


async def test_a_frozen_session_is_read_and_nothing_changes_it(endless, http):
    await endless.turn("my name is Ada")
    await endless.idle()
    frozen = (await http.post(f"{S}/freeze")).json()
    assert frozen["frozen"]
    before = await endless.head()
    looked = await endless.reply(LEARN, most=16, mode=Mode.READ_ONLY)

    happenings = await endless.turn(LEARN, most=16)

    [ended] = [each for each in happenings if isinstance(each, Ended)]
    assert ended.memory.outcome is Outcome.READ_ONLY
    assert (ended.memory.committed_version, ended.memory.updates) == (None, 0)
    assert not [each for each in happenings if isinstance(each, Grown)]
    assert "".join(each.text for each in happenings if isinstance(each, Words)) == looked
    assert await endless.head() == before
    assert await transcript(http) == ["my name is Ada"]


async def test_a_session_that_is_thawed_goes_on_as_if_it_had_never_been_frozen(build):
    async with build(stops=False) as house, build(stops=False) as twin, house.client() as http:
        await house.turn("my name is Ada")
        await twin.turn("my name is Ada")
        for _ in range(2):  # the second time changes nothing
            version = (await http.post(f"{S}/freeze")).json()["version"]
        await house.turn(LEARN)
        thawed = (await http.post(f"{S}/unfreeze")).json()

        assert (thawed["frozen"], thawed["version"]) == (False, version + 1)
        assert await house.reply("who am I?") == await twin.reply("who am I?")


async def test_a_frozen_session_is_not_rolled_back(endless, http):
    for _ in range(2):
        await endless.turn("hello", **QUIET)
    await http.post(f"{S}/freeze")

    refused(await http.post(f"{S}/rollback", json={"version": 1}), 409, "session_frozen")
    await http.post(f"{S}/unfreeze")
    assert (await http.post(f"{S}/rollback", json={"version": 1})).status_code == 200


async def test_freezing_takes_a_condition_and_a_session(endless, http):
    await endless.turn("hello", **QUIET)

    for verb in ("freeze", "unfreeze"):
        answer = await http.post(f"{S}/{verb}", headers={"If-Match": '"7"'})
        refused(answer, 412, "precondition_failed")
        refused(await http.post(f"/v1/sessions/t/{verb}"), 404, "conversation_not_found")
    with pytest.raises(NotFound):
        await endless.head("t")


# --- copies -------------------------------------------------------------------------------------


async def test_a_fork_is_the_same_and_both_go_on_by_themselves(build):
    async with build(stops=False) as house, build(stops=False) as twin, house.client() as http:
        for each in (house, twin):
            await each.turn("my name is Ada")
            await each.turn(LEARN)
            await each.idle()

        answer = await http.post(f"{S}/fork", json={"id": "copy"})

        made = answer.json()
        assert (answer.status_code, made["id"], made["version"]) == (201, "copy", 1)
        assert made["turns"] == 2
        assert await house.probe("copy") == await house.probe()
        assert await transcript(http, "copy") == ["my name is Ada", LEARN]
        assert await house.reply("it snows", "copy") != ""
        for text in ("and now?", "who am I?"):
            assert await house.reply(text) == await twin.reply(text)
        assert await transcript(http, "copy") == ["my name is Ada", LEARN, "it snows"]
        await http.delete(S)
        assert await house.probe("copy")


async def test_an_older_version_can_be_forked_with_the_transcript_it_had(endless, http):
    await endless.turn("hello", **QUIET)
    known = await endless.probe()
    await endless.turn("my name is Ada", turn_id="t", **QUIET)

    made = (await http.post(f"{S}/fork", json={"version": 1})).json()

    assert made["id"].startswith("conv_")
    assert await endless.probe(made["id"]) == known
    assert await transcript(http, made["id"]) == ["hello"]
    ended = await endless.ended("my name is Ada", made["id"], turn_id="t", **QUIET)
    assert not ended.memory.replayed


async def test_a_turn_id_of_the_original_is_known_to_its_fork(endless, http):
    await endless.turn("hello", turn_id="t", **QUIET)
    await http.post(f"{S}/fork", json={"id": "copy"})

    assert (await endless.ended("hello", "copy", turn_id="t", **QUIET)).memory.replayed


async def test_a_fork_takes_no_place_of_another_session(endless, http):
    for name in ("s", "t", "gone"):
        await endless.turn("hello", name, **QUIET)
    await http.delete("/v1/sessions/gone")

    for target in ("t", "s"):
        answer = await http.post(f"{S}/fork", json={"id": target})
        assert refused(answer, 409, "session_exists")["param"] == "id"
    refused(await http.post(f"{S}/fork", json={"id": "gone"}), 410, "session_deleted")
    refused(await http.post(f"{S}/fork", json={"id": "a b"}), 400, "invalid_request")
    refused(await http.post(f"{S}/fork", json={"name": "copy"}), 400, "invalid_request")
    answer = await http.post("/v1/sessions/none/fork", json={"id": "new"})
    refused(answer, 404, "conversation_not_found")
    assert (await endless.head("t")).version == 1
    with pytest.raises(NotFound):
        await endless.head("new")


async def test_a_fork_of_a_frozen_session_can_be_written(endless, http):
    await endless.turn("hello", user="ada", **QUIET)
    await http.post(f"{S}/freeze")

    made = (await http.post(f"{S}/fork", json={"id": "copy"})).json()
    other = (await http.post(f"{S}/fork", json={"id": "other", "user": "eve"})).json()

    assert (made["frozen"], made["user"], other["user"]) == (False, "ada", "eve")
    assert (await endless.ended("hello", "copy", **QUIET)).memory.outcome is Outcome.COMMITTED


# --- differences --------------------------------------------------------------------------------


async def test_a_difference_tells_how_far_each_level_moved(endless, http):
    await endless.turn(LEARN)
    await endless.idle()
    first = (await endless.head()).version
    await endless.turn(f"{LEARN}, they say")
    await endless.idle()
    last = (await endless.head()).version

    body = (await http.get(f"{S}/diff", params={"from": first, "to": last})).json()
    back = (await http.get(f"{S}/diff", params={"from": last, "to": first})).json()
    usual = (await http.get(f"{S}/diff")).json()

    assert (body["id"], body["from_version"], body["to_version"]) == ("s", first, last)
    assert (usual["from_version"], usual["to_version"]) == (last - 1, last)
    assert body["tokens"] == -back["tokens"] > 40
    assert [level["name"] for level in body["levels"]] == ["fast", "slow"]
    for level, other in zip(body["levels"], back["levels"], strict=True):
        assert level["norm_from"] > 0
        assert level["distance"] > 0
        assert level["change"] == pytest.approx(level["distance"] / level["norm_from"])
        assert other["distance"] == pytest.approx(level["distance"])
        assert (other["norm_from"], other["norm_to"]) == (level["norm_to"], level["norm_from"])


async def test_a_version_is_no_distance_from_itself(endless, http):
    await endless.turn(LEARN)
    await endless.idle()
    version = (await endless.head()).version

    body = (await http.get(f"{S}/diff", params={"from": version, "to": version})).json()

    assert body["tokens"] == 0
    assert {level["distance"] for level in body["levels"]} == {0.0}


async def test_a_session_of_one_version_differs_from_nothing(endless, http):
    await endless.turn("hello", **QUIET)

    body = (await http.get(f"{S}/diff")).json()

    assert (body["from_version"], body["to_version"], body["tokens"]) == (1, 1, 0)
    refused(await http.get(f"{S}/diff", params={"from": 0}), 400, "invalid_request")


# --- the end ------------------------------------------------------------------------------------


async def test_a_session_that_is_deleted_ends_its_turns_at_once(endless, http):
    await endless.turn("hello", **QUIET)
    running = endless.start("my name is Ada", most=4000)
    waiting = endless.start("and then?")
    other = endless.start("hello", "other", most=40)
    await until_said(running)

    receipt = (await http.delete(S)).json()

    for turn in (running, waiting):
        ended = await asyncio.wait_for(end_of(turn), 1)
        assert (ended.error.status, ended.error.code) == (410, "session_deleted")
        assert ended.memory.outcome is Outcome.ROLLED_BACK
    assert (await end_of(other)).memory.outcome is Outcome.COMMITTED
    await endless.idle()
    assert receipt["deleted"]
    assert receipt["keys"] > 0
    assert (receipt["left"], receipt["remains"]) == (
        0,
        "nowhere: this store is the process's memory",
    )
    assert SessionKey(LOCAL, "s") not in endless.service.residency._held
    assert SessionKey(LOCAL, "s") not in endless.store._sessions
    assert endless.sample("hope_leases_held") == 0
    refused(await http.get(S), 410, "session_deleted")


async def test_a_delete_while_a_turn_commits_leaves_nothing(build, fragile):
    async with build(fragile, stops=False) as house, house.client() as http:
        await house.turn("hello", **QUIET)
        fragile.going_on.clear()
        turn = house.start("my name is Ada")
        await until_said(turn)
        await http.delete(S)
        fragile.going_on.set()

        assert (await end_of(turn)).error.code == "session_deleted"
        await house.idle()
        assert fragile.kept._sessions == {}
        assert len(house.service.residency) == 0


async def test_nothing_of_a_deleted_session_is_left_in_a_real_store(build, lasting, raw):
    async with build(lasting, stops=False) as house, house.client() as http:
        for text in ("my name is Ada", LEARN):
            await house.turn(text)
        turn = house.start("who am I?", most=4000)
        await until_said(turn)

        receipt = (await http.delete(S)).json()

        assert (await end_of(turn)).error.code == "session_deleted"
        await house.idle()
        assert receipt["left"] == 0
        assert receipt["bytes"] > 1000
        assert "append-only file" in receipt["remains"]
        assert [name async for name in raw.scan_iter("hope:{local:s}:*")] == [b"hope:{local:s}:h"]
        assert sorted(await raw.hkeys("hope:{local:s}:h")) == [b"tomb", b"ver"]


async def test_a_session_that_another_server_deleted_leaves_ram(build):
    store = LocalStore()
    async with (
        build(store, server_id="a", stops=False) as left,
        build(store, server_id="b", stops=False) as right,
        right.client() as http,
    ):
        await left.turn("hello", **QUIET)
        await http.delete(S)

        assert (await left.ended("hello")).error.code == "session_deleted"
        assert len(left.service.residency) == 0


# --- persons ------------------------------------------------------------------------------------


async def test_a_session_knows_whose_it_is(endless, http):
    say = {"input": "hello", "conversation": "s", "max_output_tokens": 4}
    assert (await http.post("/v1/responses", json=say)).status_code == 200
    assert (await http.get(S)).json()["user"] is None
    await http.post("/v1/responses", json={**say, "user": "ada"})
    assert (await http.get(S)).json()["user"] == "ada"

    stranger = await http.post("/v1/responses", json={**say, "user": "eve"})
    nobody = await http.post("/v1/responses", json=say)

    assert refused(stranger, 409, "user_mismatch")["param"] == "user"
    assert nobody.status_code == 200
    assert (await http.get(S)).json()["user"] == "ada"
    made = (await http.post("/v1/conversations", json={"user": "eve"})).json()
    assert (await http.get(f"/v1/sessions/{made['id']}")).json()["user"] == "eve"


async def test_chats_have_persons_too(endless, http):
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "conversation": "s",
        "max_tokens": 2,
        "user": "ada",
    }
    await http.post("/v1/chat/completions", json=body)

    assert (await http.get(S)).json()["user"] == "ada"
    answer = await http.post("/v1/chat/completions", json={**body, "user": "eve"})
    refused(answer, 409, "user_mismatch")


@pytest.mark.parametrize("kind", ["memory", "valkey"])
async def test_all_of_a_person_is_deleted_and_nothing_of_others(build, lasting, kind):
    acme, other = "acme-key-0123456789", "other-key-0123456789"
    keys = (f"acme:{acme}", f"other:{other}")
    store = lasting if kind == "valkey" else LocalStore()
    async with (
        build(store, stops=False, api_keys=keys) as house,
        house.client(acme) as ours,
        house.client(other) as theirs,
    ):
        for http, name, user in (
            (ours, "a1", "ada/of the hills"),
            (ours, "a2", "ada/of the hills"),
            (ours, "e1", "eve"),
            (ours, "n1", None),
            (theirs, "a1", "ada/of the hills"),
        ):
            say = {"input": "hello", "conversation": name, "max_output_tokens": 4, "user": user}
            assert (await http.post("/v1/responses", json=say)).status_code == 200
        running = house.start(
            "hello", most=4000, key=SessionKey("acme", "a1"), user="ada/of the hills"
        )
        await until_said(running)

        body = (await ours.delete("/v1/users/ada%2Fof%20the%20hills/memory")).json()
        again = (await ours.delete("/v1/users/ada%2Fof%20the%20hills/memory")).json()

        assert (body["object"], body["user"]) == ("user.memory.deleted", "ada/of the hills")
        assert sorted(each["id"] for each in body["sessions"]) == ["a1", "a2"]
        assert body["keys"] == sum(each["keys"] for each in body["sessions"]) > 0
        assert body["left"] == 0
        assert again["sessions"] == []
        assert (await end_of(running)).error.code == "session_deleted"
        assert {s["id"] for s in (await ours.get("/v1/sessions")).json()["data"]} == {"e1", "n1"}
        assert {s["id"] for s in (await theirs.get("/v1/sessions")).json()["data"]} == {"a1"}
        refused(await ours.get("/v1/sessions/a1"), 410, "session_deleted")
