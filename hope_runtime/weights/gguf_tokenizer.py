"""The tokenizer that a GGUF file describes: byte-level BPE, split as its family does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tokenizers
from tokenizers import AddedToken, Regex
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from hope_runtime.tokenizer import ChatError, Tokenizer
from hope_runtime.weights.checkpoint import CheckpointError
from hope_runtime.weights.gguf_format import Metadata

_CONTROL, _USER_DEFINED = 3, 4
_BOS = "tokenizer.ggml.bos_token_id"
_STOPS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


@dataclass(frozen=True, slots=True)
class Splitting:
    """What a family does before byte pairs are merged."""

    split: Callable[[], PreTokenizer]
    compose: bool = False  # to Unicode's NFC first
    whole_words: bool = False  # a word that is in the vocabulary is not merged from parts
    starts: bool = False  # with the beginning-of-sequence token, unless the file denies it


def _gpt2() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False)


def _smollm() -> PreTokenizer:
    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


def _llama() -> PreTokenizer:
    return _pattern(r"\p{N}{1,3}")


def _qwen() -> PreTokenizer:
    return _pattern(r"\p{N}")


def _pattern(digits: str) -> PreTokenizer:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    bytes_only = ByteLevel(add_prefix_space=False, use_regex=False)
    return Sequence([Split(Regex(pattern), "isolated"), bytes_only])


_SPLITTINGS = {
    "gpt-2": Splitting(_gpt2),
    "smollm": Splitting(_smollm),
    "llama-bpe": Splitting(_llama, whole_words=True, starts=True),
    "qwen2": Splitting(_qwen, compose=True),
}


def gguf_tokenizer(metadata: Metadata) -> Tokenizer:
    """Build the tokenizer of a file from its metadata."""
    splitting = _splitting(metadata)
    tokens = metadata.texts("tokenizer.ggml.tokens")
    stops = [metadata.integer(key) for key in _STOPS if key in metadata.values]
    try:
        return Tokenizer(
            _backend(metadata, tokens, splitting),
            template=metadata.text("tokenizer.chat_template", ""),
            bos=_named(metadata, tokens, _BOS),
            eos=_named(metadata, tokens, _STOPS[0]),
            starts=bool(metadata.integer("tokenizer.ggml.add_bos_token", splitting.starts)),
            stops=stops,
        )
    except ChatError as error:
        raise CheckpointError(f"{metadata.path}: {error}; convert the model again") from error


def _splitting(metadata: Metadata) -> Splitting:
    model = metadata.text("tokenizer.ggml.model")
    family = metadata.text("tokenizer.ggml.pre", "default")
    if model != "gpt2" or family not in _SPLITTINGS:
        raise CheckpointError(
            f"{metadata.path}: its tokenizer is {model!r} with pre-tokenizer {family!r}; supported "
            f"are 'gpt2' with {', '.join(map(repr, _SPLITTINGS))}: use the model's Hugging Face "
            "directory instead, whose tokenizer.json can always be read"
        )
    return _SPLITTINGS[family]


def _named(metadata: Metadata, tokens: list[str], key: str) -> str | None:
    id = metadata.integer(key, -1)
    return tokens[id] if 0 <= id < len(tokens) else None


def _backend(metadata: Metadata, tokens: list[str], how: Splitting) -> tokenizers.Tokenizer:
    kinds = metadata.integers("tokenizer.ggml.token_type")
    merges = metadata.texts("tokenizer.ggml.merges")
    ids = {token: id for id, token in enumerate(tokens)}
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    known = all(a in ids and b in ids and a + b in ids for a, b in pairs)
    if len(ids) != len(tokens) or len(kinds) != len(tokens) or not known:
        raise CheckpointError(
            f"{metadata.path}: the vocabulary of {len(tokens)} tokens is inconsistent with its "
            "types or merges; download it again"
        )
    backend = tokenizers.Tokenizer(BPE(ids, pairs, ignore_merges=how.whole_words))
    backend.pre_tokenizer = how.split()
    backend.decoder = ByteLevelDecoder()
    if how.compose:
        backend.normalizer = NFC()
    backend.add_special_tokens(_added(tokens, kinds, _CONTROL))
    backend.add_tokens(_added(tokens, kinds, _USER_DEFINED))
    return backend


def _added(tokens: list[str], kinds: list[int], kind: int) -> list[AddedToken]:
    return [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, its in zip(tokens, kinds, strict=True)
        if its == kind
    ]
