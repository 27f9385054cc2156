"""From files to batches: texts and chats, what is kept to judge by, and the vocabulary of both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hope_runtime.tokenizer import Tokenizer
from hope_runtime.training import sources
from hope_runtime.training.corpora import Chat, Chats, read_chats
from hope_runtime.training.loop import Batch, Source, TrainingError
from hope_runtime.training.sessions import Material
from hope_runtime.training.vocabulary import END_ID

_KEPT = 50  # one part in so many of a text is kept to judge by


class Corpus(NamedTuple):
    """What was read: whole texts, and chats apart into train and valid."""

    texts: list[str]
    chats: Chats


class Data(NamedTuple):
    """Batches to train on, and one that is never trained on."""

    source: Source
    kept: Batch


def read(paths: Sequence[Path]) -> Corpus:
    """Read `.txt` files as texts, and all else (folders, JSONL, archives) as chats.

    Raises:
        TrainingError: a path does not exist, or nothing was given.
        CorpusError: a folder or file without chats, or one that cannot be read.
    """
    if not paths:
        raise TrainingError("nothing to train on; name .txt files, .jsonl chats or a folder")
    texts: list[str] = []
    train: list[Chat] = []
    valid: list[Chat] = []
    for path in paths:
        if not path.exists():
            raise TrainingError(f"{path}: does not exist; name a text, chats or a folder of chats")
        if path.suffix == ".txt":
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
        else:
            found = read_chats(path)
            train += found.train
            valid += found.valid
    return Corpus(texts, Chats(train, valid))


def prepare(
    corpus: Corpus, tokenizer: Tokenizer, *, tokens: int, length: int, personas: bool
) -> Data:
    """Return batches of about `tokens` tokens, in rows of `length` (`personas`: a curriculum).

    With `personas`, chats are mixed with generated dialogues in which a user tells facts and
    asks for them later; texts are mixed in by their share of all tokens.
    """
    train, kept = _stream(corpus, tokenizer, chats=not personas)
    batch = max(1, tokens // length)
    if not (personas and corpus.chats.train):
        return Data(sources.text(train, length, batch), _judged(kept, length))
    material = Material(tokenizer, corpus.chats.train)
    told = sources.curriculum(material, tokens)
    judge = sources.curriculum(Material(tokenizer, corpus.chats.valid or corpus.chats.train), 4096)
    last = judge(np.random.default_rng(0), 0.75)
    if not len(train):
        return Data(told, last)
    plain = sources.text(train, length, batch)
    chat_tokens = sum(len(tokenizer.encode(line.text)) for c in corpus.chats.train for line in c)
    share = len(train) / (len(train) + chat_tokens)

    def mixed(chance: np.random.Generator, done: float) -> Batch:
        return (plain if chance.random() < share else told)(chance, done)

    return Data(mixed, last)


def _stream(corpus: Corpus, tokenizer: Tokenizer, *, chats: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return all texts, and the chats if they are wanted, as one row of tokens, and the kept."""
    train: list[int] = []
    kept: list[int] = []
    for text in corpus.texts:
        ids = tokenizer.encode(text)
        cut = len(ids) - len(ids) // _KEPT
        train += [END_ID, *ids[:cut]]
        kept += [END_ID, *ids[cut:]]
    if chats and corpus.chats.train:
        for into, some in ((train, corpus.chats.train), (kept, corpus.chats.valid)):
            material = Material(tokenizer, some or corpus.chats.train)
            for chat in some:
                into += material.row(chat).tokens
    return np.array(train, np.int64), np.array(kept, np.int64)


def _judged(kept: np.ndarray, length: int) -> Batch:
    """Return up to eight rows of what was kept."""
    if len(kept) <= length:
        raise TrainingError(
            f"{len(kept)} tokens are left to judge by, a row takes {length + 1}; give more text "
            "or a shorter --length"
        )
    return sources.text(kept, length, 8)(np.random.default_rng(0), 0.0)
