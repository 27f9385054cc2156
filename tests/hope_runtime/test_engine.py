"""The engine, on a tiny random model: whatever is batched, split or interrupted changes nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import pytest
import torch

from hope_runtime.config import MemoryConfig
from hope_runtime.engine import Consolidation, Engine, NotFinite, Turn
from hope_runtime.model import Hope
from hope_runtime.report import Dropped, Failed, Finished, Learned, Reason, Said
from hope_runtime.sampling import Sampling
from hope_runtime.state import State, dump, restore
from hope_runtime.weights.random import random_checkpoint, tiny_config, tiny_mixed, tiny_native

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module", params=[tiny_config, tiny_native, tiny_mixed])
def checkpoint(request):
    return random_checkpoint(request.param())


@pytest.fixture(scope="module")
def model(checkpoint):
    return Hope(checkpoint.config, checkpoint.weights)


@pytest.fixture
def engine(model, checkpoint):
    ticks = count()
    return Engine(model, checkpoint.tokenizer, lanes=8, clock=lambda: float(next(ticks)))


def turn(id, state, text, *, most=12, learn=True, weight=1.0, **changes):
    given = tuple((byte, weight) for byte in text.encode())
    fields = {"closing": ((10, 0.0),), "said_weight": 0.0, "sampling": GREEDY, "stops": ()}
    return Turn(id, state, given, most=most, learn=learn, **fields | changes)


def run(engine, *jobs):
    """Run jobs to their end; return their facts by job."""
    for job in jobs:
        engine.submit(job)
    facts = []
    while not engine.idle:
        facts += engine.step()
    return {job.id: [f for f in facts if getattr(f, "job", None) == job.id] for job in jobs}


def end(facts):
    (finished,) = [f for f in facts if isinstance(f, Finished)]
    return finished


def said(facts):
    return "".join(f.text for f in facts if isinstance(f, Said)) + end(facts).text


def talk(engine, state, *texts, **changes):
    """Take turns, with the consolidation due after each; return the last state and the replies."""
    replies = []
    for i, text in enumerate(texts):
        facts = run(engine, turn(f"t{i}", state, text, **changes))[f"t{i}"]
        replies.append(said(facts))
        state = end(run(engine, Consolidation("c", end(facts).state))["c"]).state
    return state, replies


def assert_same_state(one: State, other: State, tolerance=1e-5):
    assert one.position == other.position
    assert one.carry == other.carry
    assert one.due == other.due
    assert one.levels.keys() == other.levels.keys()
    for name, level in one.levels.items():
        assert level.updates == other.levels[name].updates
        for key, delta in level.delta.items():
            torch.testing.assert_close(
                delta, other.levels[name].delta[key], rtol=tolerance, atol=tolerance
            )
    assert_same_memories(one, other, tolerance)
    for key in ("tokens", "weights", "keys", "values", "inputs"):
        axis = 2 if key in ("keys", "values") else 0
        a = torch.cat([getattr(p, key) for p in one.pieces], axis)
        b = torch.cat([getattr(p, key) for p in other.pieces], axis)
        least = min(a.shape[axis], b.shape[axis])
        a, b = (
            a.narrow(axis, a.shape[axis] - least, least),
            b.narrow(axis, b.shape[axis] - least, least),
        )
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_same_memories(one: State, other: State, tolerance=0):
    """What the memories hold now, and held where chunks begin that are still to be learned."""
    assert [mark.position for mark in one.marks] == [mark.position for mark in other.marks]
    assert (one.memories is None) == (other.memories is None)
    pairs = zip((one, *one.marks), (other, *other.marks), strict=True)
    for a, b in ((x.memories, y.memories) for x, y in pairs if x.memories is not None):
        for held, too in zip(a, b, strict=True):
            torch.testing.assert_close(held, too, rtol=tolerance, atol=tolerance)


def test_a_turn_reads_what_was_given_and_says_up_to_its_limit(engine):
    facts = run(engine, turn("a", State(), "hello there", most=5))["a"]

    finished = end(facts)
    assert finished.read == 11
    assert finished.said == len([f for f in facts if isinstance(f, Said)]) <= 5
    assert finished.state.position == 11 + finished.said - (finished.reason is Reason.LENGTH)
    assert finished.state.carry[-1] == (10, 0.0)


def test_a_given_chunk_is_consolidated_before_the_next_token(engine):
    facts = run(engine, turn("a", State(), "x" * 20, most=1))["a"]

    learned = [f.consolidated for f in facts if isinstance(f, Learned)]
    assert [(c.level, c.start, c.end) for c in learned] == [
        ("fast", 0, 8),
        ("slow", 0, 16),
        ("fast", 8, 16),
    ]
    assert end(facts).state.due == ()
    assert end(facts).state.levels["fast"].updates == 2


def test_a_chunk_completed_by_the_reply_waits_for_the_end_of_the_turn(engine):
    facts = run(engine, turn("a", State(), "hello", most=12))["a"]

    state = end(facts).state
    assert not [f for f in facts if isinstance(f, Learned)]
    assert state.due[0] == ("fast", 0, 8)

    after = end(run(engine, Consolidation("c", state))["c"]).state
    assert after.due == ()
    assert after.levels["fast"].updates == 1
    assert after.levels["fast"].movement > 0


def test_chunks_of_the_model_s_own_words_are_not_learned(engine):
    facts = run(engine, turn("a", State(), "abc", most=40, weight=0.0))["a"]

    assert end(facts).state.due == ()
    assert end(facts).state.deltas == {}


def test_eight_sessions_at_once_answer_as_each_alone(engine):
    texts = [f"session {i} says something of its own {'!' * i}" for i in range(8)]
    started = [talk(engine, State(), text)[0] for text in texts]
    assert all(state.deltas for state in started)
    questions = [f"and now {i}?" for i in range(8)]

    alone = [
        said(run(engine, turn("a", state, q, most=24))["a"])
        for state, q in zip(started, questions, strict=True)
    ]
    pairs = zip(started, questions, strict=True)
    together = run(engine, *(turn(f"j{i}", s, q, most=24) for i, (s, q) in enumerate(pairs)))

    assert [said(facts) for facts in together.values()] == alone
    assert len(set(alone)) > 1


def test_more_sessions_than_lanes_all_get_their_turn(model, checkpoint):
    narrow = Engine(model, checkpoint.tokenizer, lanes=2, clock=lambda: 0.0)

    facts = run(narrow, *(turn(f"j{i}", State(), f"hello {i}") for i in range(5)))

    assert all(end(each).said > 0 for each in facts.values())


def test_splitting_what_is_given_into_turns_changes_nothing(engine):
    text = "the quick brown fox jumps over the lazy dog, twice, and then rests a while by the fire"

    whole = end(run(engine, turn("a", State(), text, most=0, closing=()))["a"]).state
    state = State()
    for part in (text[:5], text[5:6], text[6:41], text[41:]):
        state = end(run(engine, turn("a", state, part, most=0, closing=()))["a"]).state

    assert whole.levels["fast"].updates > 5
    assert_same_state(state, whole)


def test_saved_and_restored_in_the_middle_a_session_goes_on_the_same(engine, model):
    state, _ = talk(engine, State(), "my name is Ada and I like trains", "what is my name?")
    facts, put, keep = dump(state, None)
    assert keep == set()

    again = restore(facts, put, model.config, model.dtype)

    assert_same_state(again, state, tolerance=0)
    assert (
        talk(engine, again, "and now?", "really?")[1]
        == talk(engine, state, "and now?", "really?")[1]
    )


def test_a_turn_saves_only_what_it_changed(engine):
    before, _ = talk(engine, State(), "a long beginning that fills more than one chunk or two")
    after = end(run(engine, turn("a", before, "hi", most=2))["a"]).state

    _, put, keep = dump(after, before)

    moved = {f"mark/{m.position:012d}" for m in after.marks if m not in before.marks}
    moved |= {"memory"} if after.memories else set()
    assert put.keys() == {f"window/{before.position:012d}-{after.position:012d}", *moved}
    assert {"level/fast", "level/slow", *(["sinks"] if after.sinks else [])} <= keep
    assert bool(before.marks) == any(name.startswith("mark/") for name in keep)


@pytest.mark.parametrize("learned", [True, False], ids=["chunks learned", "chunks still due"])
@pytest.mark.parametrize("ends", ["kept", "cancelled", "failed"])
def test_the_state_before_a_turn_stays_whole_however_the_turn_ends(engine, learned, ends):
    text = "something to remember, quite a bit longer than a chunk"
    before = end(run(engine, turn("a", State(), text, most=20, weight=float(learned)))["a"]).state
    before = replace(before, levels=talk(engine, State(), text)[0].levels)
    again = restore(*dump(before, None)[:2], engine._model.config, engine._model.dtype)
    more = turn("b", before, "a lot more text, enough for several chunks to fall due", most=30)

    if ends == "failed":
        bad = {name: torch.full_like(d, torch.nan) for name, d in before.deltas.items()}
        level = replace(before.levels["fast"], delta=bad)
        more = replace(more, state=replace(before, levels={**before.levels, "fast": level}))
    engine.submit(more)
    facts = [fact for _ in range(8) for fact in engine.step()]
    if ends == "cancelled":
        engine.cancel("b", keep=False)
    while not engine.idle:
        facts += engine.step()

    last = {"kept": Finished, "cancelled": Dropped, "failed": Failed}[ends]
    assert any(isinstance(fact, last) for fact in facts)
    assert_same_state(before, again, tolerance=0)
    one, other = (talk(engine, each, "and now?", most=20) for each in (before, again))
    assert one[1] == other[1]
    assert_same_state(one[0], other[0], tolerance=0)


def test_interrupted_after_every_turn_with_chunks_still_due_a_session_goes_on_the_same(engine):
    """Half of the chunks wait for the next turn, marks and all, in a store."""
    model, texts = engine._model, ["hello there", "I", "like", "trains, and the sea", "and", "you?"]
    kept = stored = State()
    blobs, waited = {}, 0
    for i, text in enumerate(texts):
        one, other = (turn(id, s, text, most=9) for id, s in (("a", kept), ("b", stored)))
        facts = run(engine, one)["a"]
        again = run(engine, other)["b"]

        assert said(again) == said(facts)
        before, kept, stored = stored, end(facts).state, end(again).state
        if i % 2:
            kept, stored = (
                end(run(engine, Consolidation("c", s))["c"]).state for s in (kept, stored)
            )
        facts, put, keep = dump(stored, before)
        blobs = {name: blob for name, blob in blobs.items() if name in keep} | put
        stored = restore(facts, blobs, model.config, model.dtype)
        waited += bool(stored.due) and bool(i % 2 == 0)
        assert_same_state(stored, kept, tolerance=0)
    assert waited > 1
    assert kept.levels["slow"].updates > 1


def test_a_memory_that_is_no_longer_finite_fails_its_turn_and_is_never_stored(engine, monkeypatch):
    """A token's own write is not yet in what it recalls: only the memory itself can tell."""
    if not engine._model.config.memory_blocks:
        pytest.skip("the model has no memory")
    lanes, append = engine._lanes, engine._lanes.append

    def spoiling(*args):
        append(*args)
        lanes._memories.live[:, 0, 0, 3] = torch.nan

    monkeypatch.setattr(lanes, "append", spoiling)
    facts = run(engine, *(turn(id, State(), "hello", most=0) for id in "ab"))

    assert isinstance(facts["a"][-1], Failed)
    assert isinstance(facts["a"][-1].error, NotFinite)
    assert end(facts["b"]).state.memories.live.isfinite().all()


def test_a_session_far_longer_than_the_window_keeps_its_size(engine):
    state = State()
    sizes = []
    for i in range(30):
        state, _ = talk(engine, state, f"turn {i} with some words in it", most=8)
        sizes.append(state.bytes)

    assert state.position > 10 * engine._model.config.window
    # pieces are whole turns, so the size breathes by one turn
    assert max(sizes[10:]) <= 1.5 * min(sizes[10:])


def test_a_native_session_has_the_same_size_after_five_thousand_tokens():
    config = tiny_native()
    fast, slow = config.levels
    levels = (replace(fast, chunk=64), replace(slow, chunk=128))
    config = replace(config, levels=levels, memory=MemoryConfig(2, 16))
    checkpoint = random_checkpoint(config)
    model = Hope(config, checkpoint.weights)
    engine = Engine(model, checkpoint.tokenizer, lanes=1, clock=lambda: 0.0)
    state, sizes = State(), []
    for i in range(20):
        text = f"{i:2d} {'the quick brown fox jumps over the lazy dog ' * 6}"[:256]
        job = turn("a", state, text, most=0, closing=(), learn=i < 2)
        state = end(run(engine, job)["a"]).state
        sizes.append(state.bytes)

    assert state.position == 5120
    assert set(sizes) == {sizes[0]}
    assert sizes[0] == state.bytes < 2 * sum(delta.nbytes for delta in state.deltas.values())


def test_cancel_keeps_what_was_said(engine):
    engine.submit(turn("a", State(), "hello", most=1000))
    facts = []
    while len([f for f in facts if isinstance(f, Said)]) < 4:
        facts += engine.step()
    engine.cancel("a", keep=True)
    facts += engine.step()

    finished = end(facts)
    assert finished.reason is Reason.CANCELLED
    assert finished.said == 4
    assert engine.idle
    kept = run(engine, turn("b", State(), "hello", most=4))["b"]
    assert_same_state(finished.state, end(kept).state)


def test_cancel_without_keep_drops_the_turn(engine):
    engine.submit(turn("a", State(), "hello", most=1000))
    for _ in range(4):
        engine.step()
    engine.cancel("a", keep=False)

    assert engine.step() == [Dropped("a")]
    assert engine.idle


def test_cancelling_while_the_turn_waits_drops_it(engine):
    engine.submit(turn("a", State(), "hello"))
    engine.cancel("a", keep=True)

    assert engine.step()[0] == Dropped("a")


def test_a_stop_string_ends_the_reply_and_is_not_shown(engine):
    whole = said(run(engine, turn("a", State(), "hello", most=40))["a"])
    assert len(whole) > 8
    stop = whole[4:6]

    facts = run(engine, turn("a", State(), "hello", most=40, stops=(stop,)))["a"]

    assert said(facts) == whole[: whole.index(stop)]
    assert end(facts).reason is Reason.STOP


def test_probabilities_that_are_not_finite_fail_their_own_turn_only(engine, model):
    state, _ = talk(engine, State(), "enough words to have consolidated at least once")
    bad = {name: torch.full_like(d, float("nan")) for name, d in state.levels["fast"].delta.items()}
    levels = {**state.levels, "fast": replace(state.levels["fast"], delta=bad)}
    broken = replace(state, levels=levels)

    facts = run(
        engine, turn("bad", broken, "hi", learn=False), turn("good", state, "hi", learn=False)
    )

    assert isinstance(facts["bad"][-1], Failed)
    assert isinstance(facts["bad"][-1].error, NotFinite)
    assert end(facts["good"]).said > 0


@pytest.mark.parametrize("block", [2, 3])
def test_reading_without_a_reply_fails_too_when_it_is_not_finite(engine, block):
    """Else the session would be stored with numbers that no one can load."""
    state, _ = talk(engine, State(), "enough words to have consolidated at least once")
    level = "fast" if block == 3 else "slow"
    bad = {name: d * float("nan") for name, d in state.levels[level].delta.items()}
    levels = {**state.levels, level: replace(state.levels[level], delta=bad)}

    facts = run(engine, turn("bad", replace(state, levels=levels), "hi", most=0, learn=False))

    assert isinstance(facts["bad"][-1], Failed)
    assert isinstance(facts["bad"][-1].error, NotFinite)
    assert end(run(engine, turn("next", State(), "hi", learn=False))["next"]).said > 0


def test_a_consolidation_that_raises_fails_its_own_job_only(engine):
    due = end(run(engine, turn("a", State(), "hello", most=12))["a"]).state
    assert due.due
    broken = replace(due, pieces=tuple(replace(p, inputs=p.inputs[:, :5]) for p in due.pieces))

    facts = run(
        engine, Consolidation("c", broken), turn("d", broken, "hi"), turn("good", due, "hi")
    )

    for job in ("c", "d"):
        assert isinstance(facts[job][-1], Failed)
        assert isinstance(facts[job][-1].error, RuntimeError)
    assert end(facts["good"]).said > 0


def test_base_weights_never_change(engine, model):
    before = [block.mlps[0].down.clone() for block in model.blocks]

    talk(engine, State(), "a good deal of text to learn from, over and over", "more", "and more")

    for block, was in zip(model.blocks, before, strict=True):
        torch.testing.assert_close(block.mlps[0].down, was, rtol=0, atol=0)


def test_a_fresh_session_gives_the_base_model_s_logits_bit_for_bit(engine, model):
    def surprises(learn):
        facts = run(engine, turn("a", State(), "abcdefg", most=1, learn=learn))["a"]
        return [f.surprise for f in facts if isinstance(f, Said)]

    assert surprises(learn=True) == surprises(learn=False)
