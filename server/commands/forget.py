"""`hope eval forget`: what a session that goes on learning loses of what its model could do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from server.commands.terminal import Refusal, out, progress, stopped, table
from server.commands.trials import CHATS, chats_of, folder, keep, loaded, writable

if TYPE_CHECKING:  # torch takes seconds to import; --help should not
    from hope_runtime.evaluation.forget import Standing

_COLUMNS = (
    "sessions",
    "tokens",
    "moved",
    "WikiText-2 ppl",
    "change",
    "last words",
    "kept",
    "lost",
    "new",
    "questions",
    "kept",
    "lost",
    "new",
    "capital of France",
)


def forget(
    data: Path | None,
    sessions: Sequence[int],
    tokens: int,
    text_tokens: int,
    passages: int,
    seed: int,
    model_name: str,
    threads: int,
    to: Path | None,
    plot: Path | None,
) -> None:
    """Live through the sessions, show and keep."""
    from hope_runtime.evaluation import forget as trial
    from hope_runtime.evaluation import text
    from hope_runtime.evaluation.reading import Reader

    here = folder(data)
    writable(to, plot)
    words = text.lambada(here)
    wiki = bytes(text.wikitext(here).held_out).decode()
    plays = bytes(text.shakespeare(here).train).decode()
    chats = chats_of(here if (here / CHATS).is_file() else None)
    model, tokenizer = loaded(model_name, threads)
    reader = Reader(model, tokenizer, lanes=trial.LANES)
    probes = trial.probes(tokenizer, wiki, text_tokens, words, passages, seed)
    days = trial.days(tokenizer, chats, plays, tokens, seed)
    found: list[Standing] = []
    with progress(max(sessions)) as report:
        try:
            for standing in trial.forget(reader, probes, days, sessions, report):
                found.append(standing)
                keep(to, [each.to_json(found[0]) for each in found])
        except KeyboardInterrupt:
            _show(found)
            raise stopped() from None
    _show(found)
    for question in _lost(found, probes.questions):
        out.print(f"lost at the end: {question}", markup=False)
    if plot is not None:
        _draw(found, plot)


def _show(found: Sequence[Standing]) -> None:
    from hope_runtime.evaluation.forget import CAPITAL_OF_FRANCE, common_knowledge, compared

    texts = [question.text for question in common_knowledge()]
    france = texts.index(CAPITAL_OF_FRANCE)
    rows = []
    for each in found:
        base = found[0]
        words, known = compared(each.passages, base.passages), compared(each.right, base.right)
        rows.append(
            (
                str(each.sessions) if each.sessions else "base",
                f"{each.tokens:,}",
                " / ".join(f"{moved:.2%}" for moved in each.moved.values()),
                f"{each.text.perplexity:.2f}",
                f"{each.text.perplexity / base.text.perplexity - 1:+.1%}",
                f"{sum(each.passages) / len(each.passages):.1%}",
                *(str(count) for count in words[1:]),
                f"{sum(each.right)}/{len(each.right)}",
                *(str(count) for count in known[1:]),
                "right" if each.right[france] else "wrong",
            )
        )
    out.print(table(_COLUMNS, rows))


def _lost(found: Sequence[Standing], questions: Sequence[tuple[str, object]]) -> list[str]:
    if not found:
        return []
    pairs = zip(found[0].right, found[-1].right, questions, strict=True)
    return [question[0] for before, now, question in pairs if before and not now]


def _draw(found: Sequence[Standing], file: Path) -> None:
    from hope_runtime.evaluation.forget import compared
    from hope_runtime.evaluation.plot import Panel, PlotError, curves

    base = found[0]
    words = [(each.sessions, compared(each.passages, base.passages)) for each in found]
    known = [(each.sessions, compared(each.right, base.right)) for each in found]
    text = {"": [(each.sessions, each.text.perplexity) for each in found]}
    panels = [
        Panel("WikiText-2", "sessions", "perplexity", text),
        Panel(
            "LAMBADA last words",
            "sessions",
            "%",
            {
                "right": [(n, 100 * sum(c[1::2]) / len(base.passages)) for n, c in words],
                "kept": [(n, 100 * c.kept / len(base.passages)) for n, c in words],
            },
        ),
        Panel(
            "common knowledge",
            "sessions",
            "% of what the base knows",
            {"kept": [(n, 100 * c.kept / max(c.base, 1)) for n, c in known]},
        ),
    ]
    try:
        curves(panels, file)
    except PlotError as error:
        raise Refusal(str(error)) from error
