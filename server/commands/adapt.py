"""`hope eval adapt`: what consolidation gains while a session reads, and costs elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.commands.terminal import Refusal, out, progress, stopped, table
from server.commands.trials import chats_of, keep, loaded, writable

if TYPE_CHECKING:  # torch takes seconds to import; --help should not
    from hope_runtime.evaluation.adapt import Adaptation

_OTHER = 1024  # tokens of unrelated chat
_COLUMNS = (
    "read",
    "window",
    "static",
    "learning",
    "change",
    "other chat",
    "after",
    "change",
    "+-",
    "",
)


def adapt(
    files: Sequence[Path],
    data: Path | None,
    windows: Sequence[int],
    tokens: int,
    skip: int,
    changes: Sequence[str],
    model_name: str,
    threads: int,
    to: Path | None,
) -> None:
    """Read, show and keep."""
    from hope_runtime.evaluation import adapt as trial

    writable(to)
    documents = [(file.name, _text(file)[skip:]) for file in files]
    chats = chats_of(data)
    model, tokenizer = loaded(model_name, threads, window=max(windows))
    if not model.config.attention_blocks:
        windows = windows[:1]  # nothing looks through it
    model.config = trial.changed(model.config, dict(map(_change, changes)))
    for window in windows:
        trial.windowed(model, window)  # one that is too short is refused before any work
    read = trial.sources(tokenizer, documents, chats, tokens)
    if short := [source.name for source in read if len(source.tokens) < 2]:
        raise Refusal(f"{short[0]}: nothing to read is left; name a longer text, or less --skip")
    other = trial.unrelated(tokenizer, chats, _OTHER)
    found: list[Adaptation] = []
    total = 2 * len(windows) * sum(len(source.tokens) for source in read)
    with progress(total) as report:
        done, last = 0, ("", 0)

        def advance(text: str, at: int) -> None:
            nonlocal done, last
            done += at - (last[1] if text == last[0] else 0)
            last = (text, at)
            report(text, done)

        try:
            for row in trial.adapt(model, tokenizer, read, other, windows, advance):
                found.append(row)
                keep(to, [each.to_json() for each in found])
        except KeyboardInterrupt:
            _show(found)
            raise stopped() from None
    _show(found)


def _show(found: Sequence[Adaptation]) -> None:
    rows = [
        (
            each.source,
            str(each.window),
            f"{each.static.perplexity:.2f}",
            f"{each.learning.perplexity:.2f}",
            f"{each.change:+.1%}",
            f"{each.other_before.perplexity:.2f}",
            f"{each.other_after.perplexity:.2f}",
            f"{each.other_change:+.1%}",
            f"{each.other_error:.1%}",
            "worse" if each.worse else "",
        )
        for each in found
    ]
    out.print(table(_COLUMNS, rows))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{file}: {error}; name a text file in UTF-8") from None


def _change(text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    try:
        if not found or name not in _SETTINGS:
            raise ValueError
        if name == "optimiser":
            return name, value
        return name, int(value) if name == "rank" else float(value)
    except ValueError:
        raise Refusal(
            f"--level {text!r}: give a setting of a level and its value, such as rank=32; "
            f"there are {', '.join(_SETTINGS)}"
        ) from None


_SETTINGS = ("rate", "retain", "clip", "bound", "rank", "gate", "optimiser")
