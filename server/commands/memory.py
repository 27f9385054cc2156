"""`hope eval memory`: is what people tell still known later, from memory alone? Asked as users do.

A server of its own is started, with an embedded store. People tell it their facts, chat goes on,
the server is killed and started again, and each fact is asked for in a fresh window, every time
from the same state.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clients.errors import HopeError
from server.commands._serving import Server
from server.commands.terminal import Refusal, err, out, progress, stopped, table
from server.commands.trials import chats_of, keep, writable

if TYPE_CHECKING:  # torch takes seconds to import; --help should not
    from clients.sync import Hope
    from hope_runtime.evaluation.forget import Question
    from hope_runtime.evaluation.told import Fact, Person
    from hope_runtime.training.corpora import Chat
    from hope_runtime.training.told import Kind

CONTENDERS = ("memory", "nothing", "context", "retrieval")
_AT_ONCE = 8  # people who talk at the same time
_ANSWER = 32  # tokens
_ACKNOWLEDGED = 16  # tokens of the reply to what is told
_BEST = 3  # sentences that the rival puts into the prompt


@dataclass(frozen=True, slots=True)
class Row:
    """What is asked of the model."""

    part: str
    facts: int
    filler: int  # tokens of chat between telling and asking
    changing: bool = False
    common: bool = False  # what everybody knows is asked for, and nothing that was told


@dataclass(frozen=True, slots=True)
class Answer:
    """What was asked, and what was said to it."""

    contender: str
    person: int
    kind: str
    question: str
    value: str | None  # None: it was never told; of common knowledge, what would be right
    changed: bool
    said: str
    verdict: str


def memory(
    data: Path | None,
    parts: Sequence[str],
    facts: Sequence[int],
    fillers: Sequence[int],
    changing: bool,
    common: bool,
    contenders: Sequence[str],
    users: int,
    seed: int,
    kinds: Path | None,
    model: str,
    layer: str,
    arguments: Sequence[str],
    to: Path | None,
    show: int,
) -> None:
    """Ask, show and keep."""
    from hope_runtime.evaluation.told import Part

    writable(to)
    if common and "nothing" not in contenders:
        raise Refusal("--common compares with the base: name --contender nothing as well")
    if unknown := sorted({*parts} - {*map(str, Part)}):
        raise Refusal(f"--part {unknown[0]!r}: there are {', '.join(Part)}")
    if unknown := sorted({*contenders} - {*CONTENDERS}):
        raise Refusal(f"--contender {unknown[0]!r}: there are {', '.join(CONTENDERS)}")
    rows = [
        Row(part, count, filler, changing, common)
        for part in parts
        for count in facts
        for filler in fillers
    ]
    people = {row: _people(row, users, seed, kinds) for row in rows}
    chats = chats_of(data)
    found: list[dict[str, Any]] = []
    total = sum(len(list(_questions(person, row))) for row in rows for person in people[row]) * len(
        contenders
    )
    try:
        with progress(total) as report:
            done = 0
            for row in rows:
                answers: list[Answer] = []

                def heard(answer: Answer, row: Row = row, answers: list[Answer] = answers) -> None:
                    nonlocal done
                    done += 1
                    answers.append(answer)
                    report(_about(row), done)

                report(_about(row), done)
                served = ["--model", model, "--memory-layer", layer, *arguments]
                _row(row, people[row], chats, contenders, seed, served, heard)
                found.append({**asdict(row), "seed": seed, "answers": [asdict(a) for a in answers]})
                keep(to, found)
    except KeyboardInterrupt:
        _show(found, contenders)
        raise stopped() from None
    except HopeError as error:  # the machine may be too busy for its leases to be renewed
        _show(found, contenders)
        raise Refusal(f"a turn failed, and this row with it: {error}") from error
    _show(found, contenders)
    for kept in found:
        for each in kept["answers"][:show]:
            err.print(f"{each['verdict']:8} {each['question']} -> {each['said']} ({each['value']})")


def _people(row: Row, users: int, seed: int, file: Path | None) -> list[Person]:
    from hope_runtime.evaluation.told import BLIND, Part, blind_kinds, people, usable
    from hope_runtime.training.told import kinds, read

    try:
        part = Part(row.part)
        ours = blind_kinds(part) if part in BLIND else kinds()
        known: Sequence[Kind] = read([file]) if file else ours
        left = usable(known, part)
        return people(left, row.facts, users, seed, changing=row.changing)
    except (OSError, ValueError) as error:
        raise Refusal(str(error)) from error


def _row(
    row: Row,
    people: Sequence[Person],
    chats: Sequence[Chat],
    contenders: Sequence[str],
    seed: int,
    arguments: Sequence[str],
    heard: Callable[[Answer], None],
) -> None:
    """Let everybody tell, kill the server, start it again, and ask everybody's questions."""
    from hope_runtime.evaluation.told import filler

    with (
        tempfile.TemporaryDirectory(prefix="hope-eval-") as folder,
        Server(Path(folder), [*arguments, "--lanes", str(_AT_ONCE)]) as server,
    ):
        if "memory" in contenders:
            with _talking(server) as (hope, threads):
                told = [
                    threads.submit(_tell, hope, i, person, filler(chats, row.filler, seed, i))
                    for i, person in enumerate(people)
                ]
                for each in told:
                    each.result()
            server.kill()
            server.start()
        with _talking(server) as (hope, threads):
            asked = [
                threads.submit(_answer, hope, contender, i, person, question, fact)
                for contender in contenders
                for i, person in enumerate(people)
                for question, fact in _questions(person, row)
            ]
            for one in asked:
                heard(one.result())


@contextmanager
def _talking(server: Server) -> Iterator[tuple[Hope, ThreadPoolExecutor]]:
    """Give a client, and threads to talk through it; whoever breaks off waits for none of them."""
    from clients.sync import Hope

    with Hope(server.url) as hope:
        threads = ThreadPoolExecutor(_AT_ONCE)
        try:
            yield hope, threads
        except BaseException:
            server.kill()  # else all that was asked for would be answered first
            raise
        finally:
            threads.shutdown(cancel_futures=True)


def _questions(person: Person, row: Row) -> Iterator[tuple[str, Fact | Question | str]]:
    from hope_runtime.evaluation.forget import common_knowledge

    if row.common:
        for known in common_knowledge():
            yield known.text, known
        return
    for fact in person.facts:
        yield fact.asked, fact
    for kind, question in person.untold:
        yield question, kind


def _tell(hope: Hope, number: int, person: Person, filler: Sequence[Chat]) -> None:
    """Tell every fact in a turn of its own, what changes last; then let others chat."""
    from server.wire import InputMessage

    session = hope.session(f"person-{number}")
    turns = [text for fact in person.facts for text in fact.told[:1]]
    turns += [text for fact in person.facts for text in fact.told[1:]]
    for text in turns:
        session.ask(text, max_output_tokens=_ACKNOWLEDGED)
    for piece in filler:
        said = [
            InputMessage.model_validate({"role": line.role, "content": line.text}) for line in piece
        ]
        if said[-1].role == "assistant":
            said = said[:-1]
        session.ask(said, max_output_tokens=1)


def _answer(
    hope: Hope,
    contender: str,
    number: int,
    person: Person,
    question: str,
    about: Fact | Question | str,
) -> Answer:
    from hope_runtime.evaluation.forget import Question
    from hope_runtime.evaluation.told import Fact, Verdict, judge, retrieve
    from server.wire import Mode

    told = [text for fact in person.facts for text in fact.told[:1]]
    told += [text for fact in person.facts for text in fact.told[1:]]
    session = hope.session(f"person-{number}")
    options: dict[str, Any] = {"max_output_tokens": _ANSWER, "temperature": 0.0}
    if contender == "memory":
        reply = session.ask(question, mode=Mode.READ_ONLY, window="fresh", **options)
    else:
        known = {
            "nothing": [],
            "context": told,
            "retrieval": retrieve(question, told, _BEST),
        }[contender]
        lines = "".join(f"- {text}\n" for text in known)
        text = f"What I told you before:\n{lines}\n{question}" if lines else question
        reply = session.ask(text, mode=Mode.OFF, **options)
    value: str | None
    if isinstance(about, Question):
        verdict = Verdict.RIGHT if about.right(reply.text) else Verdict.WRONG
        kind, value = "common knowledge", about.accepted[0]
    else:
        fact = about if isinstance(about, Fact) else None
        verdict = judge(reply.text, person, fact)
        kind, value = (fact.kind, fact.value) if fact else (str(about), None)
    changed = isinstance(about, Fact) and about.changed
    return Answer(contender, number, kind, question, value, changed, reply.text, str(verdict))


# --- shown ------------------------------------------------------------------------------------


def _about(row: Row) -> str:
    changed = ", half of them changed" if row.changing else ""
    asked = "; common knowledge" if row.common else ""
    return f"{row.facts} facts{changed}, {row.filler:,} tokens later, {row.part}{asked}"


_COLUMNS = ("row", "contender", "right", "95 %", "wrong", "changed", "untold kept", "95 %", "n")
_COMMON = ("row", "contender", "right", "of the base's kept", "95 %", "in the same words", "n")


def _show(found: Sequence[dict[str, Any]], contenders: Sequence[str]) -> None:
    rows = []
    common = any(kept["common"] for kept in found)
    for kept in found:
        row = Row(**{name: kept[name] for name in Row.__dataclass_fields__})
        answers = [Answer(**a) for a in kept["answers"]]
        base = [each for each in answers if each.contender == "nothing"]
        for contender in contenders:
            ours = [each for each in answers if each.contender == contender]
            figures = _kept(ours, base) if common else _figures(ours)
            rows.append((_about(row), contender, *figures))
    out.print(table(_COMMON if common else _COLUMNS, rows))


def _kept(ours: Sequence[Answer], base: Sequence[Answer]) -> tuple[str, ...]:
    """Compare answers with those of the base to the same questions."""
    from hope_runtime.evaluation.told import interval

    right = sum(each.verdict == "right" for each in ours)
    pairs = list(zip(ours, base, strict=True))
    able = [mine for mine, its in pairs if its.verdict == "right"]
    kept = sum(each.verdict == "right" for each in able)
    low, high = interval(kept, len(able))
    same = sum(mine.said == its.said for mine, its in pairs)
    return (
        f"{right / len(ours):.1%}",
        f"{kept / len(able):.1%}" if able else "-",
        f"{low:.0%} to {high:.0%}",
        f"{same / len(ours):.1%}",
        str(len(ours)),
    )


def _figures(answers: Sequence[Answer]) -> tuple[str, ...]:
    from hope_runtime.evaluation.told import interval

    told = [each for each in answers if each.value is not None]
    changed = [each for each in told if each.changed]
    untold = [each for each in answers if each.value is None]

    def right(of: Sequence[Answer], verdict: str = "right") -> int:
        return sum(each.verdict == verdict for each in of)

    def share(count: int, of: Sequence[Answer]) -> str:
        return f"{count / len(of):.1%}" if of else "-"

    def between(count: int, of: Sequence[Answer]) -> str:
        low, high = interval(count, len(of))
        return f"{low:.0%} to {high:.0%}"

    kept = right(untold, "unknown")
    return (
        share(right(told), told),
        between(right(told), told),
        share(right(told, "wrong"), told),
        share(right(changed), changed),
        share(kept, untold),
        between(kept, untold),
        f"{len(told)} + {len(untold)}",
    )
