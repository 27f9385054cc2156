"""Facts that people tell: their words, the turns made of them, and the training of a layer."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from hope_runtime import weights
from hope_runtime.layers import recall
from hope_runtime.layers.recall import NOTHING
from hope_runtime.model import Hope
from hope_runtime.training.told import (
    Kind,
    held_out_kind,
    held_out_phrase,
    held_out_value,
    kinds,
    learn,
    prepare,
    read,
)
from hope_runtime.training.told.drawing import NONE, VALUE, Pairs, Pool, Stage
from hope_runtime.training.told.features import Features
from hope_runtime.training.told.turns import What, conversations, plan
from hope_runtime.weights.random import random_checkpoint, tiny_config

KINDS = tuple(
    Kind(
        name,
        ("Rex", "Max", "Bella", "Luna", "Oscar", "Zorro", "Ada", "Bob", "Fay", "Gus"),
        (f"My {name} is {{}}.", f"{{}} is my {name}.", f"I call my {name} {{}}.",
         f"{{}}, my {name}"),
        (f"My {name} is now {{}}.",),
        (f"Who is my {name}?", f"My {name}?", f"Tell me my {name}."),
        (f"Your {name} is {{}}.",),
    )
    for name in ("dog", "cat", "boss", "boat", "town", "aunt")
)  # fmt: skip


# --- the words --------------------------------------------------------------------------------


def test_there_are_hundreds_of_kinds_each_in_the_words_of_many():
    every = kinds()
    assert len(every) > 1500
    assert sum(len(kind.tells) for kind in every) > 23000
    for kind in every:
        assert len(kind.tells) >= 7
        assert len(kind.asks) >= 6
        assert len({*kind.tells, *kind.asks}) == len(kind.tells) + len(kind.asks)
        for template in (*kind.tells, *kind.updates, *kind.answers):
            assert template.count("{}") == 1, (kind.name, template)
        assert not any("{" in template for template in kind.asks)


def test_some_kinds_some_phrasings_and_some_values_are_kept_from_training():
    every = kinds()
    new = [held_out_kind(kind.name) for kind in every]
    phrases = [held_out_phrase(text) for kind in every for text in (*kind.tells, *kind.asks)]
    values = [held_out_value(value) for kind in every for value in kind.values]
    for shares in (new, phrases, values):
        assert 0.08 < np.mean(shares) < 0.2


def test_what_two_files_say_of_a_kind_is_put_together(tmp_path):
    text = '[[kind]]\nname = "dog"\nvalues = ["Rex"]\ntells = ["{t} {{}}"]\n'
    text += "updates = []\nasks = []\nanswers = []\n"
    for name in ("one", "two"):
        (tmp_path / f"{name}.toml").write_text(text.replace("{t}", name).replace("{{}}", "{}"))
    [kind] = read(sorted(tmp_path.glob("*.toml")))
    assert kind.tells == ("one {}", "two {}")
    (tmp_path / "bad.toml").write_text("[[kind]]\nname = 3")
    with pytest.raises(ValueError, match=r"bad\.toml: not a file of kinds"):
        read([tmp_path / "bad.toml"])


# --- turns ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint():
    return random_checkpoint(tiny_config(window=1024))


@pytest.fixture(scope="module")
def said(checkpoint):
    rng = np.random.default_rng(0)
    plans = plan(rng, KINDS, 4)
    idle = [replace(plans[0], what=What.TALK, text=f"How are you, {i}?", kind="") for i in range(9)]
    return list(conversations(rng, [*plans, *idle], checkpoint.tokenizer, 300))


def test_the_tokens_of_a_value_are_marked_where_it_is_told_and_answered(said, checkpoint):
    found = Counter()
    for one in said:
        for turn in one.turns:
            if turn.plan.what is What.TALK:
                continue
            text = checkpoint.tokenizer.decode(one.tokens[turn.first : turn.last].tolist())
            assert text == turn.plan.value
            asks = turn.plan.what is What.ASK
            assert (turn.first > turn.asked) is asks
            assert bool(one.stated[turn.first]) is not asks
            found[turn.plan.what] += 1
    assert len(found) == 3


def test_an_article_before_a_value_is_part_of_it_told_and_asked_for():
    broken = Kind(
        "broken",
        ("mug", "lamp", "vase", "plate", "cup", "kettle", "jar"),
        ("I broke a {} today.", "a {}, that is what I broke", "My {} is broken."),
        ("No, I broke the {}.",),
        ("What did I break?", "Which thing is broken?", "What fell down?"),
        ("You broke a {}.",),
    )
    plans = plan(np.random.default_rng(0), [broken] * 30, 1)
    for one in plans:
        article = one.value.rpartition(" ")[0]
        if "My" in one.text or "my" in one.text:
            assert not article
        elif one.what is not What.ASK:
            assert article == ("the" if "broke the " in one.text else "a")
            assert one.value in one.text
        assert "a a " not in one.reply
    asked = Counter(one.value[:2] == "a " for one in plans if one.what is What.ASK)
    assert asked[True] > asked[False] > 0  # as often as it is told so


def test_one_number_of_three_has_a_digit_twice_in_a_row():
    safe = replace(KINDS[0], values=tuple(str(n) for n in range(100, 2000)))
    plans = plan(np.random.default_rng(0), [safe] * 40, 1)
    drawn = [one.value for one in plans if not one.held_out]
    twice = sum(any(a == b for a, b in pairwise(value)) for value in drawn) / len(drawn)
    assert 0.3 < twice < 0.7  # a fifth have it, drawn at random


def test_nothing_but_what_the_user_says_is_stated(said, checkpoint):
    one = said[0]
    text = checkpoint.tokenizer.decode(one.tokens[one.stated].tolist())
    assert text == "".join(turn.plan.text for turn in one.turns)


# --- training ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config():
    return replace(
        prepare.config_for(tiny_config()), attention=32, heads=4, gate=8, hidden=16, ahead=4
    )


@pytest.fixture(scope="module")
def model(checkpoint, config):
    return prepare.seen_by(Hope(checkpoint.config, checkpoint.weights), config)


@pytest.fixture(scope="module")
def layer(model, config, said, checkpoint):
    return prepare.first_layer(model, config, said, checkpoint.tokenizer, 0)


@pytest.fixture(scope="module")
def features(model, layer, said, tmp_path_factory):
    file = tmp_path_factory.mktemp("features") / "features-0.safetensors"
    heard = []
    made = prepare.gathered(model, layer, said, file, heard.append)
    assert sum(heard) == sum(len(one.tokens) for one in said)
    again = prepare.gathered(model, layer, said, file, heard.append)
    assert torch.equal(made.seen, again.seen)
    assert made.turns == again.turns
    return again


@pytest.fixture(scope="module")
def pool(features, layer, config, model):
    rivals = learn.rivals(features.hidden, model.embedding.float())
    written = learn.written_ids(layer, features.tokens)
    return Pool(features, KINDS, written, config, rivals, held_out=False)


def test_features_are_those_of_each_conversation_alone(model, layer, said, features):
    alone = Features.join([prepare.gather(model, layer, [one]) for one in said[:2]])
    starts = {turn.plan: turn for turn in features.turns}
    for turn in alone.turns:
        other = starts[turn.plan]
        ours, theirs = alone.seen[turn.start : turn.end], features.seen[other.start : other.end]
        torch.testing.assert_close(ours.float(), theirs.float(), atol=0.02, rtol=0.02)


def test_a_session_asks_for_the_newest_value_and_for_what_was_never_told(pool):
    batch = pool.draw(np.random.default_rng(1), 6, Stage(facts=(3, 3), filler=(1, 1), changes=0.6))
    told = {b: set() for b in range(6)}
    for b in range(6):
        told[b] = set(batch.tokens[b][batch.told[b]].tolist())
    for q, session in enumerate(batch.session.tolist()):
        if batch.known[q]:
            target = batch.target[q][batch.look[q] == VALUE].tolist()
            assert target
            assert set(target) <= told[session]
            assert batch.look[q, 0] == VALUE
        else:
            assert not (batch.look[q] == VALUE).any()
            assert batch.look[q, 0] == NONE
    assert batch.known.any()
    assert not batch.known.all()
    assert ((batch.target != NOTHING) == (batch.look == VALUE)).all()


def test_a_question_that_was_put_for_another_value_teaches_where_the_answer_begins(pool):
    """Its own words after that are not the answer's."""
    stage = Stage(facts=(3, 3), filler=(0, 0), changes=0.0, borrowed=1.0, renamed=0.0)
    batch = pool.draw(np.random.default_rng(2), 6, stage)
    longer = 0
    for q in batch.known.nonzero()[:, 0].tolist():
        wanted = batch.target[q][batch.look[q] == VALUE]
        assert wanted[0] in batch.tokens[batch.session[q]][batch.told[batch.session[q]]]
        longer += len(set(wanted.tolist())) > 1
    assert longer < int(batch.known.sum()) / 2


def test_pairs_are_of_one_fact_and_what_is_beside_them_is_of_none(pool, features, config):
    rng = np.random.default_rng(3)
    pairs = Pairs(
        *(torch.cat(parts) for parts in zip(*(pool.pairs(rng, 9) for _ in range(4)), strict=True))
    )

    def places(windows, at):
        """Return where the tokens lie at a place of windows, by theirs and earlier features."""
        same = torch.ones(len(windows), len(features.seen), dtype=torch.bool)
        for back in range(12):
            same &= (windows[:, at - back, None] == features.seen.roll(back, 0)).all(-1)
        assert same.any(1).all()
        return same.int().argmax(1).tolist()

    def turn_of(place):
        [turn] = [turn for turn in features.turns if turn.start <= place < turn.end]
        return turn

    told, asked = places(pairs.told, config.behind), places(pairs.asked, -1)
    later = 0
    for teller, asker, begins in zip(told, asked, pairs.begins.tolist(), strict=True):
        tell, ask = turn_of(teller), turn_of(asker)
        assert tell.plan.what in {What.TELL, What.CHANGE}
        assert (ask.plan.what, ask.plan.kind) == (What.ASK, tell.plan.kind)
        assert begins == (asker == ask.asked)
        if teller > tell.first:
            assert features.tokens[teller] == features.tokens[asker + 1]
            later += 1
        else:
            assert teller == tell.first
            assert asker < ask.first
    assert later
    assert pairs.begins.any()
    for place, starts in zip(places(pairs.silent, -1), pairs.starts.tolist(), strict=True):
        turn = turn_of(place)
        assert (turn.plan.what is not What.ASK) is starts
        assert place == (turn.asked if starts else turn.last - 1)
    for place in places(pairs.other, config.behind):
        turn = turn_of(place)
        assert features.stated[place]
        assert not turn.first <= place < turn.last


def test_a_run_begins_with_pairs_and_goes_on_with_sessions(pool, layer, config, model):
    recipe = learn.Recipe(steps=5, sessions=2, warmup=1)
    assert recipe.meeting == 3
    embedding = model.embedding.float()
    progress = learn.begin(layer, recipe)
    seen = []
    for _ in range(recipe.steps):
        progress, step = learn.advance(
            config, recipe, layer, progress, pool, embedding, learn.twins(embedding)
        )
        seen.append(step)
    assert [np.isnan(step.copied) for step in seen] == [True, True, True, False, False]
    assert all(0 <= step.met <= 1 for step in seen)


def test_keys_of_different_facts_are_spread_apart(pool, layer, config, model):
    """Every token that is written takes its squared likeness from every other."""
    recipe = learn.Recipe(steps=100, sessions=2, warmup=1)
    embedding = model.embedding.float()
    progress = learn.begin(layer, recipe)

    def crowded(progress):
        pairs = pool.pairs(np.random.default_rng(4), 9)
        chance = torch.Generator().manual_seed(0)
        return float(learn.meet(config, learn.trained(layer, progress), pairs, chance).crowd)

    before = crowded(progress)
    for _ in range(25):
        progress, _ = learn.advance(
            config, recipe, layer, progress, pool, embedding, learn.twins(embedding)
        )
    assert crowded(progress) < 0.7 * before


def test_training_goes_on_after_a_stop_as_if_it_had_not_stopped(
    pool, layer, config, model, tmp_path
):
    recipe = learn.Recipe(steps=4, sessions=3, warmup=1)
    embedding = model.embedding.float()
    near = learn.twins(embedding)

    def steps(progress, count):
        for _ in range(count):
            progress, found = learn.advance(config, recipe, layer, progress, pool, embedding, near)
        return progress, found

    whole, _ = steps(learn.begin(layer, recipe), 4)
    half, _ = steps(learn.begin(layer, recipe), 2)
    learn.save(tmp_path / "run.safetensors", config, recipe, layer, half)
    was, recipe_was, layer_was, half = learn.load(tmp_path / "run.safetensors")
    assert (was, recipe_was) == (config, recipe)
    assert torch.equal(layer_was.mean, layer.mean)
    rest, _ = steps(half, 2)
    for name, tensor in whole.params.items():
        assert torch.equal(tensor, rest.params[name]), name
    (tmp_path / "bad").write_bytes(b"x")
    with pytest.raises(ValueError, match="not a run of hope train memory"):
        learn.load(tmp_path / "bad")


def test_a_layer_learns_to_copy_what_it_was_told(pool, layer, config, model):
    """Only the fast memory can know the answer: values are drawn anew for every session."""
    recipe = learn.Recipe(steps=200, sessions=8, rate=3e-3, warmup=5, noise=0.0, dropout=0.0)
    embedding = model.embedding.float()
    near = learn.twins(embedding)
    stage = Stage(facts=(2, 2), filler=(0, 0), changes=0.0, renamed=0.0, borrowed=0.0)

    def judged(weights, *, told=True):
        batch = pool.draw(np.random.default_rng(5), 12, stage)
        batch = batch._replace(stated=batch.stated & told)
        found = learn.losses(
            config, weights, batch, embedding, near, torch.Generator().manual_seed(0)
        )
        return float(found.answers.detach())

    progress = learn.begin(layer, recipe)
    before = judged(learn.trained(layer, progress))
    for _ in range(recipe.steps):
        progress, _ = learn.advance(config, recipe, layer, progress, pool, embedding, near)
    after = judged(learn.trained(layer, progress))
    blind = judged(learn.trained(layer, progress), told=False)
    assert after < 0.6 * before
    assert after < 0.8 * blind


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_a_base_of_another_family_can_have_a_layer(family, hf_directory, said):
    checkpoint = weights.read(hf_directory(family, num_hidden_layers=4))
    bare = Hope(checkpoint.config.stacked(), checkpoint.weights)
    config = prepare.config_for(bare.config)
    base = prepare.seen_by(bare, config)
    first = prepare.first_layer(base, config, said[:2], checkpoint.tokenizer, 0)
    features = prepare.gather(base, first, said)
    written = learn.written_ids(first, features.tokens)
    embedding = base.embedding.float()
    rivals = learn.rivals(features.hidden, embedding)
    pool = Pool(features, KINDS, written, config, rivals, held_out=False)
    recipe = learn.Recipe(steps=2, sessions=2)
    progress = learn.begin(first, recipe)
    progress, _ = learn.advance(
        config, recipe, first, progress, pool, embedding, learn.twins(embedding)
    )
    layer = learn.trained(first, progress)
    tensors = {recall.NAME + name: tensor for name, tensor in layer._asdict().items()}
    model = Hope(replace(bare.config, recall=config), {**checkpoint.weights, **tensors})
    held = model.no_facts(1)
    ids = torch.from_numpy(said[0].tokens[None, :100])
    start = torch.zeros(1, dtype=torch.int64)
    read = model.run(model.embed(ids), start, model.nothing(1), [{}])
    after = model.state_facts(held, read, ids, torch.ones_like(ids, dtype=torch.bool), None)
    assert after.matrix.any()
