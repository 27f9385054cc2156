"""The async client against the stand-in server, over real sockets."""

from __future__ import annotations

import asyncio
import socket

import pytest

from clients import core
from clients.client import (
    AsyncHope,
    ConnectionLost,
    HopeError,
    ProtocolViolation,
    Refused,
    Unreachable,
)
from server import wire

pytestmark = pytest.mark.anyio


@pytest.fixture
async def hope(stand_in):
    async with AsyncHope(stand_in.url, patience=core.Patience(pause=0.01)) as hope:
        yield hope


async def asked(stand_in, turns):
    """Wait until the server has heard of so many turns."""
    async with asyncio.timeout(5):
        while len(stand_in.requests) < turns:  # noqa: ASYNC110 - it lives in another thread
            await asyncio.sleep(0.005)


async def test_a_reply_arrives_in_pieces_and_tells_what_was_kept(hope):
    reply = hope.session("nora").say("one two three")

    pieces = [piece async for piece in reply]

    assert pieces == ["one ", "two ", "three "]
    assert (reply.text, reply.status, reply.version) == ("one two three ", "completed", 1)
    assert reply.usage.output_tokens == 3
    assert reply.memory.outcome is wire.Outcome.COMMITTED


async def test_asking_returns_the_whole_reply(hope):
    reply = await hope.session("nora").ask("one two")

    assert (reply.text, reply.ended) == ("one two ", True)


async def test_options_reach_the_server(hope, stand_in):
    document = [wire.InputMessage(role="document", content="Bees.")]

    await hope.session("nora").ask(
        document,
        turn_id="t1",
        temperature=0.5,
        mode=wire.Mode.READ_ONLY,
        instructions="Be brief.",
        user="ada",
        wait="durable",
    )

    (request,) = stand_in.requests
    assert (request.turn_id, request.stream_id, request.event_id) == ("t1", "t1", "t1")
    assert (request.temperature, request.instructions) == (0.5, "Be brief.")
    assert (request.memory.mode, request.memory.wait) == (wire.Mode.READ_ONLY, "durable")
    assert request.user == "ada"
    assert request.input == document


async def test_many_sessions_talk_at_once_on_one_socket(hope, stand_in):
    replies = await asyncio.gather(
        *(hope.session(f"s{n}").ask(f"word{n} again{n}") for n in range(8))
    )

    assert [reply.text for reply in replies] == [f"word{n} again{n} " for n in range(8)]
    assert stand_in.sockets == 1


async def test_turns_of_one_session_wait_for_each_other(hope):
    first, second = await asyncio.gather(*(hope.session("nora").ask(word) for word in "ab"))

    assert (first.version, second.version) == (1, 2)


async def test_cancelling_returns_what_was_kept(hope):
    reply = hope.session("nora").say("forever")
    first = await anext(aiter(reply))

    await reply.cancel()

    assert first == "on and "
    assert (reply.status, reply.cut_short_by, reply.version) == ("incomplete", "cancelled", 1)
    assert reply.text.startswith("on and ")


async def test_leaving_the_loop_stops_the_reply(hope):
    reply = hope.session("nora").say("forever")
    async for _ in reply:
        break

    await reply.finish()
    after = await hope.session("nora").ask("next")

    assert reply.cut_short_by == "cancelled"
    assert after.version == 2


async def test_leaving_a_reply_entered_as_a_block_stops_it(hope):
    async with hope.session("nora").say("forever") as reply:
        async for _ in reply:
            break

    assert (reply.cut_short_by, reply.version) == ("cancelled", 1)


async def test_a_cancelled_task_stops_its_reply(hope, stand_in):
    asking = asyncio.create_task(hope.session("nora").ask("forever"))
    await asked(stand_in, 1)

    asking.cancel()
    await asyncio.wait([asking])

    assert asking.cancelled()
    assert (await hope.session("nora").status()).version == 1


async def test_cancelling_a_finished_reply_does_nothing(hope):
    reply = await hope.session("nora").ask("one")

    await reply.cancel()

    assert reply.status == "completed"


async def test_cancelling_before_it_is_sent_sends_nothing(hope, stand_in):
    first = hope.session("nora").say("forever")
    await first.start()
    second = hope.session("nora").say("never")
    starting = asyncio.create_task(second.start())
    await asyncio.sleep(0)

    await second.cancel()
    await first.cancel()

    await starting
    with pytest.raises(HopeError, match="before it was sent"):
        await second.finish()
    assert len(stand_in.requests) == 1


async def test_an_error_event_is_raised_with_its_code(hope):
    with pytest.raises(Refused, match=r"Refused: version_conflict\.") as caught:
        await hope.session("nora").ask("refuse me")

    assert (caught.value.code, caught.value.status) == ("version_conflict", 409)
    assert caught.value.retry_after_s == 1.5


async def test_a_failed_turn_is_raised_after_its_text(hope):
    reply = hope.session("nora").say("fail now")

    with pytest.raises(Refused, match=r"Broken\."):
        await reply.finish()

    assert (reply.text, reply.status, reply.version) == ("half a ", "failed", None)


async def test_a_lost_line_is_told_and_the_next_turn_dials_again(hope, stand_in):
    with pytest.raises(ConnectionLost, match="draining") as caught:
        await hope.session("nora").ask("drop it", turn_id="t1")

    assert (caught.value.may_be_committed, caught.value.turn_id) == (True, "t1")
    assert (await hope.session("nora").ask("hello again")).text == "hello again "
    assert stand_in.sockets == 4  # three tries, and a new line for the next turn


async def test_a_lost_turn_that_does_not_learn_was_surely_not_committed(hope):
    with pytest.raises(ConnectionLost, match="nothing was to be learned") as caught:
        await hope.session("nora").ask("drop it", mode=wire.Mode.READ_ONLY)

    assert not caught.value.may_be_committed


async def test_a_lost_line_ends_every_turn_on_it(stand_in):
    # one try each: a second one of "forever" on a line of its own would have no end
    async with AsyncHope(stand_in.url, patience=core.Patience(tries=1)) as hope:
        other = asyncio.create_task(hope.session("other").ask("forever"))
        await asked(stand_in, 1)

        with pytest.raises(ConnectionLost):
            await hope.session("nora").ask("drop it")

        with pytest.raises(ConnectionLost):
            await other


async def test_a_server_that_babbles_is_hung_up_on(hope):
    with pytest.raises(ConnectionLost, match="not JSON"):
        await hope.session("nora").ask("babble")

    assert (await hope.session("nora").ask("fine")).text == "fine "


async def test_events_out_of_order_fail_only_their_turn(hope, stand_in):
    with pytest.raises(ProtocolViolation, match="came after"):
        await hope.session("nora").ask("disorder")

    assert (await hope.session("nora").ask("fine")).text == "fine "
    assert stand_in.sockets == 1


async def test_hanging_up_loses_the_running_turns(stand_in):
    async with AsyncHope(stand_in.url) as hope:
        running = asyncio.create_task(hope.session("nora").ask("forever"))
        await asked(stand_in, 1)

    with pytest.raises(ConnectionLost, match="the client hung up"):
        await running


async def test_news_of_the_memory_are_told_to_whoever_wants_them(stand_in):
    told: asyncio.Queue[core.MemoryNews] = asyncio.Queue()
    async with AsyncHope(stand_in.url, on_memory=told.put_nowait) as hope:
        await hope.session("nora").ask("one")
        news = await asyncio.wait_for(told.get(), 2)

    assert (news.type, news.conversation) == ("hope:consolidation.completed", "nora")


async def test_a_session_tells_how_it_stands_and_is_deleted(hope):
    session = hope.session("nora/at home")
    await session.ask("one")

    status = await session.status()
    gone = await session.delete()

    assert (status.id, status.version, status.levels[0].name) == ("nora/at home", 1, "mid")
    assert (gone.id, gone.keys) == ("nora/at home", 3)
    with pytest.raises(Refused) as caught:
        await session.status()
    assert (caught.value.status, caught.value.code) == (404, "conversation_not_found")


async def test_a_transcript_is_read_to_its_end(hope):
    for word in ("one", "two", "three"):
        await hope.session("nora").ask(word)

    items = await hope.session("nora").transcript()

    assert [item.content[0].text for item in items] == [
        "one", "one ", "two", "two ", "three", "three ",
    ]  # fmt: skip


async def test_every_page_of_sessions_is_read(hope):
    for name in "abcde":
        await hope.session(name).ask("hi")

    assert [session.id for session in await hope.sessions()] == list("abcde")


async def test_models_and_health_are_told(hope):
    assert [model.id for model in await hope.models()] == ["tiny"]
    assert (await hope.health()).status == "draining"


async def test_an_unknown_key_is_refused_on_both_roads(serve):
    locked = serve(key="secret")

    async with AsyncHope(locked.url, api_key="wrong") as hope:
        with pytest.raises(Refused, match="Unknown API key") as by_socket:
            await hope.session("nora").ask("hi")
        with pytest.raises(Refused) as by_http:
            await hope.sessions()
    async with AsyncHope(locked.url, api_key="secret") as hope:
        assert (await hope.session("nora").ask("hi")).text == "hi "

    assert (by_socket.value.status, by_http.value.status) == (401, 401)


async def test_a_silent_address_is_unreachable():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        async with AsyncHope(url) as hope:
            with pytest.raises(Unreachable, match="No HOPE Server answers at http://127"):
                await hope.session("nora").ask("hi")
            with pytest.raises(Unreachable):
                await hope.models()


async def test_an_unknown_option_is_a_mistake_not_a_wish(hope):
    with pytest.raises(TypeError, match="temprature"):
        hope.session("nora").say("hi", temprature=1.0)
