"""A turn that is stopped, or whose client leaves, at every token of its reply."""

import json
from contextlib import contextmanager
from socket import SHUT_RDWR

import pytest
from websockets.sync.client import connect

from hope_runtime.report import Said
from tests.faults.houses import EXACT, RATES, builder, exported, memory, say, told
from tests.faults.oracle import TERMINAL, Line, Turn
from tests.faults.talk import BEFORE, LONG, Stream, judged, quiet

TEXT, AFTER = "it rains in the hills", "tell me more"
MOST = 12  # tokens of the reply that is cut

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def build():
    return builder()


@pytest.fixture
async def house(build, anyio_backend):
    """A server whose replies go on to their limit."""
    async with build(stops=False, **EXACT) as house:
        yield house


@contextmanager
def after_steps(engine, act, *, said=None, steps=None):
    """Call `act` on the device's thread, after so many tokens or steps of the next turn."""
    step, heard, taken = engine.step, 0, 0

    def watched():
        nonlocal heard, taken
        facts = step()
        taken += 1
        heard += sum(isinstance(fact, Said) for fact in facts)
        if (heard if said is not None else taken) == (said if said is not None else steps):
            act()
        return facts

    engine.step = watched
    try:
        yield
    finally:
        del engine.step


async def cut(house, session, *, keep, **when):
    """Have a turn that is cut at some point of it; return the reply and how it ended."""
    turn = house.start(TEXT, session, MOST, rates=RATES)
    with after_steps(house.engine, lambda: turn.cancel(keep=keep), **when):
        return told([happening async for happening in turn])


async def test_a_turn_that_is_stopped_at_any_token_is_one_that_ended_there(house):
    for tokens in range(1, MOST + 1):
        stopped, ended = f"stopped-{tokens}", f"ended-{tokens}"
        for session in (stopped, ended):
            await say(house, session, BEFORE)

        reply, end = await cut(house, stopped, keep=True, said=tokens)
        twin = await house.turn(TEXT, ended, tokens, rates=RATES)

        assert (end.memory.outcome, end.said) == ("committed", tokens)
        assert reply == told(twin)[0]
        assert await memory(house, stopped) == await memory(house, ended)
        assert (await house.head(stopped)).version == (await house.head(ended)).version
    after = [told(await house.turn(AFTER, s, 12, rates=RATES)) for s in (stopped, ended)]
    assert after[0][0] == after[1][0]


async def test_a_turn_whose_client_leaves_at_any_token_leaves_no_trace(house):
    await say(house, "s", BEFORE)
    before, file = await house.head(), _without_time(await exported(house, "s"))
    for tokens in range(1, MOST + 1):
        _, end = await cut(house, "s", keep=False, said=tokens)

        assert end.memory.outcome == "rolled_back"
        assert await house.head() == before
        assert _without_time(await exported(house, "s")) == file
    assert house.quiet
    assert await _goes_on(house)


async def test_a_turn_that_is_cut_before_its_first_token_leaves_no_trace(house):
    await say(house, "s", BEFORE)
    before, file = await house.head(), _without_time(await exported(house, "s"))
    outcomes = []
    for steps in range(1, 200):
        for keep in (False, True):
            _, end = await cut(house, "s", keep=keep, steps=steps)
            if end.said:
                break
            outcomes.append(end.memory.outcome)
            assert await house.head() == before
            assert _without_time(await exported(house, "s")) == file
        if end.said:
            break
    assert len(outcomes) >= 2
    assert set(outcomes) == {"rolled_back"}


async def _goes_on(house):
    """Tell whether a session to which nothing happened says what its undisturbed twin says."""
    await say(house, "twin", BEFORE)
    ours, twins = [told(await house.turn(AFTER, s, 12, rates=RATES)) for s in ("s", "twin")]
    return ours[0] == twins[0] and await memory(house, "s") == await memory(house, "twin")


def _without_time(file):
    """Return an export but for the moment at which it was asked for."""
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    described = header.pop("__metadata__")
    manifest = json.loads(described.pop("manifest"))
    assert manifest.pop("exported") > 0
    del described["sha256"]  # of the manifest
    return header, described, manifest, file[8 + length :]


# --- over real sockets --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(zygote):
    server = zygote.spawn(None, settings=EXACT)
    yield server.url
    server.close()


def asking(session, most, **memory):
    return {
        "type": "response.create",
        "input": TEXT,
        "conversation": session,
        "max_output_tokens": most,
        "temperature": 0,
        "memory": {"rates": {"user": 1, "assistant": 1}} | memory,
    }


def hear(line, pieces):
    while pieces:
        event = json.loads(line.recv(20))
        assert event["type"] not in TERMINAL, event
        pieces -= event["type"] == "response.output_text.delta"


def begun(server, session):
    Line(server).insist(session, Turn(BEFORE))
    Line(server).settled(session)


@pytest.mark.parametrize("way", ["socket", "http"])
def test_a_client_that_hangs_up_anywhere_leaves_the_session_to_the_bit(server, endless, way):
    session = f"hung-up-{way}"
    begun(server, session)
    before, line = Line(server).session(session), Line(server)
    file = _without_time(line.found(f"/v1/sessions/{session}/export"))
    for pieces in range(0, 16, 2):
        if way == "socket":
            with connect(f"ws{server[4:]}/v1/responses") as socket:
                socket.send(json.dumps(asking(session, LONG) | {"input": endless}))
                hear(socket, pieces)
                socket.socket.shutdown(SHUT_RDWR)  # without a word
        else:
            stream = Stream(server, session, Turn(endless, LONG))
            stream.hear(pieces)
            stream.hang_up()
        quiet(server)

        assert line.session(session) == before
        assert _without_time(line.found(f"/v1/sessions/{session}/export")) == file


def test_a_person_who_presses_stop_anywhere_keeps_what_was_shown(server, endless):
    for pieces in range(1, 20, 5):
        stopped, ended = f"pressed-{pieces}", f"limit-{pieces}"
        for session in (stopped, ended):
            begun(server, session)
        with connect(f"ws{server[4:]}/v1/responses") as socket:
            socket.send(json.dumps(asking(stopped, LONG) | {"input": endless}))
            hear(socket, pieces)
            socket.send(json.dumps({"type": "response.cancel"}))
            while (event := json.loads(socket.recv(20)))["type"] not in TERMINAL:
                pass
            said = event["response"]["usage"]["output_tokens"]
            socket.send(json.dumps(asking(ended, said) | {"input": endless}))
            while (twin := json.loads(socket.recv(20)))["type"] not in TERMINAL:
                pass

        assert event["response"]["incomplete_details"]["reason"] == "cancelled"
        assert judged(event["response"]).reply == judged(twin["response"]).reply
        line = Line(server)
        assert line.settled(stopped)["version"] == line.settled(ended)["version"]
        ours, theirs = line.tensors(stopped), line.tensors(ended)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
