"""The memory layer beside a base: it splits as one likes, and untrained it is nothing."""

from dataclasses import replace
from itertools import count, pairwise

import pytest
import torch

from hope_runtime.blobs import StateError
from hope_runtime.config import ConfigError, RecallConfig
from hope_runtime.difference import differences
from hope_runtime.engine import Engine, Turn
from hope_runtime.layers import recall
from hope_runtime.model import Hope
from hope_runtime.report import Finished, Said
from hope_runtime.sampling import Sampling
from hope_runtime.state import State, dump, restore, settle
from hope_runtime.storage import Form, Storage
from hope_runtime.training.told.learn import initial
from hope_runtime.weights.checkpoint import CheckpointError
from hope_runtime.weights.memory_layer import read_layer, require_fit, write_layer
from hope_runtime.weights.random import random_checkpoint, tiny_config

CONFIG = RecallConfig(
    taps=(0, 1), whitened=16, own=8, behind=6, ahead=3, heads=2, attention=8, keys=12, values=12,
    gate=4, hidden=8, digest="one",
)  # fmt: skip
WORDS = "my dog is called rex, and it rains. what is the name of my dog? "
LONG = 32  # tokens: the window of the tiny model


@pytest.fixture(scope="module")
def checkpoint():
    return random_checkpoint(tiny_config())


@pytest.fixture(scope="module")
def untrained(checkpoint):
    model = Hope(replace(checkpoint.config, recall=CONFIG), checkpoint.weights)
    ids = torch.tensor([list(WORDS.encode())])[:, :LONG]
    read = model.run(model.embed(ids), torch.zeros(1, dtype=torch.int64), model.nothing(1), [{}])
    decoded = [checkpoint.tokenizer.decode([id]) for id in range(model.config.vocabulary)]
    return initial(CONFIG, read.tapped[0], model.embedding, decoded)


@pytest.fixture(scope="module")
def weights(untrained):
    """A layer that does something, whatever it may be."""
    chance = torch.Generator().manual_seed(1)
    keep = {"mean", "scale", "spaced", "opens", "rate_bias", "fading", "gain"}
    moved = {
        name: t + 0.3 * torch.randn(t.shape, generator=chance)
        for name, t in untrained._asdict().items()
        if name not in keep
    }
    return untrained._replace(**moved, gain=torch.tensor(1.0), rate_bias=torch.tensor([0.0]))


def model_with(checkpoint, weights, config=CONFIG):
    tensors = {recall.NAME + name: t for name, t in weights._asdict().items()}
    return Hope(replace(checkpoint.config, recall=config), {**checkpoint.weights, **tensors})


@pytest.fixture(scope="module")
def model(checkpoint, weights):
    return model_with(checkpoint, weights)


def close(one, other, tolerance=1e-5):
    for mine, theirs in zip(one, other, strict=True):
        if mine.dtype.is_floating_point:
            torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)
        else:
            assert torch.equal(mine, theirs)


# --- its parts --------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 5, 64, 65, 150])
def test_local_attention_is_that_of_each_token_to_its_window(tokens):
    torch.manual_seed(0)
    heads, window, width = 2, 7, 8
    query = torch.randn(2, tokens, width)
    context = torch.randn(2, tokens + window - 1, 2 * width)
    valid = torch.rand(2, tokens + window - 1) < 0.7
    valid[:, window // 2 :: 2] = True
    bias = torch.randn(heads, window)
    found = recall.local(query, context, valid, bias)
    for b in range(2):
        for t in range(tokens):
            here = slice(t, t + window)
            keys, values = context[b, here].unflatten(-1, (2, heads, -1)).unbind(1)
            scores = torch.einsum("hn,whn->hw", query[b, t].view(heads, -1), keys) / 2.0 + bias
            weight = scores.masked_fill(~valid[b, here], -1e9).softmax(-1)
            wanted = torch.einsum("hw,whn->hn", weight, values).flatten()
            torch.testing.assert_close(found[b, t], wanted, atol=1e-5, rtol=1e-5)


def advanced(model, weights, pieces, stated=True):
    held = recall.empty(1, CONFIG, model.embedding)
    past = model.nothing(1)
    ids = torch.tensor([list(WORDS.encode())])[:, :LONG]
    read = model.run(model.embed(ids), torch.zeros(1, dtype=torch.int64), past, [{}])
    start = 0
    for size in pieces:
        part = slice(start, start + size)
        said = torch.full((1, size), stated)
        held = recall.advance(
            weights, CONFIG, held, read.tapped[:, part], ids[:, part], said, model.embed
        )
        start += size
    return held


def test_reading_may_be_split_anywhere(model, weights):
    size = LONG
    whole = advanced(model, weights, [size])
    assert float(whole.matrix.norm()) > 0.1
    close(whole, advanced(model, weights, [1] * size))
    close(whole, advanced(model, weights, [7, 1, 20, size - 28]))


def test_rows_of_a_batch_do_not_see_each_other_nor_filler(model, weights):
    ids = torch.randint(0, 250, (3, 20))
    lengths = torch.tensor([20, 3, 11])
    features = torch.randn(3, 20, 2 * model.config.width)
    said = torch.rand(3, 20) < 0.8
    held = recall.empty(3, CONFIG, model.embedding)
    both = recall.advance(weights, CONFIG, held, features, ids, said, model.embed, lengths)
    for row, n in enumerate(lengths.tolist()):
        alone = recall.advance(
            weights, CONFIG, recall.empty(1, CONFIG, model.embedding), features[row : row + 1, :n],
            ids[row : row + 1, :n], said[row : row + 1, :n], model.embed,
        )  # fmt: skip
        close(alone, both.session(row))


def test_what_nobody_stated_is_not_written(model, weights):
    held = advanced(model, weights, [LONG], stated=False)
    assert not held.matrix.any()


def test_a_rate_below_the_floor_changes_nothing(model, weights):
    silent = weights._replace(rate_bias=torch.tensor([-20.0]))
    assert not advanced(model, silent, [LONG]).matrix.any()


def test_a_name_that_begins_a_message_is_written_with_its_space(untrained):
    opens = untrained.opens.clone()
    spaced = untrained.spaced.clone()
    spaced[ord("R")] = 7
    found = recall.written(
        untrained._replace(opens=opens, spaced=spaced),
        torch.tensor([ord("\n"), ord("x"), recall.NOTHING]),
        torch.tensor([ord("R"), ord("R"), ord("a")]),
    )
    assert found.tolist() == [7, ord("R"), ord("a")]


def test_what_was_read_is_like_the_one_value_that_it_is(model, weights):
    codes = recall.values(weights, model.embedding)
    alike = recall.likeness(codes[7], codes)
    assert int(alike.argmax()) == 7
    torch.testing.assert_close(float(alike.max()), 1.0)
    mixed = codes[:40].mean(0)
    assert float(recall.likeness(mixed, codes).max()) < 0.8
    both = recall.likeness(torch.stack([codes[7], mixed]), codes)
    assert both.shape == (2, len(codes))


# --- within a session -------------------------------------------------------------------------


def engine_of(model, checkpoint):
    ticks = count()
    return Engine(model, checkpoint.tokenizer, lanes=4, clock=lambda: float(next(ticks)))


def turn(id, state, text, *, most=8, learn=True, **changes):
    given = tuple((byte, 1.0) for byte in text.encode())
    fields = {"closing": ((10, 0.0),), "said_weight": 0.0, "stops": ()}
    return Turn(
        id, state, given, most=most, learn=learn, sampling=Sampling(temperature=0),
        **fields | changes,
    )  # fmt: skip


def ended(engine, *turns):
    for each in turns:
        engine.submit(each)
    facts = []
    while not engine.idle:
        facts += engine.step()
    ends = {f.job: f for f in facts if isinstance(f, Finished)}
    said = {each.id: "".join(f.text for f in facts if isinstance(f, Said) and f.job == each.id)
            for each in turns}  # fmt: skip
    return [(ends[t.id].state, said[t.id] + ends[t.id].text) for t in turns]


def test_an_untrained_layer_changes_nothing_bit_for_bit(checkpoint, untrained):
    bare = Hope(checkpoint.config, checkpoint.weights)
    base = engine_of(bare, checkpoint)
    ours = engine_of(model_with(checkpoint, untrained), checkpoint)
    one, other = State(), State()
    for text in (WORDS, "and then? ", "what is my name? "):
        [(one, said)] = ended(base, turn("t", one, text))
        [(other, heard)] = ended(ours, turn("t", other, text))
        assert said == heard
    assert torch.equal(one.pieces[-1].keys, other.pieces[-1].keys)
    assert other.facts is not None
    layered = model_with(checkpoint, untrained)
    logits = bare.logits(torch.randn(3, bare.config.width))
    alike = layered.likeness(torch.randn(3, CONFIG.values))
    assert torch.equal(logits, layered.recalled(logits, alike))


def test_what_was_read_is_less_familiar_where_more_is_held_and_where_more_is_of_that_token():
    codes = torch.eye(2, CONFIG.values)
    alike = torch.tensor([0.1, 0.6]).expand(4, 2)
    held = torch.zeros(4, CONFIG.values, CONFIG.keys)
    held[0, 1, 0] = 0.125  # written weakly; less than one token counts as one held
    held[1, 1, 0] = 1.0
    held[2, 1, 0], held[2, 2, :3] = 1.0, 21**0.5  # 8 in all
    held[3, 1, 0] = 8.0
    found = recall.familiar(alike, held, codes)
    assert found.tolist() == pytest.approx([1.2, 0.6, 0.3, 0.15])


def test_what_was_read_may_be_said_louder_than_was_trained(checkpoint, untrained):
    layered = model_with(checkpoint, untrained._replace(gain=torch.tensor(1.0)))
    logits, alike = torch.randn(2, 3), torch.randn(2, 3)
    once, twice = layered.recalled(logits, alike), layered.recalled(logits, alike, 2.0)
    torch.testing.assert_close(twice - once, once - logits)


def test_facts_are_the_same_alone_and_in_a_batch_and_after_storage(model, checkpoint):
    engine = engine_of(model, checkpoint)
    texts = [WORDS, "the cat sat on the mat, " * 3, "oh"]
    alone = [ended(engine, turn("t", State(), text))[0][0] for text in texts]
    together = ended(engine, *(turn(str(i), State(), text) for i, text in enumerate(texts)))
    for mine, (theirs, _) in zip(alone, together, strict=True):
        close(
            mine.facts._replace(around=mine.facts.tokens),
            theirs.facts._replace(around=theirs.facts.tokens),
            1e-4,
        )
    state = alone[0]
    facts, blobs, _ = dump(state, None)
    again = restore(facts, blobs, model.config, model.dtype)
    close(
        state.facts._replace(around=state.facts.tokens),
        again.facts._replace(around=again.facts.tokens),
        0,
    )
    [(one, said)] = ended(engine, turn("t", state, "and then? "))
    [(other, heard)] = ended(engine, turn("t", again, "and then? "))
    assert said == heard
    close(one.facts, other.facts)


def test_facts_that_did_not_change_are_not_written_again(model, checkpoint):
    engine = engine_of(model, checkpoint)
    [(state, _)] = ended(engine, turn("t", State(), WORDS))
    state = settle(state, None, Storage(memory=Form.BF16))
    _, put, keep = dump(state, state)
    assert "facts" in keep
    assert "facts" not in put


def test_a_turn_that_does_not_learn_writes_no_facts(model, checkpoint):
    engine = engine_of(model, checkpoint)
    [(state, _)] = ended(engine, turn("t", State(), WORDS, learn=False))
    assert not state.facts.matrix.any()


def test_only_what_may_be_a_fact_is_written(model, checkpoint):
    engine = engine_of(model, checkpoint)
    told = (False,) * len(WORDS)
    [(state, _)] = ended(engine, turn("t", State(), WORDS, told=told, said_weight=1.0))
    assert not state.facts.matrix.any()  # a document's words, and what the model said
    one = tuple(place < 30 for place in range(len(WORDS)))
    [(state, _)] = ended(engine, turn("t", State(), WORDS, told=one))
    assert state.facts.matrix.any()


def test_what_was_told_shows_in_the_difference_of_two_versions(model, checkpoint):
    engine = engine_of(model, checkpoint)
    [(state, _)] = ended(engine, turn("t", State(), WORDS))
    [apart] = [each for each in differences(State(), state) if each.name == "facts"]
    assert apart.before == 0.0
    assert apart.after == apart.distance == pytest.approx(float(state.facts.matrix.norm()))


def test_facts_of_another_layer_are_refused(model, checkpoint):
    engine = engine_of(model, checkpoint)
    [(state, _)] = ended(engine, turn("t", State(), WORDS))
    facts, blobs, _ = dump(state, None)
    other = replace(model.config, recall=replace(CONFIG, digest="two"))
    with pytest.raises(StateError, match="memory layer 'one', and this model has 'two'"):
        restore(facts, blobs, other, model.dtype)
    renamed = replace(model.config, recall=replace(CONFIG, digest="two", formerly=("zero", "one")))
    assert torch.equal(restore(facts, blobs, renamed, model.dtype).facts.matrix, state.facts.matrix)
    with pytest.raises(StateError, match="this model has none"):
        restore(facts, blobs, replace(model.config, recall=None), model.dtype)
    with pytest.raises(StateError, match="facts"):
        restore(facts, {**blobs, "facts": b"x"}, model.config, model.dtype)


def test_a_session_without_facts_can_begin_to_have_some(model, checkpoint):
    base = engine_of(Hope(checkpoint.config, checkpoint.weights), checkpoint)
    [(state, _)] = ended(base, turn("t", State(), WORDS))
    assert state.facts is None
    facts, blobs, _ = dump(state, None)
    again = restore(facts, blobs, model.config, model.dtype)
    [(state, _)] = ended(engine_of(model, checkpoint), turn("t", again, WORDS))
    assert state.facts.matrix.any()


# --- whether it answers -----------------------------------------------------------------------


def always(weights):
    """Return a layer that takes every turn for a question about the user."""
    return weights._replace(
        sense_out=torch.zeros_like(weights.sense_out), sense_out_bias=torch.tensor([5.0])
    )


KNOWS, KNOWS_NOT = (replace(CONFIG, knows=least, ends=0.0) for least in (-2.0, 2.0))


def test_what_is_not_known_is_said_so_and_the_reply_ends(checkpoint, weights):
    engine = engine_of(model_with(checkpoint, always(weights), KNOWS_NOT), checkpoint)
    [(state, first)] = ended(engine, turn("t", State(), WORDS, most=60))
    assert first == CONFIG.unknown
    [(_, then)] = ended(engine, turn("t", state, WORDS, most=60, recalls=False))
    assert then != CONFIG.unknown


def test_what_is_known_is_said_after_the_opening(checkpoint, weights):
    engine = engine_of(model_with(checkpoint, always(weights), KNOWS), checkpoint)
    [(_, said)] = ended(engine, turn("t", State(), WORDS, most=20))
    assert said.startswith(CONFIG.opening)
    assert len(said) > len(CONFIG.opening)


def test_an_answer_ends_where_what_follows_is_like_no_value(checkpoint, weights):
    config = replace(KNOWS, ends=1e6)
    engine = engine_of(model_with(checkpoint, always(weights), config), checkpoint)
    [(state, said)] = ended(engine, turn("t", State(), WORDS, most=60))
    assert said.startswith(CONFIG.opening)
    assert said.endswith(".")
    assert not said.endswith("..")
    assert len(state.carry) == 1  # the reply was closed, and nothing of it is unread


def test_no_token_of_a_value_follows_itself(checkpoint, weights):
    """What was said last is read again where nothing comes next; only digits come twice."""
    loud = always(weights)._replace(strength=torch.tensor(1e4).log())
    config = replace(KNOWS, ends=-1e6, digits=-1e6)
    engine = engine_of(model_with(checkpoint, loud, config), checkpoint)
    [(_, said)] = ended(engine, turn("t", State(), WORDS, most=40))
    value = said.removeprefix(config.opening)
    assert len(value) > 10
    again = {a for a, b in pairwise(value) if a == b and not a.isdigit()}
    assert again <= {"\ufffd"}  # which stands for any byte that is no character


def test_an_empty_memory_leaves_the_answer_to_the_base(checkpoint, weights):
    engine = engine_of(model_with(checkpoint, always(weights), KNOWS_NOT), checkpoint)
    base = engine_of(Hope(checkpoint.config, checkpoint.weights), checkpoint)
    [(_, ours)] = ended(engine, turn("t", State(), WORDS, learn=False))
    [(_, theirs)] = ended(base, turn("t", State(), WORDS, learn=False))
    assert ours == theirs


def test_who_drafts_does_not_touch_who_does_not(checkpoint, weights):
    """One of a batch is answered from memory, the other as the base would."""
    model = model_with(checkpoint, always(weights), KNOWS)
    engine = engine_of(model, checkpoint)
    [(state, _)] = ended(engine, turn("t", State(), WORDS, most=0))
    [(_, plain)] = ended(engine, turn("t", state, "and? ", recalls=False, learn=False))
    both = ended(
        engine,
        turn("a", state, "and? ", learn=False),
        turn("b", state, "and? ", recalls=False, learn=False),
    )
    assert both[1][1] == plain
    assert both[0][1] != plain


# --- in a file --------------------------------------------------------------------------------


def test_a_layer_is_read_as_it_was_written(tmp_path, checkpoint, weights):
    write_layer(tmp_path / "layer.safetensors", "base@1", CONFIG, weights)
    layer = read_layer(tmp_path)
    assert layer.base == "base@1"
    assert replace(layer.config, digest="one") == CONFIG
    assert len(layer.config.digest) == 16
    for name, tensor in weights._asdict().items():
        assert torch.equal(layer.tensors[recall.NAME + name], tensor)
    require_fit(layer, checkpoint.config, "base@1", where=tmp_path)
    with pytest.raises(CheckpointError, match="trained for base@1, and the model is other@2"):
        require_fit(layer, checkpoint.config, "other@2", where=tmp_path)
    wider = replace(checkpoint.config, width=64)
    with pytest.raises(CheckpointError, match="and should be"):
        require_fit(layer, wider, "base@1", where=tmp_path)


@pytest.mark.parametrize(
    ("changed", "reads"),
    [({"knows": 0.5, "asks": 2.0, "formerly": ("zero",)}, True), ({"floor": 0.3}, False)],
)
def test_what_was_written_outlives_thresholds_set_anew(tmp_path, weights, changed, reads):
    digests = set()
    for name, config in (("a", CONFIG), ("b", replace(CONFIG, **changed))):
        (tmp_path / name).mkdir()
        write_layer(tmp_path / name / "layer.safetensors", "base@1", config, weights)
        read = read_layer(tmp_path / name).config
        assert replace(read, digest="one") == config
        digests.add(read.digest)
    assert (len(digests) == 1) is reads


def test_what_is_no_layer_is_refused(tmp_path):
    (tmp_path / "layer.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"not a memory layer.*hope train memory"):
        read_layer(tmp_path / "layer.safetensors")


def test_a_layer_cannot_see_what_learns(checkpoint):
    with pytest.raises(ConfigError, match="sees block 3, which learns"):
        replace(checkpoint.config, recall=replace(CONFIG, taps=(0, 3)))
