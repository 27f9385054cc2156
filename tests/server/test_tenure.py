"""One server writes a session at a time, and every one of them lets go of it."""

import asyncio

import pytest

from hope_runtime.tokenizer import Role
from memory_store import Conflict, LocalStore, NotFound, SessionKey, Unavailable
from server.security import LOCAL
from server.turn import Began, Ended, Kept, Words
from server.wire import Outcome

pytestmark = pytest.mark.anyio

KEY = SessionKey(LOCAL, "s")
GONE = Unavailable("127.0.0.1:6379", "connection reset")
BRIEF = {"lease_seconds": 0.3, "stops": False}
LONG = 4000  # tokens; longer than any test listens


async def until_said(turn, words=2):
    while words:
        words -= isinstance(await anext(turn), Words)


async def end_of(turn):
    [ended] = [each async for each in turn if isinstance(each, Ended)]
    return ended


async def until(true, seconds=5.0):
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def is_free(store, key=KEY):
    """Tell whether nobody holds the session's lease."""
    session = store._sessions.get(key)
    return session is None or session.holder is None


def leases(house, event):
    return house.sample("hope_lease_events_total", event=event)


# --- two servers --------------------------------------------------------------------------------


async def test_a_turn_waits_for_another_servers_turn_to_end(build, fragile):
    async with (
        build(fragile, server_id="a", stops=False) as left,
        build(fragile, server_id="b", stops=False) as right,
    ):
        fragile.going_on.clear()
        first = left.start("hello")
        await until_said(first)
        second = right.start("and then?")
        await asyncio.sleep(0.15)
        fragile.going_on.set()

        assert (await end_of(first)).memory.outcome is Outcome.COMMITTED
        happenings = [each async for each in second]

    [began] = [each for each in happenings if isinstance(each, Began)]
    assert began.base_version >= 1
    assert (await right.head()).meta["book"]["turns"] == 2


async def test_a_session_that_another_server_does_not_let_go_of_is_busy(build, fragile):
    async with (
        build(fragile, server_id="a", **BRIEF) as left,
        build(fragile, server_id="b", **BRIEF) as right,
        right.client() as http,
    ):
        turn = left.start("hello", most=LONG)
        await until_said(turn)

        refused = await right.ended("hello")
        answer = await http.post("/v1/responses", json={"input": "hi", "conversation": "s"})
        stranger = await right.ended("hello", "another")

        assert (refused.error.status, refused.error.code) == (409, "session_busy")
        assert "another server" in refused.error.message
        assert answer.status_code == 409
        assert int(answer.headers["retry-after"]) >= 1
        assert leases(right, "refused") == 2
        assert stranger.memory.outcome is Outcome.COMMITTED
        turn.cancel(keep=True)
        assert (await end_of(turn)).memory.outcome is Outcome.COMMITTED


async def test_a_server_that_is_started_again_takes_its_own_leases_over_at_once(build, fragile):
    await fragile.acquire(KEY, "a", seconds=600)  # and died
    async with build(fragile, server_id="b", **BRIEF) as other:
        assert (await other.ended("hello")).error.code == "session_busy"
    async with build(fragile, server_id="a", **BRIEF) as same:
        assert (await same.ended("hello")).memory.outcome is Outcome.COMMITTED


async def test_a_server_that_died_is_waited_for_until_its_lease_runs_out(build, fragile):
    await fragile.acquire(KEY, "a", seconds=0.2)
    async with build(fragile, server_id="b", stops=False) as other:
        assert (await other.ended("hello")).memory.outcome is Outcome.COMMITTED


# --- long turns, and leases that are lost -------------------------------------------------------


async def test_a_lease_is_renewed_while_a_turn_goes_on(build, fragile):
    async with build(fragile, **BRIEF) as house:
        turn = house.start("hello", most=LONG)
        await until(lambda: fragile.renewals >= 3)
        turn.cancel(keep=True)

        assert (await end_of(turn)).memory.outcome is Outcome.COMMITTED
        assert leases(house, "renewed") >= 3
        assert house.sample("hope_lease_renew_margin_seconds_count") >= 3
        assert leases(house, "lost") == 0
    assert is_free(fragile.kept)


async def test_a_store_that_is_silent_for_a_moment_does_not_end_a_turn(build, fragile):
    async with build(fragile, **BRIEF) as house:
        turn = house.start("hello", most=LONG)
        await until(lambda: fragile.renewals >= 1)
        fragile.deaf = GONE
        await asyncio.sleep(0.12)
        fragile.deaf = None
        seen = fragile.renewals
        await until(lambda: fragile.renewals > seen + 1)
        turn.cancel(keep=True)

        assert (await end_of(turn)).memory.outcome is Outcome.COMMITTED


async def test_a_lease_that_cannot_be_renewed_ends_the_turn_and_its_work(build, fragile):
    async with (
        build(fragile, server_id="a", **BRIEF) as left,
        build(fragile, server_id="b", **BRIEF) as right,
    ):
        turn = left.start("hello", most=LONG)
        await until_said(turn)
        fragile.deaf = GONE

        ended = await asyncio.wait_for(end_of(turn), 2)

        assert (ended.status, ended.error.status) == ("failed", 409)
        assert ended.error.code == "session_moved"
        assert ended.memory.outcome is Outcome.ROLLED_BACK
        assert leases(left, "lost") == 1
        await left.idle()
        with pytest.raises(NotFound):
            await left.head()
        fragile.deaf = None
        assert (await right.ended("hello")).memory.outcome is Outcome.COMMITTED
    assert left.sample("hope_leases_held") == 0


async def test_a_lease_that_another_acquired_ends_the_turn(build, fragile):
    async with build(fragile, **BRIEF) as house:
        turn = house.start("hello", most=LONG)
        await until_said(turn)
        fragile.kept._sessions[KEY].until = 0  # as if we had slept
        await fragile.acquire(KEY, "thief", seconds=30)

        ended = await asyncio.wait_for(end_of(turn), 2)

        assert ended.error.code == "session_moved"
        await house.idle()
    assert fragile.kept._sessions[KEY].holder == "thief"


async def test_a_lease_that_is_lost_while_committing_does_not_interrupt_the_commit(build, fragile):
    async with build(fragile, **BRIEF) as house:
        fragile.going_on.clear()
        turn = house.start("hello")
        await until_said(turn)
        fragile.deaf = GONE
        await until(lambda: leases(house, "lost") == 1)
        fragile.going_on.set()

        assert (await end_of(turn)).memory.outcome is Outcome.COMMITTED
        assert (await house.head()).version >= 1


async def test_of_two_who_commit_the_fence_lets_the_later_owner(build, fragile):
    async with build(fragile, **BRIEF) as house:
        await house.turn("hello", rates=((Role.USER, 0.0),))
        before = await house.head()
        fragile.going_on.clear()
        turn = house.start("my name is Ada", rates=((Role.USER, 0.0),))
        await until_said(turn)
        fragile.deaf = GONE
        await until(lambda: leases(house, "lost") == 1)
        fragile.kept._sessions[KEY].until = 0
        thief = await fragile.acquire(KEY, "thief", seconds=30)
        fragile.going_on.set()

        ended = await end_of(turn)

        assert ended.error.code == "session_moved"
        assert ended.memory.outcome is Outcome.ROLLED_BACK
        assert await house.head() == before
        assert leases(house, "fenced") == 1
        fragile.deaf = None
        await fragile.release(thief)
        assert (await house.ended("my name is Ada")).memory.base_version == 1


# --- letting go ---------------------------------------------------------------------------------


async def completed(house, store):
    return await house.ended("hello", most=3)


async def failed(house, store):
    store.failures.append(Conflict("s", expected=0, found=1))
    return await house.ended("hello")


async def refused(house, store):
    return await house.ended("hello", if_version=7)


async def stopped(house, store):
    turn = house.start("hello", most=LONG)
    await until_said(turn)
    turn.cancel(keep=True)
    return await end_of(turn)


async def left(house, store):
    turn = house.start("hello", most=LONG)
    await until_said(turn)
    turn.cancel(keep=False)
    return await end_of(turn)


async def drained(house, store):
    turn = house.start("hello", most=LONG)
    await until_said(turn)
    await house.turns.drain(0)
    return await end_of(turn)


async def drained_while_committing(house, store):
    store.going_on.clear()
    turn = house.start("hello")
    await until_said(turn)
    await house.turns.drain(0.02)
    return await end_of(turn)


@pytest.mark.parametrize(
    "end", [completed, failed, refused, stopped, left, drained, drained_while_committing]
)
async def test_the_lease_is_let_go_of_however_a_turn_ends(build, fragile, end):
    async with build(fragile, stops=False) as house:
        await end(house, fragile)
        await house.idle()

        assert is_free(fragile.kept)
        assert leases(house, "acquired") == leases(house, "released") == 1
        assert house.sample("hope_leases_held") == 0
        assert leases(house, "lost") == 0


async def test_the_lease_is_held_until_the_consolidation_is_committed(build, fragile):
    async with build(fragile, stops=False) as house:
        turn = house.start("hello", most=20, rates=((Role.ASSISTANT, 1.0),))
        while not isinstance(await anext(turn), Ended):
            pass
        assert house.sample("hope_leases_held") == 1
        assert [each for each in [each async for each in turn] if isinstance(each, Kept)]
        await house.idle()
        assert house.sample("hope_leases_held") == 0


async def test_a_turn_that_is_cut_off_while_it_asks_for_the_lease_does_not_keep_it(build, fragile):
    class Slow(type(fragile)):
        async def acquire(self, key, owner, *, seconds):
            lease = await super().acquire(key, owner, seconds=seconds)
            await asyncio.sleep(0.1)  # the reply is on its way
            return lease

    store = Slow()
    async with build(store, stops=False) as house:
        turn = house.start("hello")
        await asyncio.sleep(0.02)
        await house.turns.drain(0)

        assert (await end_of(turn)).error.code == "draining"
    assert is_free(store.kept)


async def test_a_renewal_that_is_under_way_does_not_take_the_lease_again(build, fragile):
    class Slow(type(fragile)):
        async def renew(self, held, *, seconds):
            self.renewals += 1
            await asyncio.sleep(0.1)  # on its way
            return await self.kept.renew(held, seconds=seconds)

    store = Slow()
    async with build(store, **BRIEF) as house:
        turn = house.start("hello", most=LONG)
        await until(lambda: store.renewals == 1)
        turn.cancel(keep=True)

        assert (await end_of(turn)).memory.outcome is Outcome.COMMITTED
        await house.idle()
        await asyncio.sleep(0.15)
        assert is_free(store.kept)


async def test_a_store_that_takes_nothing_back_holds_nobody_up_for_long(
    build, fragile, monkeypatch
):
    class Stubborn(type(fragile)):
        async def release(self, held):
            await asyncio.Event().wait()

    monkeypatch.setattr("server.tenure._FAREWELL_S", 0.05)
    async with build(Stubborn(), stops=False) as house:
        assert (await house.ended("hello")).memory.outcome is Outcome.COMMITTED
        await house.idle(2)


async def test_turns_that_only_look_take_no_lease(build, fragile):
    async with build(fragile, server_id="a", stops=False) as house:
        await house.turn("hello")
        await fragile.acquire(KEY, "b", seconds=600)

        assert await house.probe()
        assert await house.reply("hello", session=None)


# --- cut off anywhere ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "valkey"])
async def test_a_turn_that_is_cut_off_anywhere_was_had_whole_or_not_at_all(build, lasting, kind):
    """The oracle is a server that has just the turns which the transcript shows."""
    store = LocalStore() if kind == "memory" else lasting
    learn = {"rates": ((Role.USER, 1.0), (Role.ASSISTANT, 1.0))}
    async with build(store, stops=False) as house:
        for cut in range(14):
            turn = house.start(f"it rains on {cut} hills today", most=6, **learn)
            for _ in range(cut**2):
                await asyncio.sleep(0.0005)
            house.turns.drop()
            async for _ in turn:
                pass
            await house.idle()
            assert house.sample("hope_leases_held") == 0
        ended = await house.ended("who am I?", **learn)
        assert ended.memory.outcome is Outcome.COMMITTED
        assert ended.memory.recovered is None
        assert leases(house, "lost") == leases(house, "refused") == 0
        await house.idle()
        texts = [record.payload["items"][0][1] for record in await store.turns(KEY)]
        found = await house.probe()
    async with build(store, stops=False) as fresh:
        assert await fresh.probe() == found
    async with build(stops=False) as twin:
        for text in texts:
            await twin.turn(text, most=8 if text == "who am I?" else 6, **learn)
        assert await twin.probe() == found
    assert texts[-1] == "who am I?"
