"""The tokenizer of a Hugging Face directory: tokenizer.json and the files that speak of it."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from hope_runtime.tokenizer import ChatError, Tokenizer
from hope_runtime.weights.checkpoint import CheckpointError
from hope_runtime.weights.json_file import Fields


def directory_tokenizer(path: Path, config: Fields, vocabulary: int) -> Tokenizer:
    """Build the tokenizer of a model with `vocabulary` embeddings."""
    backend = _backend(path / "tokenizer.json")
    settings = Fields.read_if_there(path / "tokenizer_config.json")
    generation = Fields.read_if_there(path / "generation_config.json")
    bos, eos = _token(settings, "bos_token"), _token(settings, "eos_token")
    try:
        tokenizer = Tokenizer(
            backend,
            template=_template(path, settings),
            bos=bos,
            eos=eos,
            starts=settings.flag("add_bos_token", _adds(backend, bos)),
            stops=[*_stops(config), *_stops(generation)],
        )
    except ChatError as error:
        raise CheckpointError(f"{path}: {error}; correct or remove the chat template") from error
    if tokenizer.vocabulary > vocabulary:
        raise CheckpointError(
            f"{path}: tokenizer.json has {tokenizer.vocabulary} tokens, but the model embeds only "
            f"{vocabulary}; they belong to different models: download both again"
        )
    return tokenizer


def _backend(file: Path) -> tokenizers.Tokenizer:
    if not file.is_file():
        raise CheckpointError(
            f"{file}: is missing; download it, or save the tokenizer again with transformers' "
            "save_pretrained"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"{file}: not a tokenizer: {error}; download it again") from error


def _adds(backend: tokenizers.Tokenizer, bos: str | None) -> bool:
    return bos is not None and backend.encode("").tokens[:1] == [bos]


def _token(settings: Fields, key: str) -> str | None:
    """Return a special token, which is written as a text or as an object with its content."""
    value = settings.values.get(key)
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _stops(fields: Fields) -> list[int]:
    value = fields.values.get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return [id for id in values if isinstance(id, int) and id >= 0]


def _template(path: Path, settings: Fields) -> str | None:
    """Return the chat template: a file of its own, a setting, or the default of several."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    value = settings.values.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry for entry in value if isinstance(entry, dict)}
        value = named.get("default", {}).get("template")
    return value if isinstance(value, str) else None
