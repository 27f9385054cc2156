"""Which sessions are in RAM, and what of a resent history is known already."""

import json
from dataclasses import replace

import pytest
import torch

from hope_runtime.blobs import StateError
from hope_runtime.engine import Engine, Turn
from hope_runtime.report import Finished
from hope_runtime.sampling import Sampling
from hope_runtime.state import State
from hope_runtime.tokenizer import Message, Role
from memory_store import Incompatible, LocalStore, SessionKey
from server.book import Book, known_prefix
from server.residency import Residency

HELLO = Message(Role.USER, "hello")
REPLY = Message(Role.ASSISTANT, "good day")
AGAIN = Message(Role.USER, "how are you?")
SYSTEM = Message(Role.SYSTEM, "be kind")


def book(*messages):
    kept = Book()
    for message in messages:
        kept = kept.with_item(message)
    return kept


def key(name):
    return SessionKey("acme", name)


@pytest.fixture
def store():
    return LocalStore()


@pytest.fixture
def residency(build, store):
    def make(budget=1 << 30, fingerprint="print"):
        return Residency(store, build.config, torch.float32, fingerprint, budget=budget)

    return make


@pytest.fixture(scope="module")
def state(build):
    """A session that has read a little and learned from it."""
    tokenizer = build.checkpoint.tokenizer
    engine = Engine(build.model, tokenizer, lanes=1, clock=lambda: 0.0)
    given = tuple((token, 1.0) for token in tokenizer.encode("it rains in the hills today"))
    engine.submit(Turn("t", State(), given, (), 4, 0.0, Sampling(temperature=0), (), True))
    facts = []
    while not engine.idle:
        facts += engine.step()
    [finished] = [fact for fact in facts if isinstance(fact, Finished)]
    assert finished.state.levels["fast"].updates
    return finished.state


async def get(residency, name):
    """Ask for a session as a turn does that is about to write it."""
    return await residency.get(await residency.store.acquire(key(name), "me", seconds=30))


async def commit(residency, name, state, kept=None):
    lease = await residency.store.acquire(key(name), "me", seconds=30)
    base = (await residency.get(lease)).resident
    after, _ = await residency.commit(
        base, state, kept or base.book, lease=lease, commit_id=f"{name}-{base.version}"
    )
    return after


# --- in RAM and at rest -------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_session_nobody_knows_is_new_and_empty(residency):
    found = await get(residency(), "a")

    resident = found.resident
    assert (found.source, found.recovered) == ("new", None)
    assert (resident.version, resident.state, resident.book) == (0, State(), Book())


@pytest.mark.anyio
async def test_looking_at_a_new_session_keeps_nothing(residency):
    ram = residency()
    await get(ram, "a")

    assert (len(ram), ram.bytes) == (0, 0)
    assert (await get(ram, "a")).source == "new"


@pytest.mark.anyio
async def test_a_committed_session_is_found_in_ram(residency, state):
    ram = residency()
    after = await commit(ram, "a", state)

    found = await get(ram, "a")

    assert found.source == "host"
    assert found.resident is after
    assert ram.bytes == state.bytes


@pytest.mark.anyio
async def test_a_session_read_from_the_store_is_the_session_that_was_committed(residency, state):
    kept = Book(turns=3, surprise=2.5, metadata={"a": "b"}).with_item(HELLO)
    await commit(residency(), "a", state, kept)

    found = await get(residency(), "a")

    resident = found.resident
    assert found.source == "store"
    assert (resident.version, resident.book) == (1, kept)
    assert resident.state.position == state.position
    assert resident.state.carry == state.carry
    assert resident.state.levels["fast"].updates == state.levels["fast"].updates
    for name, delta in state.deltas.items():
        torch.testing.assert_close(resident.state.deltas[name], delta, rtol=0, atol=0)
    for old, new in zip(state.pieces, resident.state.pieces, strict=True):
        torch.testing.assert_close(new.keys, old.keys, rtol=0, atol=0)


@pytest.mark.anyio
async def test_the_least_recently_used_session_leaves_first(residency, state):
    ram = residency(budget=2 * state.bytes)
    await commit(ram, "a", state)
    await commit(ram, "b", state)
    await get(ram, "a")

    await commit(ram, "c", state)

    sources = {name: (await get(ram, name)).source for name in ("a", "c")}
    assert sources == {"a": "host", "c": "host"}
    assert (await get(ram, "b")).source == "store"


@pytest.mark.anyio
async def test_ram_stays_within_its_budget(residency, state):
    ram = residency(budget=3 * state.bytes)
    for number in range(8):
        await commit(ram, f"s{number}", state)

    assert len(ram) == 3
    assert ram.bytes == 3 * state.bytes


@pytest.mark.anyio
async def test_one_session_stays_even_if_it_is_larger_than_the_budget(residency, state):
    ram = residency(budget=1)
    await commit(ram, "a", state)

    assert (await get(ram, "a")).source == "host"
    await commit(ram, "b", state)
    assert len(ram) == 1


@pytest.mark.anyio
async def test_committing_again_counts_a_session_once(residency, state):
    ram = residency()
    await commit(ram, "a", state)
    await commit(ram, "a", state)

    assert (len(ram), ram.bytes) == (1, state.bytes)
    assert (await get(ram, "a")).resident.version == 2


@pytest.mark.anyio
async def test_a_dropped_session_is_read_again(residency, state):
    ram = residency()
    await commit(ram, "a", state)
    ram.drop(key("a"))
    ram.drop(key("a"))

    assert ram.bytes == 0
    assert (await get(ram, "a")).source == "store"


@pytest.mark.anyio
async def test_a_session_of_another_model_is_refused_and_never_begun_anew(residency, state):
    await commit(residency(), "a", state)

    with pytest.raises(Incompatible, match="serve the model that made it"):
        await get(residency(fingerprint="other"), "a")


@pytest.mark.anyio
async def test_a_session_whose_window_is_missing_is_an_error_and_never_begun_anew(
    residency, store, state
):
    await commit(residency(), "a", state)
    kept = store._sessions[key("a")].kept
    whole = kept[1].snapshot
    rest = {n: blob for n, blob in whole.blobs.items() if not n.startswith("window/")}
    kept[1] = replace(kept[1], snapshot=replace(whole, blobs=rest))

    with pytest.raises(StateError):
        await get(residency(), "a")


# --- what is known already ----------------------------------------------------------------------


def test_a_book_survives_json():
    kept = Book(
        turns=2,
        instructions="abc",
        surprise=1.5,
        learned_at={"fast": 12.5},
        metadata={"name": "Ada"},
    ).with_item(HELLO)

    assert Book(**json.loads(json.dumps(kept.to_json()))) == kept


def test_nothing_is_known_to_a_new_session():
    assert known_prefix(Book(), [HELLO, REPLY, AGAIN]) == 0


def test_a_resent_history_is_known_up_to_what_was_said_last():
    assert known_prefix(book(HELLO, REPLY), [HELLO, REPLY, AGAIN]) == 2


def test_the_known_part_counts_however_much_is_new():
    assert known_prefix(book(HELLO, REPLY), [HELLO, REPLY, AGAIN, REPLY, HELLO]) == 2


def test_a_history_that_begins_otherwise_is_all_new():
    assert known_prefix(book(HELLO, REPLY), [AGAIN, REPLY, HELLO]) == 0


def test_a_single_message_is_new_even_if_it_was_said_before():
    assert known_prefix(book(HELLO, REPLY), [HELLO]) == 0


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param([HELLO, Message(Role.ASSISTANT, "bad day"), AGAIN], id="another reply"),
        pytest.param([HELLO, Message(Role.USER, "good day"), AGAIN], id="another role"),
        pytest.param([HELLO, AGAIN, REPLY], id="another order"),
        pytest.param([HELLO, REPLY], id="nothing new"),
        pytest.param([HELLO, AGAIN], id="shorter than what is known"),
    ],
)
def test_a_history_that_begins_alike_and_differs_later_has_diverged(messages):
    assert known_prefix(book(HELLO, REPLY), messages) is None


def test_spaces_around_a_message_make_no_difference():
    spaced = Message(Role.ASSISTANT, " good day\n")

    assert known_prefix(book(HELLO, REPLY), [HELLO, spaced, AGAIN]) == 2


def test_instructions_are_part_of_the_history():
    assert known_prefix(book(SYSTEM, HELLO, REPLY), [SYSTEM, HELLO, REPLY, AGAIN]) == 3
    assert known_prefix(book(SYSTEM, HELLO, REPLY), [HELLO, REPLY, AGAIN]) == 0
