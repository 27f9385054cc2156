"""A small byte-level vocabulary for short English chats, trained on what the model will read.

Every text starts with a space inside, so "Rex" is the same token wherever it stands; digits are
tokens of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import tokenizers
from numpy.random import default_rng
from tokenizers import Regex, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from hope_runtime.tokenizer import Message, Role, Tokenizer
from hope_runtime.training import personas
from hope_runtime.training.corpora import Chat

END = "<|end|>"
ROLES = ("user", "assistant", "system")
SPECIAL = (END, *(f"<|{role}|>" for role in ROLES))
END_ID = 0
ROLE_IDS = {role: id for id, role in enumerate(ROLES, start=1)}
TEMPLATE = (
    "{% for message in messages %}"
    "{% set role = message['role'] %}"
    "{{ '<|' + (role if role in ['system', 'assistant'] else 'user') + '|>' }}"
    "{{ message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_DIALOGUES = 4000
_VALUE_COUNT = 500  # times that each value is counted besides where it is said
_WORDS = Regex(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def train_vocabulary(
    chats: Sequence[Chat], texts: Sequence[str] = (), size: int = 3072, seed: int = 0
) -> Tokenizer:
    """Train on chats, made-up dialogues and texts; equal seeds give equal tokens."""
    backend = _backend(chain(texts, _texts(chats, seed)), size)
    return Tokenizer(backend, template=TEMPLATE, eos=END)


def require_layout(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that lays chats out in another way: rows are put together from ids.

    Raises:
        ValueError: it was not made by `train_vocabulary`.
    """
    text = tuple(tokenizer.encode("Hi"))
    expected = (ROLE_IDS["user"], *text, END_ID, ROLE_IDS["assistant"])
    spans = tokenizer.opening([Message(Role.USER, "Hi")])
    if tuple(id for span in spans for id in span.ids) != expected:
        raise ValueError(
            "the tokenizer lays chats out in another way than those of hope train; take one that "
            "hope train made"
        )


def save_vocabulary(tokenizer: Tokenizer, directory: Path) -> None:
    """Write what `directory_tokenizer` reads: tokenizer.json and tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    state = json.loads(tokenizer.to_json())
    settings = {"chat_template": TEMPLATE, "eos_token": END}
    for name, content in (("tokenizer.json", state), ("tokenizer_config.json", settings)):
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (directory / name).write_text(text + "\n", encoding="utf-8")


def _backend(texts: Iterator[str], size: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(BPE())
    backend.normalizer = normalizers.Sequence(
        [normalizers.Strip(left=True, right=False), normalizers.Prepend(" ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _texts(chats: Sequence[Chat], seed: int) -> Iterator[str]:
    yield from (line.text for chat in chats for line in chat)
    rng = default_rng(seed)
    for _ in range(_DIALOGUES):
        [fact] = personas.draw_facts(rng, 1)
        lines = chain(
            personas.tell(rng, fact),
            personas.ask(rng, fact),
            personas.update(rng, fact),
            personas.ask_unknown(rng, fact.kind),
            personas.small_talk(rng),
        )
        yield from (line.text for line in lines)
    values = {value for kind in personas.KINDS.values() for value in kind.values}
    for value in sorted(values):
        if not value.isdigit():
            yield " ".join([value] * _VALUE_COUNT)
