"""Class-incremental intents: tasks come one after the other, and all seen intents are asked for.

A line is `Query: TEXT`, then `Intent: NAME`. An answer is the seen intent whose name, followed by
the end of the line, a query makes the most likely in comparison with no query at all: the largest
log p(NAME | query) - log p(NAME | NOTHING), NOTHING standing in the query's place (pointwise
mutual information, for a chat model has its favourites among names). It is searched for along the
names' common beginnings, the `BEAM` best of them at every token.

Axes: B rows, T tokens, V symbols of the vocabulary.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hope_runtime.evaluation.reading import PIECE, Reader, Token
from hope_runtime.evaluation.text import TextError
from hope_runtime.layers.attention import Past
from hope_runtime.layers.cms import Deltas
from hope_runtime.layers.memory import Memories
from hope_runtime.model import Hope, Read
from hope_runtime.state import State
from hope_runtime.tokenizer import Tokenizer

TASKS = 10
SPLIT = 0  # the seed of the split into tasks: `default_rng(SPLIT).permutation` of sorted intents
HEADER = "What users ask for:\n\n"
NOTHING = "N/A"
BEAM = 4
ROWS = 16  # queries of one pass
ROOM = 96  # tokens of the window that are kept for a query and a name

CONTENDERS = {
    "frozen": "the model as it is, and nothing but the query",
    "in-context": "the model as it is; the window holds the newest classes' examples",
    "consolidated": "a session's levels after it has read all examples once, with an empty window",
    "fine-tuned": "the levels' MLPs trained by Adam, task after task",
}


class Example(NamedTuple):
    """What a user said, and the number of its intent."""

    text: str
    intent: int


@dataclass(frozen=True, slots=True)
class Intents:
    """All intents by their names, in the order in which they come, with what is drawn of each."""

    names: tuple[str, ...]
    train: tuple[tuple[str, ...], ...]
    test: tuple[tuple[str, ...], ...]

    @property
    def per_task(self) -> int:
        return -(-len(self.names) // TASKS)

    def task(self, number: int) -> range:
        """Return the intents of a task."""
        return range(len(self.names))[number * self.per_task : (number + 1) * self.per_task]


@dataclass(frozen=True, slots=True)
class Setting:
    """How much is learned, and asked."""

    examples: int = 5  # of each intent
    queries: int = 2  # of each intent after the last task; after the others, one
    epochs: int = 2  # of fine-tuning over a task's examples
    rate: float = 2e-4  # of fine-tuning
    batch: int = 15
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Score:
    """One contender after one task."""

    contender: str
    task: int  # from 1 on
    right: int
    asked: int
    newest: float  # the share of right answers on the task that was learned last
    first: float  # and on the first one

    @property
    def accuracy(self) -> float:
        return self.right / self.asked

    def to_json(self) -> dict[str, Any]:
        return {
            "contender": self.contender,
            "task": self.task,
            "right": self.right,
            "asked": self.asked,
            "accuracy": self.accuracy,
            "newest": self.newest,
            "first": self.first,
        }


def read_intents(folder: Path, setting: Setting) -> Intents:
    """Read CLINC150 and draw from it.

    Raises:
        TextError: the archive is not there, or is another.
    """
    path = folder / "clinc150.tar.xz"
    if not path.is_file():
        raise TextError(f"{folder} has no clinc150.tar.xz; name its folder with --data")
    try:
        with tarfile.open(path) as archive:
            inside = next(m for m in archive if m.name.endswith("data_full.json"))
            file = archive.extractfile(inside)
            data = json.loads(file.read()) if file else {}
        return drawn(data["train"], data["test"], setting)
    except (OSError, ValueError, LookupError, StopIteration, tarfile.TarError) as error:
        raise TextError(
            f"{path}: no data_full.json of CLINC150 in it ({error!r}); "
            "take the archive as published"
        ) from error


def drawn(
    train: Sequence[Sequence[str]], test: Sequence[Sequence[str]], setting: Setting
) -> Intents:
    """Return intents in the order of the split, with examples and queries drawn by the seed."""
    labels = sorted({label for _, label in train})
    order = [labels[i] for i in np.random.default_rng(SPLIT).permutation(len(labels))]
    chance = np.random.default_rng([setting.seed, 2])

    def draw(rows: Sequence[Sequence[str]], count: int) -> tuple[tuple[str, ...], ...]:
        by_label: dict[str, list[str]] = {label: [] for label in order}
        for text, label in rows:
            by_label[label].append(" ".join(text.split()))
        chosen = []
        for texts in by_label.values():
            places = chance.permutation(len(texts))[:count]
            chosen.append(tuple(texts[i] for i in places))
        return tuple(chosen)

    names = tuple(label.replace("_", " ") for label in order)
    return Intents(names, draw(train, setting.examples), draw(test, setting.queries))


def asked(text: str) -> str:
    """Return a line up to where the name of the intent begins."""
    return f"Query: {text}\nIntent:"


def named(name: str) -> str:
    """Return the rest of the line, and what parts it from the next."""
    return f" {name}\n"


# --- answering --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mind:
    """A model that has read something, and whose levels have learned something."""

    model: Hope
    prefix: tuple[int, ...]
    deltas: Deltas


class Names:
    """What may be answered, as a tree of tokens."""

    def __init__(self, tokenizer: Tokenizer, names: Sequence[str]) -> None:
        self.ids = [tuple(tokenizer.encode(named(name))) for name in names]
        self.follow: dict[tuple[int, ...], list[int]] = {}
        for ids in self.ids:
            for n in range(len(ids)):
                after = self.follow.setdefault(ids[:n], [])
                if ids[n] not in after:
                    after.append(ids[n])
        self.number = {ids: i for i, ids in enumerate(self.ids)}


@torch.no_grad()
def answers(
    mind: Mind, names: Names, prompts: Sequence[Sequence[int]], nothing: Sequence[int]
) -> list[int]:
    """Return the number of the name that answers each prompt; `nothing` is the empty prompt."""
    prefix = _prefix(mind)
    prior = _prior(mind, names, prefix, nothing)
    found: list[int] = []
    rows = max(1, ROWS * PIECE // max(PIECE, len(mind.prefix)))  # each holds all of the prefix
    for at in range(0, len(prompts), rows):
        stand = _prompted(mind, prefix, prompts[at : at + rows])
        found += _search(mind, names, stand, prior)
    return found


class _Stand(NamedTuple):
    """Rows that have read something, and what may follow."""

    past: Past
    start: Tensor  # [B]
    logs: Tensor  # [B, V] log-probabilities of the next token


def _prefix(mind: Mind) -> Past:
    model = mind.model
    past = model.nothing(1)
    attends = bool(model.config.attention_blocks)
    most = min(PIECE, model.config.window) if attends else PIECE
    for at in range(0, len(mind.prefix), most):
        ids = torch.tensor([mind.prefix[at : at + most]], device=model.device)
        start = torch.tensor([at], device=model.device)
        past = _joined(past, model.run(model.embed(ids), start, past, [mind.deltas]), start)
    return past


def _prompted(mind: Mind, prefix: Past, prompts: Sequence[Sequence[int]]) -> _Stand:
    """Let a row for each prompt read it after the prefix."""
    model, rows = mind.model, len(prompts)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    most = int(lengths.max())
    ids = torch.tensor([[*prompt, *[0] * (most - len(prompt))] for prompt in prompts])
    start = torch.full((rows,), len(mind.prefix), device=model.device)
    past = _taken(prefix, torch.zeros(rows, dtype=torch.int64, device=model.device))
    x = model.embed(ids.to(model.device))
    read = model.run(x, start, past, [mind.deltas] * rows, lengths=lengths)
    last = read.hidden[torch.arange(rows, device=model.device), lengths - 1]
    after = _joined(past, read, start, lengths)
    return _Stand(after, start + lengths, F.log_softmax(model.logits(last), -1))


def _grown(mind: Mind, stand: _Stand, rows: Sequence[int], tokens: Sequence[int]) -> _Stand:
    """Let copies of some rows read one token more."""
    model = mind.model
    chosen = torch.tensor(rows, device=model.device)
    past, start = _taken(stand.past, chosen), stand.start[chosen]
    x = model.embed(torch.tensor(tokens, device=model.device)[:, None])
    read = model.run(x, start, past, [mind.deltas] * len(rows))
    logs = F.log_softmax(model.logits(read.hidden[:, -1]), -1)
    return _Stand(_joined(past, read, start), start + 1, logs)


def _prior(
    mind: Mind, names: Names, prefix: Past, nothing: Sequence[int]
) -> dict[tuple[int, ...], float]:
    """Return the log-probability of every beginning of a name where nothing was asked."""
    prior: dict[tuple[int, ...], float] = {(): 0.0}

    def follow(stand: _Stand, begun: Sequence[tuple[int, ...]]) -> None:
        further: list[tuple[int, tuple[int, ...]]] = []
        for row, each in enumerate(begun):
            for token in names.follow[each]:
                longer = (*each, token)
                prior[longer] = prior[each] + float(stand.logs[row, token])
                if longer in names.follow:
                    further.append((row, longer))
        for at in range(0, len(further), ROWS):  # some at a time: a row holds all of the past
            some = further[at : at + ROWS]
            rows, longer_ones = [row for row, _ in some], [each for _, each in some]
            follow(_grown(mind, stand, rows, [each[-1] for each in longer_ones]), longer_ones)

    follow(_prompted(mind, prefix, [nothing]), [()])
    return prior


class _Begun(NamedTuple):
    """The beginning of a name, of which query, and in which row it was read but for its end."""

    query: int
    row: int
    ids: tuple[int, ...]
    log: float


def _search(
    mind: Mind, names: Names, stand: _Stand, prior: Mapping[tuple[int, ...], float]
) -> list[int]:
    """Return the best name of each row, by the best beginnings at every token."""
    queries = range(len(stand.start))
    best: list[tuple[float, int]] = [(-np.inf, -1) for _ in queries]
    beam = [_Begun(query, query, (), 0.0) for query in queries]
    while beam:
        further: list[list[_Begun]] = [[] for _ in queries]
        for row, begun in enumerate(beam):
            for token in names.follow[begun.ids]:
                ids = (*begun.ids, token)
                log = begun.log + float(stand.logs[row, token])
                if ids in names.number:
                    found = (log - prior[ids], names.number[ids])
                    best[begun.query] = max(best[begun.query], found)
                else:
                    further[begun.query].append(_Begun(begun.query, row, ids, log))
        beam = [
            begun
            for each in further
            for begun in sorted(each, key=lambda one: prior[one.ids] - one.log)[:BEAM]
        ]
        if beam:
            rows, tokens = [begun.row for begun in beam], [begun.ids[-1] for begun in beam]
            stand = _grown(mind, stand, rows, tokens)
    return [number for _, number in best]


def _joined(past: Past, read: Read, start: Tensor, lengths: Tensor | None = None) -> Past:
    """Return the past after a pass; what follows a row's own tokens is not seen."""
    steps = torch.arange(read.hidden.shape[1], device=start.device)
    positions = start[:, None] + steps
    if lengths is not None:
        positions = positions.masked_fill(steps >= lengths[:, None], -1)
    return Past(
        torch.cat([past.rotated, read.rotated], 3),
        torch.cat([past.values, read.values], 3),
        torch.cat([past.positions, positions], 1),
        read.memories,
    )


def _taken(past: Past, rows: Tensor) -> Past:
    """Return a row of the past for each of `rows`."""
    memories = past.memories and Memories(*(t[:, rows] for t in past.memories))
    return Past(past.rotated[:, rows], past.values[:, rows], past.positions[rows], memories)


# --- contenders -------------------------------------------------------------------------------

Progress = Callable[[str, float], None]


class Study:
    """The intents as tokens, and what each contender makes of them."""

    def __init__(self, reader: Reader, intents: Intents, setting: Setting) -> None:
        self.reader, self.intents, self.setting = reader, intents, setting
        self.tokenizer, self.model = reader.tokenizer, reader.model
        self.header = tuple(self.tokenizer.encode(HEADER))

    def line(self, example: Example) -> tuple[list[int], list[int]]:
        """Return the tokens of a line up to its name, and those of the name."""
        name = self.intents.names[example.intent]
        return self.tokenizer.encode(asked(example.text)), self.tokenizer.encode(named(name))

    def lines(self, task: int) -> list[Example]:
        """Return a task's examples in an order of their own, the same for all contenders."""
        examples = [Example(t, i) for i in self.intents.task(task) for t in self.intents.train[i]]
        order = np.random.default_rng([self.setting.seed, 3, task]).permutation(len(examples))
        return [examples[i] for i in order]

    def run(self, contender: str, progress: Progress = lambda text, tasks: None) -> Iterator[Score]:
        """Yield what a contender answers after each task; `progress` hears of tasks done."""
        minds = {
            "frozen": self._frozen,
            "in-context": self._in_context,
            "fine-tuned": self._fine_tuned,
            "consolidated": self._consolidated,
        }[contender]()
        progress(f"{contender}: task 1", 0)
        for task, mind in enumerate(minds):
            yield self._score(contender, task, mind)
            progress(f"{contender}: task {min(task + 2, TASKS)}", task + 1)

    def _score(self, contender: str, task: int, mind: Mind) -> Score:
        seen = self.intents.task(task).stop
        names = Names(self.tokenizer, self.intents.names[:seen])
        count = self.setting.queries if task == TASKS - 1 else 1
        queries = [Example(t, i) for i in range(seen) for t in self.intents.test[i][:count]]
        prompts = [self.tokenizer.encode(asked(query.text)) for query in queries]
        order = sorted(
            range(len(prompts)), key=lambda i: len(prompts[i])
        )  # little filler in a pass
        nothing = self.tokenizer.encode(asked(NOTHING))
        said = answers(mind, names, [prompts[i] for i in order], nothing)
        right = [queries[i].intent == answer for i, answer in zip(order, said, strict=True)]
        newest, first = self.intents.task(task), self.intents.task(0)

        def share(among: range) -> float:
            own = [r for i, r in zip(order, right, strict=True) if queries[i].intent in among]
            return sum(own) / len(own)

        return Score(contender, task + 1, sum(right), len(right), share(newest), share(first))

    def _frozen(self) -> Iterator[Mind]:
        for _ in range(TASKS):
            yield Mind(self.model, self.header, {})

    def _in_context(self) -> Iterator[Mind]:
        """One example of each class, the newest classes first, as many as the window holds."""
        room = self.model.config.window - ROOM - len(self.header)
        for task in range(TASKS):
            seen: dict[int, list[int]] = {}
            used = 0
            for example in (e for t in range(task, -1, -1) for e in self.lines(t)):
                line = [token for part in self.line(example) for token in part]
                if example.intent not in seen and used + len(line) <= room:
                    seen[example.intent] = line
                    used += len(line)
            held = [token for line in reversed(seen.values()) for token in line]
            yield Mind(self.model, (*self.header, *held), {})

    def _consolidated(self) -> Iterator[Mind]:
        """Read every task's lines as one document that goes on, as when served."""
        state = self.reader.read(State(), _document(self.header), learn=True)
        for task in range(TASKS):
            lines = [self.line(example) for example in self.lines(task)]
            read = [token for before, name in lines for token in (*before, *name)]
            state = self.reader.read(state, _document(read), learn=True)
            model = self.model
            deltas = {n: d.to(model.device, model.dtype) for n, d in state.deltas.items()}
            yield Mind(model, self.header, deltas)

    def _fine_tuned(self) -> Iterator[Mind]:
        """Train on the names of a task's lines, each line after the header and alone."""
        tuned = _Tuned(self.model)
        optimiser = torch.optim.Adam(tuned.weights, lr=self.setting.rate)
        for task in range(TASKS):
            chance = np.random.default_rng([self.setting.seed, 4, task])
            lessons = [tuned.lesson(self.header, *self.line(e)) for e in self.lines(task)]
            for _ in range(self.setting.epochs):
                order = chance.permutation(len(lessons)).tolist()
                for at in range(0, len(order), self.setting.batch):
                    some = order[at : at + self.setting.batch]
                    loss = tuned.loss([lessons[i] for i in some])
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
            yield Mind(tuned.made(), self.header, {})


def _document(ids: Sequence[int]) -> list[Token]:
    return [Token(id, 1.0, True) for id in ids]


class _Lesson(NamedTuple):
    """A line as training sees it: what enters the first trained block, and the name's tokens."""

    inputs: Tensor  # [T, width]
    name: Tensor  # what the last of these tokens predict


class _Tuned:
    """A model whose levels' MLPs are float32 weights to be trained."""

    def __init__(self, model: Hope) -> None:
        self._model = model
        self._places = [(i, level.mlp) for level in model.config.levels for i in level.blocks]
        parts = [
            part
            for i, place in self._places
            for part in (model.blocks[i].mlps[place].gate_up, model.blocks[i].mlps[place].down)
        ]
        self.weights = [part.detach().float().clone().requires_grad_() for part in parts]

    def made(self) -> Hope:
        """Return the model with the weights as they are."""
        model, blocks = copy(self._model), list(self._model.blocks)
        pairs = zip(self.weights[::2], self.weights[1::2], strict=True)
        for (i, place), (gate_up, down) in zip(self._places, pairs, strict=True):
            mlps = list(blocks[i].mlps)
            tuned = (gate_up.to(model.dtype), down.to(model.dtype))
            mlps[place] = mlps[place]._replace(gate_up=tuned[0], down=tuned[1])
            blocks[i] = replace(blocks[i], mlps=tuple(mlps))
        model.blocks = tuple(blocks)
        return model

    @torch.no_grad()
    def lesson(self, header: Sequence[int], before: Sequence[int], name: Sequence[int]) -> _Lesson:
        """Read a line up to the blocks that are trained; below them nothing ever changes."""
        model = self._model
        ids = torch.tensor([[*header, *before, *name]], device=model.device)
        start = torch.zeros(1, dtype=torch.int64, device=model.device)
        read = model.run(model.embed(ids[:, :-1]), start, model.nothing(1), [{}])
        return _Lesson(read.inputs[0], ids[0, -len(name) :])

    def loss(self, lessons: Sequence[_Lesson]) -> Tensor:
        """Return the mean loss of the names' tokens."""
        model, rows = self.made(), len(lessons)
        inputs = pad_sequence([lesson.inputs for lesson in lessons], batch_first=True)
        start = torch.zeros(rows, dtype=torch.int64, device=model.device)
        first = model.config.first_level_block
        read = model.run(inputs, start, model.nothing(rows, first), [{}] * rows, first=first)
        last = [
            hidden[len(lesson.inputs) - len(lesson.name) : len(lesson.inputs)]
            for hidden, lesson in zip(read.hidden, lessons, strict=True)
        ]
        names = torch.cat([lesson.name for lesson in lessons])
        return F.cross_entropy(model.logits(torch.cat(last)), names)
