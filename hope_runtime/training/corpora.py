"""Chats that people had, read from a folder; a chat is a list of lines, user and assistant in turn.

Understood are the Self-dialogue Corpus (`self_dialogue.tar.xz` or its unpacked CSV files), the
Chit-Chat Challenge (`dataset.json` or the `chitchat_dataset` wheel that holds it, MIT licence),
chats as JSONL (`{"messages": [{"role": ..., "content": ...}]}`), and texts whose lines alternate,
with an empty line between two chats.
"""

from __future__ import annotations

import csv
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import TextIOWrapper
from itertools import cycle, groupby
from pathlib import Path
from typing import IO, NamedTuple
from zlib import crc32

from hope_runtime.training.personas import Line, Part

__all__ = ["Chat", "Chats", "CorpusError", "read_chats"]

LONGEST_TURN = 200  # characters
SHORTEST_CHAT = 4  # lines
FILLER_WEIGHT = 1.0

_FILES = "self_dialogue.tar.xz, dataset.json, *.whl, *.jsonl or *.txt"

Chat = list[Line]


class CorpusError(ValueError):
    """A folder without any chat in it, or a file that cannot be read."""


class Chats(NamedTuple):
    """All chats, apart into those to train on and those to judge by."""

    train: list[Chat]
    valid: list[Chat]


def read_chats(path: Path) -> Chats:
    """Read a file's chats or all below a folder; on which side one falls depends on its text."""
    chats = Chats([], [])
    for chat in _clean_chats(path):
        chats[_is_valid(chat)].append(chat)
    if not any(chats):
        raise CorpusError(
            f"{path}: no chats found; put {_FILES} there. The Self-dialogue Corpus is public: "
            "github.com/jfainberg/self_dialogue_corpus, packed as self_dialogue.tar.xz"
        )
    return chats


def clean_chat(turns: Iterable[str]) -> Chat:
    """Return the lines of a chat, or none if it is broken.

    >>> [line.text for line in clean_chat([" Hi  there ", "Hello!", "All well?", "Yes."])]
    ['Hi there', 'Hello!', 'All well?', 'Yes.']
    >>> clean_chat(["Hi", "Hi", "Hi", "Hi"])
    []
    """
    texts = [_clean(turn) for turn in turns]
    good = [text for text in texts if text]
    if any(_RUDE.search(text) for text in good):
        return []
    if len(good) < max(SHORTEST_CHAT, 0.8 * len(texts)) or len(set(good)) < 0.8 * len(good):
        return []
    return [
        _line(role, text) for role, text in zip(cycle(("user", "assistant")), good, strict=False)
    ]


def _line(role: str, text: str) -> Line:
    return Line(role, (Part(text, FILLER_WEIGHT),))


_RUDE = re.compile(
    r"\b(?:\w*fuck\w*|\w*shit\w*|bitch\w*|cunt\w*|nigg\w*|fag\w*|retard\w*|whore\w*|slut\w*|porn\w*"
    r"|dick|cock|pussy|rape[ds]?|rapist\w*|nazi\w*|asshole\w*|tits|penis|vagina)\b",
    re.IGNORECASE,
)
_SPACES = re.compile(r"\s+")
_PLAIN = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u00a0", "''\"\"-- ")


def _clean(turn: str) -> str:
    """Return one turn on one line, cut at the end of a sentence or word, or nothing."""
    text = _SPACES.sub(" ", turn.translate(_PLAIN).replace("\u2026", "...")).strip()
    if sum(not character.isascii() for character in text) > 0.05 * len(text):
        return ""
    if not any(character.isalpha() for character in text) or "http" in text:
        return ""
    if len(text) <= LONGEST_TURN:
        return text
    head = text[:LONGEST_TURN]
    end = max(head.rfind(mark) for mark in (". ", "! ", "? ")) + 1
    return head[:end] if end > LONGEST_TURN // 2 else head[: head.rfind(" ")].rstrip(",;:")


def _is_valid(chat: Chat) -> bool:
    """Choose two chats of a hundred."""
    return crc32("\n".join(line.text for line in chat).encode()) % 100 < 2


def _clean_chats(path: Path) -> Iterator[Chat]:
    """Read files by name; the same chat is not given twice."""
    seen: set[int] = set()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        packed = file.suffixes[-2:-1] == [".tar"]
        reader = _READERS.get(".tar" if packed else file.suffix)
        if reader is None or not file.is_file():
            continue
        try:
            for turns in reader(file):
                chat = turns if isinstance(turns, list) else clean_chat(turns)
                key = hash(tuple(line.text for line in chat))
                if chat and key not in seen:
                    seen.add(key)
                    yield chat
        except (OSError, ValueError, LookupError, tarfile.TarError, zipfile.BadZipFile) as error:
            raise CorpusError(
                f"{file}: not a corpus of chats: {error}; repair or remove it"
            ) from error


_Turns = tuple[str, ...] | Chat


def _archive(file: Path) -> Iterator[_Turns]:
    with tarfile.open(file) as archive:
        for member in archive:
            if member.name.endswith(".csv") and (stream := archive.extractfile(member)):
                yield from _rows(stream)


def _csv(file: Path) -> Iterator[_Turns]:
    with file.open("rb") as stream:
        yield from _rows(stream)


def _rows(stream: IO[bytes]) -> Iterator[_Turns]:
    columns = [f"Answer.sentence{i}" for i in range(1, 21)]
    for row in csv.DictReader(TextIOWrapper(stream, "utf-8", errors="replace", newline="")):
        if row.get(columns[0]):
            yield tuple(row.get(column) or "" for column in columns)


def _wheel(file: Path) -> Iterator[_Turns]:
    with zipfile.ZipFile(file) as archive:
        if "chitchat_dataset/dataset.json" in archive.namelist():
            yield from _chitchat(archive.read("chitchat_dataset/dataset.json"))


def _json(file: Path) -> Iterator[_Turns]:
    if file.name == "dataset.json":
        yield from _chitchat(file.read_bytes())


def _chitchat(data: bytes) -> Iterator[_Turns]:
    for chat in json.loads(data).values():
        turns = [" ".join(message["text"] for message in turn) for turn in chat["messages"]]
        for start in range(0, len(turns), 20):
            yield tuple(turns[start : start + 20])


def _jsonl(file: Path) -> Iterator[_Turns]:
    """Read chats whose roles are written down; neighbours of one role become one turn."""
    for row in file.read_text(encoding="utf-8").splitlines():
        if not row.strip():
            continue
        messages: list[Mapping[str, str]] = json.loads(row)["messages"]
        said = [(m["role"], _clean(m["content"])) for m in messages if m["role"] != "system"]
        turns = [
            _line(
                "assistant" if role == "assistant" else "user", " ".join(text for _, text in same)
            )
            for role, same in groupby(said, key=lambda turn: turn[0])
        ]
        if turns and turns[0].role == "assistant":
            del turns[0]
        if len(turns) > 1 and all(line.text.strip() for line in turns):
            yield turns


def _text(file: Path) -> Iterator[_Turns]:
    if file.name.lower().startswith(("readme", "license", "licence")):
        return
    for chat in file.read_text(encoding="utf-8", errors="replace").split("\n\n"):
        yield tuple(chat.splitlines())


_READERS: dict[str, Callable[[Path], Iterator[_Turns]]] = {
    ".tar": _archive,  # packed as .tar.xz or .tar.gz
    ".csv": _csv,
    ".whl": _wheel,
    ".json": _json,
    ".jsonl": _jsonl,
    ".txt": _text,
}
