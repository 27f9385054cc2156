from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from hope_runtime.training.corpora import CorpusError, clean_chat, read_chats

SHARED = Path(__file__).parents[4] / "shared" / "data"
TURNS = [f"This is turn number {i}." for i in range(1, 21)]


def dialogue(i: int) -> list[str]:
    return [f"Dialogue {i}: {turn}" for turn in TURNS]


def write_self_dialogues(file: Path, n: int) -> None:
    columns = ",".join(f'"Answer.sentence{i}"' for i in range(1, 21))
    lines = [columns, *(",".join(f'"{turn}"' for turn in dialogue(i)) for i in range(n))]
    content = "\n".join(lines).encode()
    with tarfile.open(file, "w:xz") as archive:
        member = tarfile.TarInfo("corpus/movies/movies0.csv")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


def test_sentences_of_a_self_dialogue_alternate(tmp_path: Path):
    write_self_dialogues(tmp_path / "self_dialogue.tar.xz", 1)
    (tmp_path / "extra.txt").write_text("Hi.\nHello.\nAll well?\nYes, it is.\n")

    chat, extra = sorted((chat for side in read_chats(tmp_path) for chat in side), key=len)[::-1]

    assert [line.text for line in chat] == dialogue(0)
    assert [line.role for line in chat] == ["user", "assistant"] * 10
    assert [line.text for line in extra] == ["Hi.", "Hello.", "All well?", "Yes, it is."]


def test_the_split_is_the_same_every_time_and_disjoint(tmp_path: Path):
    write_self_dialogues(tmp_path / "self_dialogue.tar.xz", 500)

    train, valid = read_chats(tmp_path)

    assert read_chats(tmp_path) == (train, valid)
    assert len(train) + len(valid) == 500
    assert 2 <= len(valid) <= 25
    assert not {chat[0].text for chat in train} & {chat[0].text for chat in valid}


def test_the_split_of_a_chat_does_not_depend_on_its_neighbours(tmp_path: Path):
    few, many = tmp_path / "few", tmp_path / "many"
    few.mkdir()
    many.mkdir()
    write_self_dialogues(few / "self_dialogue.tar.xz", 100)
    write_self_dialogues(many / "self_dialogue.tar.xz", 300)

    assert all(chat in read_chats(many).valid for chat in read_chats(few).valid)


def test_jsonl_chats_keep_their_roles(tmp_path: Path):
    said = [("system", "Be kind."), ("user", "Hi"), ("user", "there"), ("assistant", "Hello!")]
    messages = [{"role": role, "content": content} for role, content in said]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")

    [chat] = read_chats(tmp_path).train

    assert [(line.role, line.text) for line in chat] == [
        ("user", "Hi there"),
        ("assistant", "Hello!"),
    ]


def test_chitchat_turns_join_their_messages(tmp_path: Path):
    turns = [[{"text": "Hello"}, {"text": f"I am number {i}."}] for i in range(4)]
    (tmp_path / "dataset.json").write_text(json.dumps({"id": {"messages": turns}}))

    [chat] = read_chats(tmp_path).train

    assert chat[3].text == "Hello I am number 3."


def test_the_same_chat_is_read_once(tmp_path: Path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("One thing.\nTwo things.\nThree things.\nFour things.")

    train, valid = read_chats(tmp_path)

    assert len(train) + len(valid) == 1


def test_a_long_turn_ends_with_a_sentence_or_a_word():
    sentences = "This is a sentence of some length. " * 10
    words = "word " * 100
    chat = clean_chat([sentences, words, "Yes.", "No."])

    assert chat[0].text.endswith("length.")
    assert chat[1].text.endswith("word")
    assert all(len(line.text) <= 200 for line in chat)


@pytest.mark.parametrize(
    "turns",
    [
        ["Hi.", "Hello.", "Bye."],
        ["Hi.", "", "", "", "Bye.", "Go."],
        ["Same.", "Same.", "Same.", "Same.", "Same."],
        ["Привет.", "Как дела?", "Хорошо.", "Пока."],
    ],
)
def test_a_broken_chat_is_dropped(turns: list[str]):
    assert clean_chat(turns) == []


def test_an_empty_folder_is_told_where_chats_are(tmp_path: Path):
    with pytest.raises(CorpusError, match="no chats found") as caught:
        read_chats(tmp_path)

    assert str(tmp_path) in str(caught.value)
    assert "jfainberg/self_dialogue_corpus" in str(caught.value)


def test_a_broken_file_is_named(tmp_path: Path):
    (tmp_path / "self_dialogue.tar.xz").write_bytes(b"nothing")

    with pytest.raises(CorpusError, match=r"self_dialogue\.tar\.xz"):
        read_chats(tmp_path)


@pytest.mark.skipif(not (SHARED / "self_dialogue.tar.xz").is_file(), reason="no shared data")
def test_the_self_dialogue_corpus_is_read(tmp_path: Path):
    (tmp_path / "self_dialogue.tar.xz").symlink_to(SHARED / "self_dialogue.tar.xz")

    train, valid = read_chats(tmp_path)

    assert len(train) > 5000
    assert 0.01 < len(valid) / len(train) < 0.03
