"""Sessions of the default model: apart from each other, never interrupted, and never slower."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from time import perf_counter

import pytest
import torch

from hope_runtime.engine import Engine, Turn
from hope_runtime.lanes import Lanes
from hope_runtime.model import Hope
from hope_runtime.report import Finished, Phase, Said, Stepped
from hope_runtime.sampling import Sampling
from hope_runtime.state import State, dump, restore
from hope_runtime.weights import read

pytestmark = pytest.mark.weights

GREEDY = Sampling(temperature=0)
QUESTION = "\nThe most important thing to know about it is that"
DOCUMENTS = [
    "Zurich's tram number four leaves from the lake at six and carries mostly bakers and nurses.",
    "A violin's bow is strung with horse hair, and rosin makes the hair grip the string again.",
    "def area(radius): return 3.14159 * radius ** 2  # the disc, not the ring around the disc",
    "The treaty was signed at midnight by five ministers, of whom two had not read a page of it.",
    "Whales sleep upright, half of the brain at a time, and rise together to breathe at dawn.",
    "Knead the dough for ten minutes, let it rest overnight in the cold, and bake it very hot.",
    "On the third moon of the gas giant it rains methane into lakes as still as black glass.",
    "My grandmother kept bees on the roof of the post office and sold the honey under the counter.",
]


@pytest.fixture(scope="module")
def checkpoint(default_file):
    return read(default_file)


@pytest.fixture(scope="module")
def model(checkpoint):
    """Return the default model as it is served, but that it learns fast and in short chunks."""
    fast, slow = checkpoint.config.stacked().levels
    levels = (
        replace(fast, chunk=8, rate=8e-4, clip=1.0, bound=1.0),
        replace(slow, chunk=16, rate=8e-4, clip=1.0, bound=1.0),
    )
    return Hope(replace(checkpoint.config, window=128, levels=levels), checkpoint.weights)


@pytest.fixture
def engine(model, checkpoint):
    return Engine(model, checkpoint.tokenizer, lanes=8, clock=perf_counter)


def turn(state, tokens, *, id="a", most=0, learn=True, closing=()):
    given = tuple((token, 1.0) for token in tokens)
    return Turn(id, state, given, closing, most, 0.0, GREEDY, (), learn)


def run(engine, *jobs):
    for job in jobs:
        engine.submit(job)
    facts = []
    while not engine.idle:
        facts += engine.step()
    return facts


def end(facts, job="a"):
    (finished,) = [fact for fact in facts if isinstance(fact, Finished) and fact.job == job]
    return finished


@torch.no_grad()
def greedy(model, lanes, lane, state, question, count):
    """Answer a question alone; return the tokens said and the logits that each was drawn from."""
    lanes.load(lane, state)
    deltas, position, tokens, said, seen = [state.deltas], state.position, question, [], []
    for _ in range(count):
        start = torch.tensor([position])
        past = lanes.view(lane, lane + 1, position)
        found = model.run(model.embed(torch.tensor([tokens])), start, past, deltas)
        lanes.append(lane, start, found)
        position += len(tokens)
        seen.append(model.logits(found.hidden[0, -1]))
        said.append(int(seen[-1].argmax()))
        tokens = said[-1:]
    return said, torch.stack(seen)


def test_eight_sessions_at_once_answer_as_each_would_alone(model, engine, checkpoint):
    """In float32 the same greedy tokens; a tie of the first two within 1e-4 would be named."""
    encode, count = checkpoint.tokenizer.encode, 10
    states = [end(run(engine, turn(State(), encode(text)))).state for text in DOCUMENTS]
    assert all(state.levels.keys() == {"fast", "slow"} for state in states)
    question = encode(QUESTION)
    lanes = Lanes(model, 1)
    alone = [greedy(model, lanes, 0, state, question, count) for state in states]

    # the same, were the memory of another: it is their own deltas that they answer with
    swapped = replace(states[0], levels=states[1].levels)
    _, others = greedy(model, lanes, 0, swapped, question, 1)
    assert float((others[0] - alone[0][1][0]).abs().max()) > 0.1

    options = {"most": count, "learn": False}
    jobs = [turn(state, question, id=str(i), **options) for i, state in enumerate(states)]
    facts = run(engine, *jobs)

    ties = []
    for i, (tokens, logits) in enumerate(alone):
        first, second = logits.topk(2).values.unbind(-1)
        said = [fact for fact in facts if isinstance(fact, Said) and fact.job == str(i)]
        surprises = (logits.logsumexp(-1) - first).tolist()
        if min(first - second) <= 1e-4:
            ties.append(i)
            continue
        text = "".join(fact.text for fact in said) + end(facts, str(i)).text
        assert text == checkpoint.tokenizer.decode(tokens[: len(said)])
        assert [fact.surprise for fact in said] == pytest.approx(surprises[: len(said)], abs=1e-3)
        assert len(said) == count or tokens[len(said)] in checkpoint.tokenizer.stop_ids
    assert ties == [], "sessions whose first two candidates tie cannot be compared token by token"
    assert len({tuple(tokens) for tokens, _ in alone}) > 4


def test_until_it_has_learned_a_session_is_the_base_bit_for_bit(model, engine, checkpoint):
    """Learning on, learning off, and a model that has no levels at all."""
    tokens = checkpoint.tokenizer.encode("I live in Lisbon with")  # less than a chunk
    base = Hope(replace(model.config, levels=()), checkpoint.weights)
    assert len(tokens) < 8

    def said(machine, learn):
        facts = run(machine, turn(State(), tokens, most=8, learn=learn))
        return [(fact.text, fact.surprise) for fact in facts if isinstance(fact, Said)]

    _, with_levels = greedy(model, Lanes(model, 1), 0, State(), tokens, 8)
    _, without = greedy(base, Lanes(base, 1), 0, State(), tokens, 8)
    plain = Engine(base, checkpoint.tokenizer, lanes=8, clock=perf_counter)

    assert torch.equal(with_levels, without)
    assert said(engine, True) == said(engine, False) == said(plain, False)


def test_stored_and_read_again_a_session_goes_on_as_if_never_interrupted(model, checkpoint):
    """The one lane is built up call by call, the other laid out from what was stored."""
    tokens = checkpoint.tokenizer.encode(" ".join(DOCUMENTS))[:160]
    reader = Engine(model, checkpoint.tokenizer, lanes=2, clock=perf_counter)
    state = end(run(reader, turn(State(), tokens))).state
    lanes = reader._lanes  # on the first, the session is still as it was read
    assert state.position > model.config.window
    assert state.levels["slow"].updates == 10
    facts, blobs, _ = dump(state, None)

    again = restore(facts, blobs, model.config, model.dtype)
    lanes.load(1, again)

    with torch.no_grad():
        start, next = torch.tensor([160]), model.embed(torch.tensor([[1234]]))
        kept = model.run(next, start, lanes.view(0, 1, 160), [state.deltas])
        back = model.run(next, start, lanes.view(1, 2, 160), [again.deltas])
        error = float((model.logits(kept.hidden) - model.logits(back.hidden)).abs().max())
    assert error < 1e-4


class Speaker:
    """A session that goes on speaking, a token a step, in an engine of its own."""

    def __init__(self, model, tokenizer, state):
        self.engine = Engine(model, tokenizer, lanes=1, clock=perf_counter)
        self.state = state
        self.seconds = []

    def step(self):
        if self.engine.idle:
            self.engine.submit(turn(self.state, [198], most=64, learn=False))
        for fact in self.engine.step():
            if isinstance(fact, Stepped) and fact.phase is Phase.DECODE:
                self.seconds.append(fact.seconds)
            elif isinstance(fact, Finished):
                self.state = fact.state


@pytest.mark.long
def test_after_twenty_thousand_tokens_a_token_costs_what_it_did(checkpoint):
    """Decoding alternates between a session of 1,100 tokens and one of 20,000."""
    model = Hope(checkpoint.config.stacked(), checkpoint.weights)
    engine = Engine(model, checkpoint.tokenizer, lanes=1, clock=perf_counter)
    text = " ".join(f"Entry {i}: {DOCUMENTS[i % 8]}" for i in range(1000))
    tokens = checkpoint.tokenizer.encode(text)[:20_000]
    assert len(tokens) == 20_000
    # both have learned at both levels, and so have a delta everywhere
    state = end(run(engine, turn(State(), tokens[:256]))).state
    state = end(run(engine, turn(state, tokens[256:1100], learn=False))).state
    young = state
    for start in range(1100, 20_000, 900):
        state = end(run(engine, turn(state, tokens[start : start + 900], learn=False))).state
    assert state.position == 20_000

    per_turn = 900 * state.bytes / sum(p.end - p.start for p in state.pieces)
    assert abs(state.bytes - young.bytes) <= per_turn
    speakers = [Speaker(model, checkpoint.tokenizer, each) for each in (young, state)]
    while min(len(speaker.seconds) for speaker in speakers) < 200:
        for speaker in speakers:
            speaker.step()

    early, late = (1000 * median(speaker.seconds) for speaker in speakers)
    print(  # noqa: T201 - for -s
        f"\n{early:.1f} ms a token after 1,100 tokens, {late:.1f} ms after 20,000: "
        f"ratio {late / early:.3f}; {young.bytes} and {state.bytes} bytes"
    )
    assert late / early < 1.1
