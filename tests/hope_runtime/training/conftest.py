from __future__ import annotations

from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from numpy.random import Generator

import hope_runtime
from hope_runtime.tokenizer import Tokenizer
from hope_runtime.training.corpora import Chat
from hope_runtime.training.personas import Line, Part
from hope_runtime.weights.huggingface_tokenizer import directory_tokenizer
from hope_runtime.weights.json_file import Fields

DIRECTORY = Path(hope_runtime.__file__).parent / "models" / "hope-nano"
SAID = (
    "the film was long but good",
    "did you see the last one",
    "no, I missed it again",
    "the music was too loud for me",
    "they play it on the radio every day",
    "the second part is better than the first",
)


@pytest.fixture
def rng() -> Generator:
    return np.random.default_rng(7)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return directory_tokenizer(DIRECTORY, Fields(DIRECTORY / "config.json", {}), 3072)


@pytest.fixture(scope="session")
def chats() -> list[Chat]:
    """Return chats about nothing that a persona could have said."""
    roles = cycle(("user", "assistant"))
    return [
        [
            Line(next(roles), (Part(f"chat {chat}: {SAID[(chat + turn) % len(SAID)]}.", 1.0),))
            for turn in range(8)
        ]
        for chat in range(50)
    ]
