"""What was acknowledged stays, whatever becomes of a copy in RAM, of a version, or of a store."""

import asyncio
import copy
from contextlib import asynccontextmanager

import pytest

from hope_runtime.tokenizer import Role
from memory_store import LocalStore, SessionKey, Unavailable
from server.security import LOCAL
from server.turn import Began, Ended, Words
from server.wire import Mode, Outcome

pytestmark = pytest.mark.anyio

KEY = SessionKey(LOCAL, "s")
QUIET = {"rates": ((Role.USER, 0.0),)}  # one version a turn
GONE = Unavailable("127.0.0.1:6379", "connection reset")
HEAD = "hope:{local:s}:h"


def said(happenings):
    return "".join(each.text for each in happenings if isinstance(each, Words))


def one(kind, happenings):
    [found] = [each for each in happenings if isinstance(each, kind)]
    return found


def picture(store):
    """Return all that a store in RAM holds."""
    return copy.deepcopy(store._sessions)


def rewind(store, before):
    """Let the store go back to a picture, as a replica does that is promoted too early."""
    store._sessions = copy.deepcopy(before)


def regressions(house):
    return house.sample("hope_store_version_regressions_total")


@asynccontextmanager
async def two_servers(build, store):
    async with (
        build(store, server_id="a", stops=False) as left,
        build(store, server_id="b", stops=False) as right,
    ):
        yield left, right


async def talk(build, *texts, session="s"):
    """Return the last of the replies of a server that nothing ever happens to."""
    async with build(stops=False) as twin:
        return [await twin.reply(text, session) for text in texts][-1]


# --- copies in RAM ------------------------------------------------------------------------------


async def test_a_server_that_is_asked_again_reads_what_another_wrote_meanwhile(build):
    texts = ("my name is Ada", "it rains in the hills", "who am I?", "and where?")
    store = LocalStore()
    async with two_servers(build, store) as (left, right):
        replies, sources = [], []
        for house, text in zip((left, right, left, right), texts, strict=True):
            happenings = await house.turn(text)
            sources.append(one(Began, happenings).source)
            replies.append(said(happenings))

    assert sources == ["new", "store", "store", "store"]
    assert replies[-1] == await talk(build, *texts)
    assert replies[-2] == await talk(build, *texts[:3])
    assert regressions(left) == regressions(right) == 0


async def test_sessions_on_two_servers_never_mix(build):
    names = ("ada", "bob", "eve")
    texts = ("my name is {}", "what rains on {}?", "who am I?")
    store = LocalStore()
    replies = {name: [] for name in names}
    async with two_servers(build, store) as (left, right):
        for number, text in enumerate(texts):
            houses = [(left, right)[(number + place) % 2] for place in range(3)]
            turns = [
                house.reply(text.format(name), name)
                for house, name in zip(houses, names, strict=True)
            ]
            for name, reply in zip(names, await asyncio.gather(*turns), strict=True):
                replies[name].append(reply)

    for name in names:
        mine = [text.format(name) for text in texts]
        assert replies[name][-1] == await talk(build, *mine, session=name)


async def test_a_version_of_the_same_number_is_not_taken_for_the_one_in_ram(build):
    store = LocalStore()
    async with two_servers(build, store) as (left, right):
        await left.turn("my name is Ada", **QUIET)
        before = picture(store)
        await left.turn("it rains", **QUIET)
        rewind(store, before)
        await right.turn("it snows", **QUIET)

        looked = await left.turn("who am I?", mode=Mode.READ_ONLY)
        happenings = await left.turn("who am I?", **QUIET)

    assert one(Began, looked).source == one(Began, happenings).source == "store"
    ended = one(Ended, happenings)
    assert ended.memory.base_version == 2
    assert "which stands" in ended.memory.recovered
    assert regressions(left) == 1
    async with build(stops=False) as twin:
        for text in ("my name is Ada", "it snows"):
            await twin.turn(text, **QUIET)
        assert said(happenings) == await twin.reply("who am I?", **QUIET)


# --- a store that goes back ---------------------------------------------------------------------


async def test_versions_that_the_store_lost_are_committed_again_from_ram(build):
    store = LocalStore()
    async with build(store, stops=False) as house, build(stops=False) as twin:
        pictures = []
        for number in range(3):
            await house.turn(f"hello {number}", turn_id=f"t{number}", **QUIET)
            await twin.turn(f"hello {number}", **QUIET)
            pictures.append(picture(store))
        rewind(store, pictures[0])

        happenings = await house.turn("who am I?", **QUIET)

        ended = one(Ended, happenings)
        assert said(happenings) == await twin.reply("who am I?", **QUIET)
        assert (ended.memory.base_version, ended.memory.committed_version) == (4, 5)
        assert "went back from version 3 to 1" in ended.memory.recovered
        assert "restored from memory as 4" in ended.memory.recovered
        assert regressions(house) == 1
        records = await store.turns(KEY)
        texts = [record.payload["items"][0][1] for record in records]
        assert texts == ["hello 0", "hello 1", "hello 2", "who am I?"]
        again = await house.ended("hello 2", turn_id="t2", **QUIET)
        assert again.memory.replayed
        assert (await house.ended("and now?")).memory.recovered is None
        assert regressions(house) == 1


async def test_a_session_that_the_store_lost_altogether_is_still_in_ram(build):
    store = LocalStore()
    async with build(store, stops=False) as house:
        for text in ("hello", "my name is Ada"):
            await house.turn(text, **QUIET)
        rewind(store, {})

        ended = await house.ended("who am I?", **QUIET)

        assert ended.memory.base_version == 3
        assert "went back from version 2 to 0" in ended.memory.recovered
        assert len(await store.turns(KEY)) == 3
        assert (await house.head()).meta["book"]["turns"] == 3


async def test_a_turn_that_the_store_lost_is_not_learned_again_when_it_is_retried(build):
    store = LocalStore()
    async with build(store, stops=False) as house:
        await house.turn("hello", **QUIET)
        before = picture(store)
        first = await house.turn("my name is Ada", turn_id="t", **QUIET)
        rewind(store, before)

        again = await house.turn("my name is Ada", turn_id="t", **QUIET)

        ended = one(Ended, again)
        assert said(again) == said(first)
        assert ended.memory.replayed
        assert "went back" in ended.memory.recovered
        assert (await house.head()).meta["book"]["turns"] == 2


async def test_a_turn_that_was_under_way_when_the_store_went_back_costs_nothing_else(
    build, fragile
):
    """The commit fails, as it does when a store crashes; what was told before is still here."""
    async with build(fragile, stops=False) as house:
        await house.turn("hello", **QUIET)
        before = picture(fragile.kept)
        await house.turn("my name is Ada", **QUIET)
        fragile.failures.append(GONE)
        assert (await house.ended("lost", **QUIET)).memory.outcome is Outcome.UNKNOWN
        rewind(fragile.kept, before)

        ended = await house.ended("who am I?", **QUIET)

        assert "went back from version 2 to 1" in ended.memory.recovered
        assert ended.memory.base_version == 3
        assert (await house.head()).meta["book"]["turns"] == 3


async def test_a_store_that_goes_back_under_a_turn_ends_it_and_loses_nothing(build, fragile):
    async with build(fragile, stops=False) as house:
        await house.turn("hello", **QUIET)
        before = picture(fragile.kept)
        await house.turn("my name is Ada", **QUIET)
        fragile.going_on.clear()
        turn = house.start("who am I?", **QUIET)
        while not isinstance(await anext(turn), Words):
            pass
        rewind(fragile.kept, before)
        fragile.going_on.set()

        ended = one(Ended, [each async for each in turn])
        assert ended.error.code == "session_moved"
        again = await house.ended("who am I?", **QUIET)

        assert again.memory.base_version == 3
        assert "restored from memory" in again.memory.recovered


async def test_what_is_lost_and_not_in_ram_is_counted_and_told(build):
    store = LocalStore()
    async with build(store, stops=False) as house:
        await house.turn("hello", **QUIET)
        before = picture(store)
        await house.turn("my name is Ada", **QUIET)
        house.service.residency.drop(KEY)
        rewind(store, before)

        ended = await house.ended("who am I?", **QUIET)
        later = await house.ended("and now?", **QUIET)

    assert ended.memory.base_version == 1
    assert ended.memory.committed_version == 3, "a number is never given out twice"
    assert "went back from version 2 to 1, which stands" in ended.memory.recovered
    assert later.memory.recovered is None
    assert regressions(house) == 1


async def test_a_lost_session_that_is_not_in_ram_is_not_begun_anew_in_silence(build):
    store = LocalStore()
    async with build(store, stops=False) as house:
        await house.turn("hello", **QUIET)
        house.service.residency.drop(KEY)
        rewind(store, {})

        looked = await house.ended("who am I?", mode=Mode.READ_ONLY)
        ended = await house.ended("who am I?", **QUIET)

    assert "went back from version 1 to 0" in looked.memory.recovered
    assert "went back from version 1 to 0" in ended.memory.recovered
    assert regressions(house) == 1


async def test_what_another_server_committed_since_the_store_went_back_stands(build):
    store = LocalStore()
    async with two_servers(build, store) as (left, right):
        await left.turn("hello", **QUIET)
        before = picture(store)
        for text in ("my name is Ada", "it rains"):
            await left.turn(text, **QUIET)
        rewind(store, before)
        await right.turn("my name is Eve", **QUIET)

        ended = await left.ended("who am I?", **QUIET)

    assert ended.memory.base_version == 2
    assert "went back from version 3 to 2, which stands" in ended.memory.recovered
    assert regressions(left) == 1
    items = [record.payload["items"][0][1] for record in await store.turns(KEY)]
    assert items == ["hello", "my name is Eve", "who am I?"]


async def test_a_read_only_turn_says_that_the_store_went_back_and_commits_nothing(build):
    store = LocalStore()
    async with build(store, stops=False) as house:
        await house.turn("hello", **QUIET)
        before = picture(store)
        await house.turn("my name is Ada", **QUIET)
        rewind(store, before)

        ended = await house.ended("who am I?", mode=Mode.READ_ONLY)
        head = await house.head()
        after = await house.ended("who am I?", **QUIET)

    assert "went back from version 2 to 1" in ended.memory.recovered
    assert (head.version, ended.memory.outcome) == (1, Outcome.READ_ONLY)
    assert after.memory.base_version == 3


async def test_a_rollback_after_the_store_went_back_gives_no_number_out_twice(build):
    store = LocalStore()
    async with build(store, stops=False) as house, house.client() as http:
        await house.turn("hello", **QUIET)
        before = picture(store)
        for text in ("my name is Ada", "it rains"):
            await house.turn(text, **QUIET)
        rewind(store, before)

        made = (await http.post("/v1/sessions/s/rollback", json={"version": 1})).json()

    assert made["version"] == 4


async def copied(raw):
    """Return every key of the real store."""
    return {name: await raw.dump(name) async for name in raw.scan_iter("*")}


async def put_back(raw, keys):
    await raw.flushall()
    for name, value in keys.items():
        await raw.restore(name, 0, value)


async def test_a_real_store_that_is_restored_from_a_backup_gets_back_what_ram_has(
    build, lasting, raw
):
    async with build(lasting, stops=False) as house, build(stops=False) as twin:
        texts = ("my name is Ada", "it rains", "in the hills")
        backup = {}
        for text in texts:
            await house.turn(text)
            await twin.turn(text)
            await house.idle()
            backup = backup or await copied(raw)
        told = (await house.head()).version
        await put_back(raw, backup)

        happenings = await house.turn("who am I?")

        ended = one(Ended, happenings)
        assert said(happenings) == await twin.reply("who am I?")
        assert ended.memory.base_version == told + 1
        assert "restored from memory" in ended.memory.recovered
        assert regressions(house) == 1
        assert len(await lasting.turns(KEY)) == 4
    async with build(lasting, stops=False) as fresh:
        assert await fresh.probe() == await twin_probe(build, *texts, "who am I?")


async def twin_probe(build, *texts):
    async with build(stops=False) as twin:
        for text in texts:
            await twin.turn(text)
        return await twin.probe()


async def test_a_real_store_that_goes_back_under_a_turn_refuses_its_commit(build, lasting, raw):
    async with build(lasting, stops=False) as house:
        await house.turn("hello", **QUIET)
        backup = await copied(raw)
        await house.turn("my name is Ada", **QUIET)
        turn = house.start("who am I?", most=4000, **QUIET)
        while not isinstance(await anext(turn), Words):
            pass
        await put_back(raw, backup)
        turn.cancel(keep=True)

        ended = one(Ended, [each async for each in turn])
        assert ended.error.code == "session_moved"
        assert ended.memory.outcome is Outcome.ROLLED_BACK
        again = await house.ended("who am I?", **QUIET)

    assert (again.memory.base_version, again.memory.outcome) == (3, Outcome.COMMITTED)
    assert "restored from memory" in again.memory.recovered


# --- versions that are damaged ------------------------------------------------------------------


async def blobs(raw):
    return {name async for name in raw.scan_iter("hope:{local:s}:b:*")}


async def flip(raw, name, field):
    damaged = bytearray(await raw.hget(name, field))
    damaged[len(damaged) // 2] ^= 1
    await raw.hset(name, field, bytes(damaged))


@pytest.fixture
async def two_versions(build, lasting, raw):
    """A session of two turns and versions; return the blobs that each has put."""
    async with build(lasting, stops=False) as house:
        await house.turn("my name is Ada", **QUIET)
        first = await blobs(raw)
        await house.turn("it rains", **QUIET)
    return first, await blobs(raw) - first


@pytest.mark.parametrize("part", ["blob", "manifest"])
async def test_a_session_whose_last_version_is_damaged_goes_on_from_the_one_before(
    build, lasting, raw, two_versions, part
):
    _, second = two_versions
    await (flip(raw, min(second), 0) if part == "blob" else flip(raw, HEAD, "man"))
    async with build(lasting, stops=False) as house, build(stops=False) as twin:
        await twin.turn("my name is Ada", **QUIET)

        looked = await house.turn("who am I?", mode=Mode.READ_ONLY)
        assert (await raw.hget(HEAD, "ver")) == b"2"
        happenings = await house.turn("who am I?", **QUIET)

        for each in (looked, happenings):
            recovered = one(Ended, each).memory.recovered
            assert "version 2 is damaged" in recovered
            assert "version 1 stands in" in recovered
        ended = one(Ended, happenings)
        assert one(Ended, looked).memory.outcome is Outcome.READ_ONLY
        assert "it is version 3 now" in ended.memory.recovered
        assert (ended.memory.base_version, ended.memory.committed_version) == (3, 4)
        assert said(looked) == await twin.reply("who am I?", mode=Mode.READ_ONLY)
        assert said(happenings) == await twin.reply("who am I?", **QUIET)
        items = [record.payload["items"][0][1] for record in await lasting.turns(KEY)]
        assert items == ["my name is Ada", "who am I?"]
        assert (await house.ended("and now?")).memory.recovered is None
        assert house.sample("hope_store_corrupt_total") >= 1


async def test_a_session_of_which_nothing_is_whole_is_an_error_and_stays_as_it_is(
    build, lasting, raw, two_versions
):
    first, second = two_versions
    for name in first | second:
        await flip(raw, name, 0)
    before = {name: await raw.dump(name) for name in first | second}
    async with build(lasting, stops=False) as house, house.client() as http:
        said = {"input": "hello", "conversation": "s", "max_output_tokens": 4}
        for mode in ("read_write", "read_only"):
            answer = await http.post("/v1/responses", json={**said, "memory": {"mode": mode}})
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "memory_corrupt"
            assert "version 1" in answer.json()["error"]["message"]
        assert (await house.head()).version == 2
    assert {name: await raw.dump(name) for name in before} == before


async def test_a_blob_that_vanished_under_a_session_in_ram_is_written_again(build, lasting, raw):
    async with build(lasting, stops=False) as house, build(stops=False) as twin:
        for text in ("my name is Ada in the hills", "it rains in the hills today and all week"):
            await house.turn(text)
            await twin.turn(text)
        await house.idle()
        for name in await blobs(raw):
            await raw.delete(name)

        ended = await house.ended("who am I?")
        await twin.turn("who am I?")
        expected = await twin.probe()

        assert ended.memory.outcome is Outcome.COMMITTED
    async with build(lasting, stops=False) as fresh:
        assert await fresh.probe() == expected
