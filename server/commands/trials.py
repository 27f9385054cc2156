"""What the commands that judge a whole model share: its loading, its data, and what is kept."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.commands.terminal import Refusal, err, settings_from

if TYPE_CHECKING:  # torch takes seconds to import; --help should not
    from hope_runtime.model import Hope
    from hope_runtime.tokenizer import Tokenizer
    from hope_runtime.training.corpora import Chat

CHATS = "self_dialogue.tar.xz"


def loaded(name: str, threads: int, *, window: int | None = None) -> tuple[Hope, Tokenizer]:
    """Read a model as it would be served."""
    from server.loading import load

    settings = settings_from(model=name, threads=threads, lanes=1, window=window)
    if not err.is_terminal:
        err.print(f"reading {name}")
    with err.status(f"reading {name}"):
        _, model, tokenizer, _ = load(settings, lambda said: None)
    return model, tokenizer


def chats_of(data: Path | None) -> list[Chat]:
    """Return the chats below a folder that no model of ours was trained on; else those shipped."""
    from hope_runtime.training.corpora import read_chats
    from server.loading import shipped

    if data is not None and (packed := data / CHATS).is_file():
        data = packed  # beside it there may be texts that are no chats
    chats = read_chats(data or shipped("hope-nano") / "chats.jsonl")
    found = chats.valid or chats.train
    if len(found) < 2:
        raise Refusal(f"--data {data}: one chat is not enough; put more of them there")
    return found


def folder(data: Path | None) -> Path:
    """Return the folder with the data, which has to be named."""
    if data is None:
        raise Refusal(
            "name the folder of the data with --data DIR or HOPE_EVAL_DATA; "
            "docs/evaluation.md says what belongs there"
        )
    if not data.is_dir():
        raise Refusal(f"--data {data}: there is no such folder")
    return data


def writable(*files: Path | None) -> None:
    """Refuse a file that could not be written when the work is done."""
    for file in files:
        if file is not None and not os.access(file.parent, os.W_OK):
            raise Refusal(f"{file}: {file.parent} is no folder to write in; name another file")


def keep(file: Path | None, found: Sequence[Any] | dict[str, Any]) -> None:
    """Write what was found so far, all of it or what was there before."""
    if file is None:
        return
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    part.replace(file)
