from __future__ import annotations

import json
from pathlib import Path

import pytest

from hope_runtime.tokenizer import Message, Role, Tokenizer
from hope_runtime.training.corpora import read_chats
from hope_runtime.training.facts import CITIES, NAMES, PETS
from hope_runtime.training.vocabulary import require_layout, save_vocabulary, train_vocabulary
from hope_runtime.weights.huggingface_tokenizer import directory_tokenizer
from hope_runtime.weights.json_file import Fields
from hope_runtime.weights.random import byte_tokenizer

TEXTS = [
    "My dog's name is Rex.",
    "the code is 4821, at 7:15",
    "a  b\nc ",
    "Größe 日本 🙂",
    "<|end|> is only text here",
    "x",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_whole_and_streamed(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()

    assert tokenizer.decode(ids) == text
    assert "".join(map(stream.push, ids)) + stream.flush() == text


def test_a_word_is_the_same_wherever_it_stands(tokenizer: Tokenizer):
    assert tokenizer.encode("It is Rex")[-len(tokenizer.encode("Rex")) :] == tokenizer.encode("Rex")
    assert tokenizer.encode(" Rex") == tokenizer.encode("Rex")


def test_digits_are_tokens_of_their_own(tokenizer: Tokenizer):
    assert [tokenizer.decode([id]) for id in tokenizer.encode("4821")] == ["4", "8", "2", "1"]


def test_a_message_is_a_role_its_text_and_an_end(tokenizer: Tokenizer):
    messages = [Message(Role.SYSTEM, "Be kind."), Message(Role.USER, "Hi.")]
    spans = tokenizer.opening(messages)

    assert [(span.role, span.ids) for span in spans] == [
        (Role.MARKUP, (3,)),
        (Role.SYSTEM, tuple(tokenizer.encode("Be kind."))),
        (Role.MARKUP, (0, 1)),
        (Role.USER, tuple(tokenizer.encode("Hi."))),
        (Role.MARKUP, (0, 2)),
    ]
    assert tokenizer.closing().ids == (0,)
    assert tokenizer.stop_ids == {0}


@pytest.mark.parametrize("role", [Role.TOOL, Role.DOCUMENT])
def test_what_no_one_says_is_read_as_the_users(tokenizer: Tokenizer, role: Role):
    spans = tokenizer.following([Message(role, "Rex")])

    assert [span.role for span in spans] == [Role.MARKUP, role, Role.MARKUP]
    assert spans[0].ids == (1,)


def test_values_are_short(tokenizer: Tokenizer):
    for values in (NAMES, PETS, CITIES):
        short = [value for value in values if len(tokenizer.encode(value)) <= 3]
        assert len(short) > 0.7 * len(values)


def test_a_trained_vocabulary_loads_again(tmp_path: Path):
    data, saved = tmp_path / "data", tmp_path / "model"
    data.mkdir()
    messages = [{"role": "user", "content": "Hi there."}, {"role": "assistant", "content": "Yes."}]
    (data / "chats.jsonl").write_text(json.dumps({"messages": messages}))

    chats = read_chats(data).train
    trained = train_vocabulary(chats, size=400, seed=0)
    save_vocabulary(trained, saved)
    loaded = directory_tokenizer(saved, Fields(saved / "config.json", {}), 400)

    assert loaded.vocabulary == 400
    assert loaded.encode("My dog is Rex.") == trained.encode("My dog is Rex.")
    assert loaded.to_json() == train_vocabulary(chats, size=400, seed=0).to_json()


def test_a_tokenizer_that_lays_chats_out_otherwise_is_refused(tokenizer: Tokenizer):
    require_layout(tokenizer)

    with pytest.raises(ValueError, match="lays chats out in another way"):
        require_layout(byte_tokenizer())
