"""A turn is a transaction: it is learned exactly once, or not at all."""

import asyncio
from dataclasses import replace

import pytest
import torch

from hope_runtime.cadence import Due
from hope_runtime.state import LevelState, State
from hope_runtime.tokenizer import Message, Role
from memory_store import Conflict, Full, LocalStore, NotFound, SessionKey, Unavailable
from server.book import Book
from server.errors import ApiError
from server.residency import Resident
from server.security import LOCAL
from server.turn import Began, Ended, Grown, Kept, Words
from server.wire import METADATA_KEYS, Mode, Outcome

pytestmark = pytest.mark.anyio

LEARN_REPLIES = ((Role.ASSISTANT, 1.0),)  # makes every reply leave chunks due
GONE = Unavailable("127.0.0.1:6379", "connection reset")


def said(happenings):
    return "".join(each.text for each in happenings if isinstance(each, Words))


def one(kind, happenings):
    [found] = [each for each in happenings if isinstance(each, kind)]
    return found


def due(head):
    return head.meta["state"]["due"]


def updates(head):
    return {name: level["updates"] for name, level in head.meta["state"]["levels"].items()}


async def until_said(turn, words):
    """Listen until so many pieces were said."""
    while words:
        happening = await anext(turn)
        assert not isinstance(happening, Ended)
        words -= isinstance(happening, Words)


async def rest(turn):
    return [happening async for happening in turn]


# --- the ordinary turn --------------------------------------------------------------------------


async def test_a_turn_begins_speaks_keeps_and_ends(endless):
    happenings = await endless.turn("hello", most=5)

    kinds = [type(each) for each in happenings if not isinstance(each, Words | Grown)]
    assert kinds[:3] == [Began, Kept, Ended]
    ended = one(Ended, happenings)
    assert (ended.status, ended.reason, ended.said) == ("incomplete", "max_output_tokens", 5)
    assert ended.memory.outcome is Outcome.COMMITTED
    assert (ended.memory.base_version, ended.memory.committed_version) == (0, 1)


async def test_what_was_said_is_in_the_transcript(endless):
    turn = endless.start("hello", metadata=(("name", "Ada"),), turn_id="t-1")
    await rest(turn)

    [record] = await endless.store.turns(SessionKey(LOCAL, "s"))
    assert (record.turn_id, record.version) == ("t-1", 1)
    assert record.payload["items"] == [["user", "hello"], ["assistant", turn.text]]
    assert (await endless.head()).meta["book"]["metadata"] == {"name": "Ada"}


async def test_a_turn_without_an_id_gets_one_of_its_own(endless):
    turns = [endless.start("hello", most=2) for _ in range(2)]
    for turn in turns:
        await rest(turn)

    records = await endless.store.turns(SessionKey(LOCAL, "s"))
    assert [record.turn_id for record in records] == [turn.id for turn in turns]
    assert turns[0].id != turns[1].id


async def test_a_session_takes_only_so_many_metadata_keys(endless):
    for n in range(METADATA_KEYS):
        await endless.ended("hello", most=1, metadata=((f"key-{n}", "value"),))
    again = await endless.ended("hello", most=1, metadata=(("key-0", "new"),))
    refused = await endless.ended("hello", most=1, metadata=(("one-more", "value"),))

    assert again.memory.outcome is Outcome.COMMITTED
    assert (refused.error.status, refused.error.param) == (400, "metadata")
    assert len((await endless.head()).meta["book"]["metadata"]) == METADATA_KEYS


async def test_the_next_turn_goes_on_from_the_last_one(endless):
    first = await endless.ended("hello")
    second = await endless.ended("and then?")

    assert second.memory.base_version >= first.memory.committed_version
    assert (await endless.head()).meta["book"]["turns"] == 2
    assert len(await endless.store.turns(SessionKey(LOCAL, "s"))) == 2


async def test_a_session_remembers_what_a_stranger_does_not_know(endless):
    await endless.turn("my name is Ada")

    with_memory = said(await endless.turn("who am I?", most=24))
    without = said(await endless.turn("who am I?", "stranger", most=24))

    assert with_memory != without


async def test_sessions_side_by_side_are_each_as_if_alone(build):
    async with build(stops=False) as alone:
        expected = [said(await alone.turn(f"hello {n}", f"s{n}", most=12)) for n in range(3)]
    async with build(stops=False) as house:
        turns = [house.start(f"hello {n}", f"s{n}", most=12) for n in range(3)]
        found = [said(each) for each in await asyncio.gather(*map(rest, turns))]

    assert found == expected


async def test_instructions_are_read_once_and_again_when_they_change(endless):
    kinds = ["Be kind.", "Be kind.", "Be brief."]
    read = [(await endless.ended("hello", instructions=text)).read for text in kinds]

    assert read[0] > read[1] + 8
    assert read[2] > read[1] + 8


async def test_a_turn_without_a_session_leaves_nothing(endless):
    ended = await endless.ended("hello", session=None)

    assert ended.memory.outcome is Outcome.OFF
    assert ended.memory.conversation is None
    assert (await endless.store.sessions(LOCAL)).heads == ()


# --- modes, conditions, rates -------------------------------------------------------------------


async def test_read_only_hears_the_memory_and_commits_nothing(build, fragile):
    async with build(fragile, stops=False) as house:
        await house.turn("my name is Ada")
        before = await house.head()
        happenings = await house.turn("who am I?", most=16, mode=Mode.READ_ONLY)
        after = await house.head()
        as_if = said(await house.turn("who am I?", most=16))

    ended = one(Ended, happenings)
    assert ended.memory.outcome is Outcome.READ_ONLY
    assert ended.memory.committed_version is None
    assert (after.version, after.meta) == (before.version, before.meta)
    assert not [each for each in happenings if isinstance(each, Kept | Grown)]
    assert said(happenings)[:2] == as_if[:2]


async def test_off_is_the_base_model_and_commits_nothing(endless):
    await endless.turn("my name is Ada")
    before = await endless.head()

    off = await endless.turn("who am I?", most=16, mode=Mode.OFF)

    assert said(off) == said(await endless.turn("who am I?", None, most=16))
    assert one(Ended, off).memory.outcome is Outcome.OFF
    assert (await endless.head()).version == before.version


@pytest.mark.parametrize("mode", [Mode.READ_ONLY, Mode.OFF])
async def test_a_turn_that_only_looks_makes_no_session(endless, mode):
    ended = await endless.ended("hello", mode=mode)

    assert ended.status == "incomplete"
    with pytest.raises(NotFound):
        await endless.head()


async def test_a_turn_may_name_the_version_it_builds_on(endless):
    first = await endless.ended("hello", rates=((Role.USER, 0.0),))
    version = first.memory.committed_version

    refused = await endless.ended("again", if_version=version + 1)
    taken = await endless.ended("again", if_version=version)

    assert (refused.status, refused.error.status) == ("failed", 412)
    assert refused.error.code == "precondition_failed"
    assert str(version) in refused.error.message
    assert taken.memory.base_version == version


async def test_users_are_learned_from_unless_the_turn_says_otherwise(endless):
    text = "it rains in the hills today and all week"

    learned = await endless.ended(text, "learning")
    silent = await endless.ended(text, "silent", rates=((Role.USER, 0.0),))

    assert learned.memory.updates > 0
    assert set(learned.memory.consolidated_levels) == {"fast", "slow"}
    assert silent.memory.updates == 0
    assert updates(await endless.head("silent")) == {}


async def test_an_update_that_was_refused_is_not_told_as_learned(endless, monkeypatch):
    config = endless.engine._model.config
    tight = tuple(replace(level, bound=1e-12) for level in config.levels)
    monkeypatch.setattr(endless.engine._model, "config", replace(config, levels=tight))

    happenings = await endless.turn("it rains in the hills today and all week")

    assert {each.consolidated.outcome for each in happenings if isinstance(each, Grown)} == {
        "rejected"
    }
    memory = one(Ended, happenings).memory
    assert (memory.outcome, memory.updates) == (Outcome.COMMITTED, 0)
    assert memory.consolidated_levels == []


async def test_replies_are_learned_from_only_where_the_turn_says_so(endless):
    quiet = ((Role.USER, 0.0),)
    usual = await endless.ended("hello", "usual", most=20, rates=quiet)
    asked = await endless.ended("hello", "asked", most=20, rates=quiet + LEARN_REPLIES)

    assert usual.memory.due_levels == []
    assert asked.memory.due_levels == ["fast", "slow"]
    assert updates(await endless.head("asked"))["fast"] >= 2


async def test_a_server_that_does_not_learn_never_consolidates(build, fragile):
    async with build(fragile, stops=False, learning=False) as house:
        for _ in range(3):
            ended = await house.ended("it rains in the hills", most=20, rates=LEARN_REPLIES)
            assert (ended.memory.updates, ended.memory.due_levels) == (0, [])
        head = await house.head()

    assert (head.version, updates(head), due(head)) == (3, {}, [])
    assert fragile.commits == 3


async def test_an_input_beyond_the_limit_is_refused_and_nothing_is_kept(build):
    async with build(max_input_tokens=40) as house:
        ended = await house.ended("x" * 60)

        assert (ended.error.status, ended.error.code) == (413, "message_too_large")
        assert "40" in ended.error.message
        with pytest.raises(NotFound):
            await house.head()
        assert (await house.ended("short")).status != "failed"


# --- commits that fail --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        pytest.param(GONE, 503, "store_unavailable", id="unavailable"),
        pytest.param(Full("used 1 of 1 MB"), 503, "store_full", id="full"),
        pytest.param(Conflict("s", expected=2, found=3), 409, "version_conflict", id="conflict"),
        pytest.param(RuntimeError("a bug"), 500, "internal_error", id="bug"),
    ],
)
async def test_a_turn_whose_commit_fails_is_told_as_failed_and_leaves_no_trace(
    build, fragile, error, status, code
):
    quiet = ((Role.USER, 0.0),)
    async with build(stops=False) as twin:
        await twin.turn("hello", rates=quiet)
        expected = said(await twin.turn("who am I?", rates=quiet))
    async with build(fragile, stops=False) as house:
        await house.turn("hello", rates=quiet)
        before = await house.head()

        fragile.failures.append(error)
        failed = await house.turn("my name is Ada", rates=quiet)

        ended = one(Ended, failed)
        assert (ended.status, ended.error.status, ended.error.code) == ("failed", status, code)
        # only an answer of the store makes it certain that nothing was committed
        in_doubt = code in ("store_unavailable", "internal_error")
        assert ended.memory.outcome is (Outcome.UNKNOWN if in_doubt else Outcome.ROLLED_BACK)
        assert (ended.memory.base_version, ended.memory.committed_version) == (1, None)
        assert not [each for each in failed if isinstance(each, Kept)]
        assert (await house.head()) == before
        assert said(await house.turn("who am I?", rates=quiet)) == expected
        assert (await house.head()).version == 2


async def test_a_session_that_cannot_be_read_is_an_error_and_not_a_new_session(build, fragile):
    async with build(fragile) as first:
        await first.turn("hello")
    async with build(fragile) as house:
        fragile.down = GONE
        failed = await house.ended("hello")
        fragile.down = None
        again = await house.ended("hello")

    assert failed.error.code == "store_unavailable"
    assert again.memory.base_version > 0


async def test_of_two_servers_on_one_session_each_goes_on_from_the_other(build):
    store = LocalStore()
    async with build(store, server_id="a") as left, build(store, server_id="b") as right:
        await left.turn("hello", rates=((Role.USER, 0.0),))
        await right.turn("hello", rates=((Role.USER, 0.0),))

        [began] = [each for each in await left.turn("hello") if isinstance(each, Began)]

    assert (began.base_version, began.source) == (2, "store")


# --- stopping -----------------------------------------------------------------------------------


async def test_a_reply_that_was_stopped_and_kept_is_a_reply_that_ended_there(build):
    async with build(stops=False) as house, build(stops=False) as twin:
        turn = house.start("hello", most=4000)
        await until_said(turn, 5)
        turn.cancel(keep=True)
        ended = one(Ended, await rest(turn))
        await twin.turn("hello", most=ended.said)

        assert (ended.status, ended.reason) == ("incomplete", "cancelled")
        assert ended.memory.outcome is Outcome.COMMITTED
        [record] = await house.store.turns(SessionKey(LOCAL, "s"))
        assert record.payload["items"][-1] == ["assistant", turn.text]
        assert said(await house.turn("go on", most=16)) == said(await twin.turn("go on", most=16))


async def test_a_reply_that_was_stopped_and_rolled_back_never_was(build):
    async with build(stops=False) as house, build(stops=False) as twin:
        for each in (house, twin):
            await each.turn("hello")
        before = await house.head()

        turn = house.start("my name is Ada", most=4000)
        await until_said(turn, 5)
        turn.cancel(keep=False)
        ended = one(Ended, await rest(turn))

        assert (ended.status, ended.reason) == ("incomplete", "cancelled")
        assert ended.memory.outcome is Outcome.ROLLED_BACK
        assert ended.memory.base_version == before.version
        assert await house.head() == before
        assert said(await house.turn("go on", most=16)) == said(await twin.turn("go on", most=16))


async def test_a_turn_whose_client_leaves_before_the_commit_leaves_no_trace(build, fragile):
    async with build(fragile, stops=False) as house:
        turn = house.start("hello", most=1)
        turn.dropped = True  # what a cancel leaves that came too late for the engine

        ended = one(Ended, await rest(turn))

        assert ended.memory.outcome is Outcome.ROLLED_BACK
        assert fragile.commits == 0


async def test_a_turn_stopped_before_its_first_word_is_rolled_back(endless):
    turn = endless.start("hello", most=4000)
    turn.cancel(keep=True)
    ended = one(Ended, await rest(turn))

    assert ended.memory.outcome is Outcome.ROLLED_BACK
    await endless.idle()
    with pytest.raises(NotFound):
        await endless.head()


async def test_a_turn_stopped_in_the_queue_is_never_begun_even_while_others_are_answered(endless):
    other = endless.start("talk", "other", most=4000)
    await until_said(other, 2)
    first = endless.start("hello", most=6)
    second = endless.start("again", most=4000)
    second.cancel(keep=False)

    ended = one(Ended, await rest(second))

    assert ended.memory.outcome is Outcome.ROLLED_BACK
    assert ended.said == 0
    assert one(Ended, await rest(first)).memory.outcome is Outcome.COMMITTED
    other.cancel(keep=False)
    await rest(other)
    await endless.idle()


async def test_stopping_twice_or_too_late_changes_nothing(endless):
    turn = endless.start("hello", most=4000)
    await until_said(turn, 3)
    turn.cancel(keep=True)
    turn.cancel(keep=True)
    happenings = await rest(turn)
    turn.cancel(keep=False)

    assert one(Ended, happenings).memory.outcome is Outcome.COMMITTED
    assert await rest(turn) == []
    assert (await endless.ended("next")).memory.base_version >= 1


async def test_a_turn_nobody_listens_to_is_still_kept(endless):
    endless.start("hello")
    await endless.turns.drain(5)

    assert (await endless.head()).version >= 1


async def test_at_shutdown_open_turns_end_within_the_given_time_and_are_told_why(build, fragile):
    async with build(fragile, stops=False) as house:
        talking = house.start("hello", "a", most=4096)
        await until_said(talking, 2)
        fragile.going_on.clear()
        committing = house.start("hello", "b", most=1)
        await until_said(committing, 1)

        await asyncio.wait_for(house.turns.drain(0.1), 5)

        for turn, outcome in ((talking, Outcome.ROLLED_BACK), (committing, Outcome.UNKNOWN)):
            ended = one(Ended, await rest(turn))
            assert (ended.error.status, ended.error.code) == (503, "draining")
            assert ended.memory.outcome is outcome
        with pytest.raises(ApiError, match="stopping"):
            house.start("hello")
        await house.idle()
    assert fragile.commits == 0


async def test_a_turn_that_is_cut_off_before_its_first_step_is_told_so(endless):
    turn = endless.start("hello")
    endless.turns.drop()

    ended = one(Ended, await asyncio.wait_for(rest(turn), 1))

    assert (ended.error.code, ended.memory.outcome) == ("draining", Outcome.ROLLED_BACK)
    await endless.idle()


# --- one after the other ------------------------------------------------------------------------


async def test_turns_of_a_session_are_answered_in_the_order_they_came(endless):
    turns = [endless.start(f"hello {n}", most=3) for n in range(4)]
    versions = [one(Ended, await rest(turn)).memory.committed_version for turn in turns]

    assert versions == sorted(versions)
    records = await endless.store.turns(SessionKey(LOCAL, "s"))
    assert [record.payload["items"][0][1] for record in records] == [f"hello {n}" for n in range(4)]


async def test_a_session_with_a_full_queue_is_busy_and_others_are_not(build, fragile):
    async with build(fragile, turns_waiting=1) as house:
        fragile.going_on.clear()
        kept = [house.start("hello"), house.start("hello")]
        await asyncio.sleep(0)
        refused = one(Ended, await rest(house.start("hello")))
        stranger = house.start("hello", "stranger")
        fragile.going_on.set()
        outcomes = [one(Ended, await rest(turn)).memory.outcome for turn in [*kept, stranger]]
        later = await house.ended("hello")

    assert (refused.error.status, refused.error.code) == (409, "session_busy")
    assert refused.error.retry_after == 1
    assert outcomes == [Outcome.COMMITTED] * 3
    assert later.memory.outcome is Outcome.COMMITTED
    assert len(house.turns._queues) == 0


# --- consolidation after the reply --------------------------------------------------------------


async def test_what_a_reply_left_due_is_consolidated_after_it_as_a_commit_of_its_own(endless):
    happenings = await endless.turn("hello", most=20, rates=LEARN_REPLIES)

    place = next(i for i, each in enumerate(happenings) if isinstance(each, Ended))
    ended, after = happenings[place], happenings[place + 1 :]
    assert ended.memory.due_levels
    assert [type(each) for each in after] == [Grown] * (len(after) - 1) + [Kept]
    assert after[-1].version == ended.memory.committed_version + 1
    assert due(await endless.head()) == []


async def test_a_turn_that_comes_sooner_waits_for_the_consolidation(build, fragile):
    async with build(fragile, stops=False) as house:
        first = house.start("hello", most=20, rates=LEARN_REPLIES)
        while not isinstance(await anext(first), Ended):
            pass
        second = house.start("and then?", most=3)

        [began] = [each for each in await rest(second) if isinstance(each, Began)]

    assert began.base_version == 2
    assert began.source == "host"


@pytest.mark.parametrize("error", [GONE, RuntimeError("a bug")], ids=["unavailable", "bug"])
async def test_a_consolidation_that_fails_stays_due_and_comes_first_next_time(
    build, fragile, error
):
    async with build(stops=False) as twin:
        await twin.turn("hello", most=20, rates=LEARN_REPLIES)
        expected = said(await twin.turn("who am I?", most=16))
    async with build(fragile, stops=False) as house:
        fragile.failures.extend([None, error])
        happenings = await house.turn("hello", most=20, rates=LEARN_REPLIES)
        assert one(Ended, happenings).memory.outcome is Outcome.COMMITTED
        assert one(Kept, happenings).version == 1
        assert due(await house.head())
        assert house.sample("hope_consolidation_failures_total") == 1

        following = await house.turn("who am I?", most=16)

        assert one(Began, following).base_version == 2
        assert said(following) == expected
        assert due(await house.head()) == []
        assert house.sample("hope_consolidation_backlog_sessions", level="fast") == 0


async def test_after_a_restart_due_work_comes_first_and_nothing_is_forgotten(build, fragile):
    async with build(stops=False) as twin:
        await twin.turn("hello", most=20, rates=LEARN_REPLIES)
        expected = said(await twin.turn("who am I?", most=16))
    async with build(fragile, stops=False) as first:
        fragile.failures.extend([None, GONE])  # as if it had been killed here
        await first.turn("hello", most=20, rates=LEARN_REPLIES)
    assert due(await first.head())

    async with build(fragile, stops=False) as second:
        following = await second.turn("who am I?", most=16)

    began = one(Began, following)
    assert (began.source, began.base_version) == ("store", 2)
    assert said(following) == expected


async def test_who_only_looks_finds_due_work_done(build, fragile):
    async with build(stops=False) as twin:
        await twin.turn("hello", most=20, rates=LEARN_REPLIES)
        expected = said(await twin.turn("who am I?", most=16, mode=Mode.READ_ONLY))
    async with build(fragile, stops=False) as house:
        fragile.failures.extend([None, GONE, GONE])
        await house.turn("hello", most=20, rates=LEARN_REPLIES)

        early = await house.ended("who am I?", most=16, mode=Mode.READ_ONLY)  # still silent
        looked = await house.turn("who am I?", most=16, mode=Mode.READ_ONLY)

        assert (early.status, early.memory.outcome) == ("incomplete", Outcome.READ_ONLY)
        assert said(looked) == expected
        assert due(await house.head()) == []
        assert one(Ended, looked).memory.outcome is Outcome.READ_ONLY


async def test_a_turn_fails_if_due_work_cannot_be_committed_and_the_work_stays_due(build, fragile):
    async with build(fragile, stops=False) as house:
        fragile.failures.extend([None, GONE, GONE])
        await house.turn("hello", most=20, rates=LEARN_REPLIES)

        ended = await house.ended("who am I?")

        assert ended.error.code == "store_unavailable"
        assert due(await house.head())
        assert (await house.ended("who am I?")).memory.base_version == 2


# --- when the device fails ----------------------------------------------------------------------


async def test_a_job_the_engine_cannot_seat_fails_and_later_turns_work(endless):
    key = SessionKey(LOCAL, "broken")
    await endless.turn("hello", "broken")
    resident = endless.service.residency._held[key]
    [piece, *_] = resident.state.pieces
    bent = replace(resident.state, pieces=(replace(piece, keys=piece.keys[:, :1]),))
    endless.service.residency._hold(replace(resident, state=bent))

    ended = await asyncio.wait_for(endless.ended("hello", "broken"), 5)

    assert (ended.error.status, ended.error.code) == (500, "internal_error")
    assert "RuntimeError" in ended.error.message
    assert (await endless.ended("hello")).memory.outcome is Outcome.COMMITTED


async def test_a_consolidation_that_raises_fails_its_turn_and_no_other(endless):
    broken = State(due=(Due("fast", 0, 8),))  # nothing is there to learn from
    endless.service.residency._hold(Resident(SessionKey(LOCAL, "broken"), 1, broken, Book()))

    ended = await asyncio.wait_for(endless.ended("hello", "broken"), 5)

    assert ended.error.code == "internal_error"
    assert (await endless.ended("hello")).memory.outcome is Outcome.COMMITTED


async def test_a_memory_that_is_not_finite_fails_the_turn_and_is_not_committed(endless):
    await endless.turn("it rains in the hills today", "ill")
    resident = endless.service.residency._held[SessionKey(LOCAL, "ill")]
    delta = {name: d * torch.nan for name, d in resident.state.levels["fast"].delta.items()}
    ill = replace(resident.state, levels={"fast": LevelState(delta=delta)})
    endless.service.residency._hold(replace(resident, state=ill))
    before = await endless.head("ill")

    ended = await endless.ended("hello", "ill", rates=((Role.USER, 0.0),))

    assert (ended.error.status, ended.error.code) == (422, "memory_update_rejected")
    assert await endless.head("ill") == before


async def test_messages_that_the_chat_template_refuses_fail_the_turn_alone(endless):
    odd = (Message(Role.USER, "hello\x00there"), Message(Role.TOOL, "42"))

    assert (await endless.ended("", messages=odd)).status != "failed"
