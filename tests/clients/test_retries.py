"""A turn that went wrong is sent again under its id: answered whole, and learned once."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from clients.client import AsyncHope, ConnectionLost, HopeError, Refused
from clients.core import Patience
from server import wire

pytestmark = pytest.mark.anyio

QUICK = Patience(pause=0.01)
WORDS = "one two three"
EVENTS = 12  # of the reply to three words: 0 to 4 begin it, 5 to 7 are words, 11 ends it
LAST = EVENTS - 1
LAST_OF_STORED = 9  # whose words come all at once


@pytest.fixture
async def hope(stand_in):
    async with AsyncHope(stand_in.url, patience=QUICK) as hope:
        yield hope


async def until(true):
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110 - it becomes so in another thread
            await asyncio.sleep(0.005)


async def broken_off(reply, meanwhile=lambda: None):
    """Iterate until the line breaks for good; return what was handed out, and the error."""
    pieces = []
    try:
        async for piece in reply:
            pieces.append(piece)
            meanwhile()
    except ConnectionLost as error:
        return pieces, error
    pytest.fail("the reply came to its end")


@pytest.mark.parametrize("at", range(EVENTS))
async def test_wherever_the_line_breaks_a_turn_is_answered_whole_and_learned_once(
    hope, stand_in, at
):
    stand_in.faults = [stand_in.cut(at)]

    reply = await hope.session("nora").ask(WORDS)

    assert (reply.text, reply.status, reply.tries) == ("one two three ", "completed", 2)
    assert stand_in.sessions["nora"] == [(WORDS, "one two three ")]
    assert reply.version == 1
    assert reply.memory.replayed is (at == LAST)
    assert {request.turn_id for request in stand_in.requests} == {reply.turn.id}


@pytest.mark.parametrize("at", range(EVENTS))
async def test_an_iteration_goes_on_after_what_it_has_been_given(hope, stand_in, at):
    stand_in.faults = [stand_in.cut(at)]

    pieces = [piece async for piece in hope.session("nora").say(WORDS)]

    assert "".join(pieces) == "one two three "
    assert stand_in.sessions["nora"] == [(WORDS, "one two three ")]


@pytest.mark.parametrize(
    ("first", "second"), [*itertools.product((0, 6, 7, LAST), (0, 5, 7, LAST_OF_STORED))]
)
async def test_a_line_may_break_twice(hope, stand_in, first, second):
    stand_in.faults = [stand_in.cut(first), stand_in.cut(second)]

    reply = hope.session("nora").say(WORDS)
    pieces = [piece async for piece in reply]

    assert ("".join(pieces), reply.tries) == ("one two three ", 3)
    assert stand_in.sessions["nora"] == [(WORDS, "one two three ")]


async def test_a_line_that_always_breaks_is_given_up_and_the_id_is_told(hope, stand_in):
    stand_in.faults = [stand_in.cut(6)] * 3

    with pytest.raises(ConnectionLost) as caught:
        await hope.session("nora").ask(WORDS, turn_id="t1")

    assert (len(stand_in.requests), stand_in.sessions) == (3, {})
    assert (caught.value.turn_id, caught.value.may_be_committed) == ("t1", True)
    assert (await hope.session("nora").ask(WORDS, turn_id="t1")).version == 1


async def test_the_same_seed_is_sent_with_every_try(hope, stand_in):
    stand_in.faults = [stand_in.cut(6)]

    await hope.session("nora").ask(WORDS)
    await hope.session("nora").ask(WORDS)
    await hope.session("nora").ask(WORDS, seed=7)

    first, again, other, chosen = [request.seed for request in stand_in.requests]
    assert first == again != other
    assert chosen == 7


async def test_another_reply_than_the_one_that_was_begun_is_not_mixed_with_it(hope, stand_in):
    stand_in.faults = [stand_in.cut(7)]
    reply = hope.session("nora").say("waver")

    pieces, error = await broken_off(reply)

    assert pieces == ["I said ", "1.0 "]
    assert reply.text == "I said 1.0 "
    assert error.may_be_committed
    await asyncio.sleep(0.1)  # longer than the rest of that reply takes
    assert stand_in.sessions == {}  # hung up on, so it was rolled back


async def test_a_stored_reply_that_was_begun_otherwise_is_not_mixed_with_it(hope, stand_in):
    stand_in.faults = [stand_in.cut(7)]
    stand_in.sessions["nora"] = [("waver", "I said so ")]
    reply = hope.session("nora").say("waver", turn_id="t1")

    pieces, _ = await broken_off(reply, lambda: stand_in.learned.update(t1="I said so "))

    assert pieces == ["I said ", "1.0 "]
    assert reply.status == "failed"


async def test_a_reply_that_ends_before_what_was_shown_is_not_the_same(hope, stand_in):
    stand_in.faults = [stand_in.cut(7)]
    reply = hope.session("nora").say("waver", turn_id="t1")

    pieces, _ = await broken_off(reply, lambda: stand_in.learned.update(t1="I said "))

    assert pieces == ["I said ", "1.0 "]


async def test_nobody_has_seen_a_reply_that_is_waited_for_so_another_will_do(hope, stand_in):
    stand_in.faults = [stand_in.cut(7)]

    reply = await hope.session("nora").ask("waver")

    assert reply.text == "I said 2.0 2.1 2.2 "
    assert stand_in.sessions["nora"] == [("waver", reply.text)]


async def test_other_turns_keep_their_line_when_a_repetition_is_hung_up_on(hope, stand_in):
    stand_in.faults = [stand_in.cut(7)]
    differing = asyncio.create_task(broken_off(hope.session("nora").say("waver")))
    await until(lambda: len(stand_in.requests) == 2)
    other = hope.session("other").say("forever")
    await anext(aiter(other))
    await differing

    await other.cancel()

    assert other.cut_short_by == "cancelled"


@pytest.mark.parametrize("code", ["draining", "store_unavailable", "session_busy", "session_moved"])
async def test_a_passing_refusal_is_waited_out(hope, stand_in, code):
    stand_in.faults = [stand_in.refusal(code), stand_in.failure(code)]

    reply = await hope.session("nora").ask(WORDS)

    assert (reply.tries, reply.version) == (3, 1)
    assert stand_in.sockets == 1


@pytest.mark.parametrize("code", ["version_conflict", "session_deleted", "quota_exceeded"])
async def test_a_lasting_refusal_is_raised_at_once(hope, stand_in, code):
    stand_in.faults = [stand_in.refusal(code, retry_after=1)]

    with pytest.raises(Refused, match=code):
        await hope.session("nora").ask(WORDS)

    assert len(stand_in.requests) == 1


async def test_a_server_is_given_the_time_it_asks_for(hope, stand_in):
    stand_in.faults = [stand_in.refusal("session_busy", retry_after=0.3)]
    began = time.monotonic()

    await hope.session("nora").ask(WORDS)

    assert time.monotonic() - began >= 0.3


async def test_more_time_than_there_is_patience_is_not_waited(hope, stand_in):
    stand_in.faults = [stand_in.refusal("store_unavailable", retry_after=60)]

    with pytest.raises(Refused) as caught:
        await hope.session("nora").ask(WORDS)

    assert (caught.value.retry_after_s, caught.value.may_be_committed) == (60, False)


async def test_a_turn_whose_fate_is_unknown_is_asked_about_again(hope, stand_in):
    stand_in.faults = [stand_in.failure("store_unavailable", wire.Outcome.UNKNOWN)]
    stand_in.learned["t1"] = "one two three "
    stand_in.sessions["nora"] = [(WORDS, "one two three ")]

    reply = await hope.session("nora").ask(WORDS, turn_id="t1")

    assert (reply.memory.replayed, reply.version) == (True, 1)


async def test_a_fate_that_stays_unknown_is_what_is_raised(hope, stand_in):
    unknown = stand_in.failure("store_unavailable", wire.Outcome.UNKNOWN)
    stand_in.faults = [unknown, stand_in.refusal("session_busy"), stand_in.refusal("session_busy")]

    with pytest.raises(Refused) as caught:
        await hope.session("nora").ask(WORDS)

    assert (caught.value.code, caught.value.may_be_committed) == ("store_unavailable", True)


async def test_a_lasting_refusal_settles_what_was_lost_before(hope, stand_in):
    stand_in.faults = [stand_in.cut(6), stand_in.refusal("session_deleted")]

    with pytest.raises(Refused) as caught:
        await hope.session("nora").ask(WORDS)

    assert (caught.value.code, caught.value.may_be_committed) == ("session_deleted", False)


async def test_impatience_sends_every_turn_once(stand_in):
    stand_in.faults = [stand_in.cut(6)]

    async with AsyncHope(stand_in.url, patience=Patience(tries=1)) as hope:
        with pytest.raises(ConnectionLost):
            await hope.session("nora").ask(WORDS)

    assert len(stand_in.requests) == 1


async def test_a_turn_that_was_stopped_is_never_sent_again(hope, stand_in):
    reply = hope.session("nora").say("stubborn")
    await anext(aiter(reply))

    await reply.cancel()

    with pytest.raises(ConnectionLost):
        await reply.finish()
    assert (reply.tries, len(stand_in.requests)) == (1, 1)


async def test_stopping_between_two_tries_ends_the_turn_with_what_went_wrong(hope, stand_in):
    stand_in.faults = [stand_in.refusal("session_busy", retry_after=5)]
    reply = hope.session("nora").say(WORDS)
    await reply.start()
    await until(lambda: reply.tries == 2)

    await reply.cancel()

    with pytest.raises(Refused, match="session_busy"):
        await reply.finish()
    assert len(stand_in.requests) == 1
    assert (await hope.session("nora").ask("next")).version == 1


async def test_stopping_a_repetition_that_is_still_behind_keeps_nothing_of_it(hope, stand_in):
    stand_in.faults = [stand_in.cut(7)]
    reply = hope.session("nora").say("waver", turn_id="t1")
    pieces = aiter(reply)
    shown = [await anext(pieces), await anext(pieces)]
    going_on = asyncio.ensure_future(anext(pieces))
    await until(lambda: len(stand_in.requests) == 2)

    await reply.cancel()

    with pytest.raises(ConnectionLost):
        await going_on
    await asyncio.sleep(0.1)
    assert shown == ["I said ", "1.0 "]
    assert stand_in.sessions == {}


async def test_leaving_a_reply_that_goes_on_elsewhere_keeps_what_was_said(hope, stand_in):
    stand_in.faults = [stand_in.cut(8)]
    pieces = []

    async for piece in (reply := hope.session("nora").say("forever")):
        pieces.append(piece)
        if len(pieces) == 6:
            break
    await reply.finish()

    assert (reply.tries, reply.cut_short_by, reply.version) == (2, "cancelled", 1)
    assert reply.text.startswith("".join(pieces))


async def test_hanging_up_ends_the_turns_that_wait_for_another_try(stand_in):
    stand_in.faults = [stand_in.refusal("draining", retry_after=5)]
    async with AsyncHope(stand_in.url) as hope:
        reply = hope.session("nora").say(WORDS)
        await reply.start()
        await until(lambda: reply.tries == 2)

    with pytest.raises(Refused, match="draining"):
        await reply.finish()


async def test_turns_of_a_session_keep_their_order_over_a_broken_line(hope, stand_in):
    stand_in.faults = [stand_in.cut(6)]

    first, second = await asyncio.gather(*(hope.session("nora").ask(word) for word in "ab"))

    assert (first.version, second.version) == (1, 2)


async def test_every_turn_on_a_broken_line_is_sent_again(hope, stand_in):
    slow = [asyncio.create_task(hope.session(f"s{n}").ask("waver")) for n in range(3)]
    await until(lambda: len(stand_in.requests) == 3)
    stand_in.faults = [stand_in.cut(6)]

    await hope.session("nora").ask(WORDS)
    replies = await asyncio.gather(*slow)

    assert [reply.tries for reply in replies] == [2, 2, 2]
    assert all(len(turns) == 1 for turns in stand_in.sessions.values())


async def test_a_turn_never_sent_says_so(hope):
    reply = hope.session("nora").say(WORDS)
    async with hope.session("nora").floor:
        starting = asyncio.create_task(reply.start())
        await asyncio.sleep(0.01)
        await reply.cancel()
    await starting

    with pytest.raises(HopeError, match="before it was sent"):
        await reply.finish()
