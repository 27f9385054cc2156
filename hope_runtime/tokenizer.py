"""Text to token ids and back, and messages to spans of ids that know who said them.

What a person wrote is never parsed for special tokens: whoever types "<|im_end|>" gets its
letters. Only the template's own markup becomes special tokens.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from operator import itemgetter

import tokenizers

from hope_runtime.chat import ChatError, ChatTemplate, Message, Piece, Role

__all__ = ["ChatError", "Message", "Role", "Span", "TextStream", "Tokenizer"]

ENDS = frozenset(
    {
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "</s>",
    }
)


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring tokens of one role."""

    role: Role
    ids: tuple[int, ...]


class Tokenizer:
    """A vocabulary and a chat format.

    Takes `backend` over. `bos` and `eos` are what the template may write; `starts` says that
    every session begins with `bos`; `stops` are ids that end a reply, besides the usual ones.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        template: str | None = None,
        bos: str | None = None,
        eos: str | None = None,
        starts: bool = False,
        stops: Iterable[int] = (),
    ) -> None:
        self._backend = _literal(backend)
        self.vocabulary: int = max(backend.get_vocab().values()) + 1
        self.stop_ids: frozenset[int] = self._stops(eos, stops)
        self.bos_id: int | None = backend.token_to_id(bos) if starts and bos else None
        added = backend.get_added_tokens_decoder()
        special = {id: token for id, token in added.items() if token.special}
        self._special = {token.content: id for id, token in special.items()}
        self._markup = _alternatives(special.values())
        self._inner = _without_prefix(self._backend)
        self._chat = ChatTemplate(template, bos=bos or "", eos=eos or "")

    def encode(self, text: str) -> list[int]:
        """Encode a text as it stands, without any special token."""
        return self._backend.encode(_valid(text), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> TextStream:
        return TextStream(self._backend, frozenset(self._special.values()))

    def opening(self, messages: Sequence[Message]) -> list[Span]:
        """Render the first messages of a session, up to where the reply starts."""
        spans = self._spans(self._chat.opening(messages), first=True)
        if self.bos_id is None or (spans and spans[0].ids[0] == self.bos_id):
            return spans
        return [Span(Role.MARKUP, (self.bos_id,)), *spans]

    def following(self, messages: Sequence[Message]) -> list[Span]:
        """Render later messages: all that comes after `closing()`, up to the next reply."""
        return self._spans(self._chat.following(messages), first=False)

    def closing(self) -> Span:
        """Return the markup that ends a reply after its last token of content."""
        spans = self._spans([Piece(Role.MARKUP, self._chat.closing)], first=False)
        return spans[0] if spans else Span(Role.MARKUP, ())

    def plain(self, text: str, role: Role = Role.DOCUMENT) -> Span:
        """Encode a text that nobody says to anybody: something to read."""
        return Span(role, tuple(self.encode(text)))

    def to_json(self) -> str:
        """Return all that tells this tokenizer from another, for fingerprints."""
        return self._backend.to_str()

    def _stops(self, eos: str | None, stops: Iterable[int]) -> frozenset[int]:
        """Collect the ids that end a reply, and make each of them a special token."""
        names = {name for name in (*ENDS, eos) if name}
        named = (self._backend.id_to_token(id) for id in stops if 0 <= id < self.vocabulary)
        names |= {name for name in named if name}
        found = {name: self._backend.token_to_id(name) for name in names}
        ids = {name: id for name, id in found.items() if id is not None}
        self._backend.add_special_tokens(
            [tokenizers.AddedToken(name, normalized=False, special=True) for name in sorted(ids)]
        )
        return frozenset(ids.values())

    def _spans(self, pieces: Sequence[Piece], *, first: bool) -> list[Span]:
        tokens = self._tokens(pieces, first)
        return [
            Span(role, tuple(id for _, id in same)) for role, same in groupby(tokens, itemgetter(0))
        ]

    def _tokens(self, pieces: Sequence[Piece], first: bool) -> Iterator[tuple[Role, int]]:
        """Cut at the markup's special tokens, and encode all between two of them as one text.

        That is how the model met them, so tokens may straddle markup and content.
        """
        run: list[Piece] = []
        for piece in pieces:
            end = 0
            if piece.role is Role.MARKUP:
                for match in self._markup.finditer(piece.text):
                    run.append(Piece(Role.MARKUP, piece.text[end : match.start()]))
                    yield from self._run(run, first)
                    yield Role.MARKUP, self._special[match[0].strip()]
                    run, end, first = [], match.end(), False
            run.append(Piece(piece.role, piece.text[end:]))
        yield from self._run(run, first)

    def _run(self, run: Sequence[Piece], first: bool) -> Iterator[tuple[Role, int]]:
        """Encode a run of pieces; a token belongs to the piece of its last character."""
        texts = [_valid(piece.text) for piece in run]
        ends = list(accumulate(len(text) for text in texts))
        backend = self._backend if first else self._inner
        encoding = backend.encode("".join(texts), add_special_tokens=False)
        for id, (_, end) in zip(encoding.ids, encoding.offsets, strict=True):
            yield run[min(bisect_right(ends, max(end - 1, 0)), len(run) - 1)].role, id


class TextStream:
    """Token ids in, text out, as soon as it is certain.

    Decodes a short window only: the last tokens that gave text, for the spaces that some
    tokenizers take from their neighbours, and those that are still half a character.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special: frozenset[int]) -> None:
        self._backend = backend
        self._special = special
        self._ids: list[int] = []
        self._settled = 0  # the first ids of the window, whose text was given
        self._given = 0  # characters of the window's text that were given

    def push(self, id: int) -> str:
        """Return the text that became certain with this token."""
        if id in self._special:
            return ""
        self._ids.append(id)
        text = self._backend.decode(self._ids)
        if not text.endswith("\ufffd"):
            return self._settle(text, len(text), self._ids[self._settled :])
        if len(self._ids) - self._settled <= _LONGEST_WAIT:
            return ""
        return self._settle(text, len(text) - 1, self._ids[-4:], held=1)

    def flush(self) -> str:
        """Return what was held back, at the end of a reply."""
        text = self._backend.decode(self._ids)
        return self._settle(text, len(text), [])

    def _settle(self, text: str, end: int, window: list[int], held: int = 0) -> str:
        new = text[self._given : end]
        self._ids = window
        self._settled = len(window)
        self._given = len(self._backend.decode(window)) - held
        return new


_LONGEST_WAIT = 8  # tokens; a character has at most four bytes, so more of them are just invalid


def _literal(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _without_prefix(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return the tokenizer for text that is not the first: some put a space before the first."""
    if "prepend_scheme=first" not in str(backend.pre_tokenizer):
        return backend
    state = json.loads(backend.to_str())
    for step in (state["pre_tokenizer"], *state["pre_tokenizer"].get("pretokenizers", [])):
        if step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "never"
    return _literal(tokenizers.Tokenizer.from_str(json.dumps(state)))


def _alternatives(tokens: Iterable[tokenizers.AddedToken]) -> re.Pattern[str]:
    """Return a pattern for special tokens in markup, the longest first."""
    longest = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    return re.compile("|".join(_pattern(token) for token in longest) or r"(?!)")


def _pattern(token: tokenizers.AddedToken) -> str:
    return r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip


def _valid(text: str) -> str:
    """Replace lone surrogates, which JSON can carry and UTF-8 cannot.

    >>> _valid("a" + chr(0xD800) + "b")
    'a\ufffdb'
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
