"""How the memory layer of a pre-trained base is learned: to copy, and to know when it can.

The base is frozen and was read once. An answer's tokens are learned, the value's most; what was
never told teaches what an empty memory looks like at the very place where a value would come (the
contrast), and nothing else of it is learned: no answer is ever trained to be "I don't know".

Axes: B sessions, T tokens, Q questions, P tokens of a reply, W tokens of context.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hope_runtime.config import RecallConfig
from hope_runtime.layers import recall
from hope_runtime.layers.recall import NOTHING, Weights
from hope_runtime.ops import optimisers
from hope_runtime.ops.collapsed import unit
from hope_runtime.ops.optimisers import OptimiserState
from hope_runtime.training.told.drawing import STAGES, VALUE, Drawn, Pairs, Pool, Stage

FIXED = ("mean", "scale", "basis", "token_mean", "token_basis", "gain", "spaced", "opens")
Noise = Callable[[Tensor], Tensor]
TEMPERATURE = 0.1
OTHERS = 1500  # tokens that no answer of a batch needs, among which it has to be found
MISSED = 2.0  # how much worse it is not to write a value than to write what is none
MEETING = 0.6  # share of the steps that learn from pairs alone, which cost less than half
PAIRS, FEWER = 32, 16  # kinds of facts a step for each session: alone, and beside sessions
BESIDE = 4.0  # how much pairs count beside sessions
WRITES = 100.0  # that a fact should outlive: each takes its likeness squared from every other
STRENGTH = 60.0  # where training begins
KNOWN, CLEARLY = 0.35, 16.0  # what is known should be likelier a value than that; in logits


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a layer is trained; with the features and the seed it determines the result."""

    steps: int
    sessions: int = 16  # a step
    rate: float = 1.5e-3
    warmup: int = 50
    noise: float = 0.3  # on features
    dropout: float = 0.1  # share of the whitened directions that a step does not see
    clip: float = 1.0
    seed: int = 0

    def at(self, step: int) -> float:
        """Return the share of the rate at a step: it rises, and falls as a cosine."""
        rising = min(1.0, (step + 1) / max(self.warmup, 1))
        return rising * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))

    @property
    def meeting(self) -> int:
        """The number of steps that learn from pairs alone, before those with sessions."""
        return round(MEETING * self.steps)

    def stage(self, step: int) -> Stage:
        """Return how hard sessions are at a step: their first quarter climbs to the hardest."""
        place = int(len(STAGES) * 4 * (step - self.meeting) / (self.steps - self.meeting))
        return STAGES[min(place, len(STAGES) - 1)]


class Progress(NamedTuple):
    """A run between two steps."""

    step: int
    params: Mapping[str, Tensor]
    moments: OptimiserState
    chance: np.random.Generator


def initial(
    config: RecallConfig,
    features: Tensor,
    embedding: Tensor,
    decoded: Sequence[str],
    seed: int = 0,
) -> Weights:
    """Return a layer that copies by likeness, behind a gain of zero.

    Keys and queries begin as the same whitened directions, values as the whitened embedding and
    whatever is read is compared with them.

    Args:
        config: of the layer.
        features: a sample of what the seen blocks make of tokens, [n, F].
        embedding: of the base, [V, width].
        decoded: the text of every token.
        seed: of what is drawn.
    """
    chance = torch.Generator().manual_seed(seed)
    width = embedding.shape[1]
    features, embedding = features.float(), embedding.float()
    mean, scale = features.mean(0), features.std(0) + 1e-3
    basis = _whitening(((features - mean) / scale).clamp(-5, 5), config.whitened - config.own, 0.05)
    token_mean = embedding.mean(0)
    centred = embedding - token_mean
    value = _whitening(centred, config.values, None)
    value = value / (centred @ value.T).norm(dim=1).mean()

    def drawn(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=chance) * scale

    z, around = config.whitened, config.attention
    key = torch.zeros(config.keys, z + around)
    ours = 3 * config.keys // 4  # of the key: what the blocks made; the rest: the token itself
    key[:ours, :ours] = torch.eye(ours)
    rest = min(config.keys - ours, config.own)
    key[ours : ours + rest, z - config.own : z - config.own + rest] = 0.5 * torch.eye(rest)
    key[:, z:] = drawn(config.keys, around, scale=0.3 / around**0.5)
    both = 1 / (z + around) ** 0.5
    tensors = {
        "mean": mean,
        "scale": scale,
        "basis": basis,
        "token_mean": token_mean,
        "token_basis": _whitening(centred, config.own, 0.1),
        "context": drawn(2 * around, z, scale=z**-0.5),
        "writer": drawn(around, z, scale=0.5 * z**-0.5),
        "reader": drawn(around, z, scale=0.5 * z**-0.5),
        "write_key": key,
        "read_key": key.clone(),
        "value": value,
        "gate": drawn(config.gate, 2 * z + around, scale=(2 * z + around) ** -0.5),
        "gate_out": drawn(1, config.gate, scale=config.gate**-0.5),
        "sense_out_bias": torch.tensor([-5.0]),  # untrained, it never has the word
        "rate_bias": torch.full((1,), -2.0),
        "fading": torch.full((1,), -8.0),
        "strength": torch.tensor(STRENGTH).log(),
        "sense": drawn(config.hidden, z + around, scale=both),
        "spaced": _spaced(decoded, len(embedding)),
        "opens": torch.tensor([_opens(text) for text in decoded]),
    }
    for name, shape in recall.shapes(config, width, len(embedding)):
        tensors.setdefault(name, torch.zeros(shape))
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} is {tuple(tensors[name].shape)}, not {shape}")
    return Weights(**tensors)


def _whitening(rows: Tensor, width: int, floor: float | None) -> Tensor:
    """Return [width, D], the main directions of centred rows [n, D] scaled to unit variance."""
    found, directions = torch.linalg.eigh(rows.T @ rows / len(rows))
    found, directions = found.flip(0)[:width], directions.flip(1)[:, :width]
    least = floor if floor is not None else 0.1 * float(found.mean())
    scaled: Tensor = directions / (found.clamp(min=0) + least).sqrt()
    return scaled.T.contiguous()


def _spaced(decoded: Sequence[str], vocabulary: int) -> Tensor:
    by_text = {text: id for id, text in reversed(list(enumerate(decoded)))}
    found = list(range(vocabulary))
    for id, text in enumerate(decoded):
        if text[:1].isalpha():
            found[id] = by_text.get(" " + text, id)
    return torch.tensor(found, dtype=torch.int32)


def _opens(text: str) -> bool:
    """Tell whether a word after this text begins a message, a line or a quotation."""
    return not text or text[-1] in "\n\"'([*_" or text[-1] in "\u201c\u2018"


def written_ids(weights: Weights, tokens: Tensor) -> Tensor:
    """Return what each of many tokens in a row is written as."""
    before = torch.cat([tokens[:1], tokens[:-1]])
    return recall.written(weights, before, tokens)


class Losses(NamedTuple):
    """What a batch lacks, in nats; and of its answers, how many values were the best token."""

    answers: Tensor
    gate: Tensor
    known: Tensor
    copied: float  # share of known values whose tokens are all right, among the batch's tokens

    @property
    def total(self) -> Tensor:
        return self.answers + 4.0 * self.gate + 0.25 * self.known


def losses(
    config: RecallConfig,
    weights: Weights,
    batch: Drawn,
    embedding: Tensor,
    twins: Tensor,
    chance: torch.Generator,
    noise: float = 0.0,
    dropout: float = 0.0,
) -> Losses:
    """Return the losses of a batch.

    Args:
        config: of the layer.
        weights: of the layer, those to learn with gradients.
        batch: some sessions.
        embedding: of the base, [V, width], float32; the head as well.
        twins: of every token, those most like it (`twins`), [V, k].
        chance: of the noise and of the other tokens.
        noise: on features.
        dropout: share of the whitened directions that are hidden.
    """
    noisy = _noise(config, chance, noise, dropout)
    batch = batch._replace(
        heard=_some(batch.valid, chance, 2.0 * dropout),
        around_valid=_some(batch.around_valid, chance, 2.0 * dropout),
    )
    matrix, gate = remember(config, weights, batch, embedding, noisy)
    judged = batch.stated & batch.valid
    labels = batch.told.float()
    gate_loss = F.binary_cross_entropy_with_logits(
        gate[judged], labels[judged], pos_weight=torch.tensor(MISSED, device=gate.device)
    )

    context = config.behind + config.ahead
    around = noisy(batch.around)
    own = around[:, context - 1 :]
    with _fast(around):
        found = recall.read(
            weights,
            matrix.index_select(0, batch.session),
            own,
            F.linear(around, weights.context),
            batch.around_valid,
        )
    vocabulary = _vocabulary(batch, twins, len(embedding), chance)
    with _fast(around):
        codes = recall.values(weights, embedding[vocabulary])
        alike = (found.read[batch.look != NOTHING] @ codes.T).float()
    value = batch.look == VALUE
    copying = value[batch.look != NOTHING]
    target = torch.searchsorted(vocabulary, batch.target[value])
    ours = alike[copying]
    # what was told should be read clearly, and not whatever is read; what was not, not at all
    clear = torch.cat([ours.gather(1, target[:, None])[:, 0], alike[~copying].amax(-1)])
    known_loss = F.binary_cross_entropy_with_logits(
        CLEARLY * (clear - KNOWN), _first(len(ours), len(clear), clear).float()
    )
    with _fast(around):
        logits = batch.hidden[value] @ embedding[vocabulary].T
    logits = recall.recalled(weights, logits.float(), ours)
    answers = F.cross_entropy(logits, target)

    with torch.no_grad():
        wrong = torch.zeros_like(value)
        wrong[value] = logits.argmax(-1) != target
        wrong[:, 0] = False  # there it is asked whether memory knows, and nothing is said
        known = batch.known
        copied = float((~wrong.any(1))[known].float().mean()) if bool(known.any()) else math.nan

    return Losses(answers, gate_loss, known_loss, copied)


class Met(NamedTuple):
    """What pairs lack, in nats."""

    match: Tensor
    crowd: Tensor  # mean squared cosine of keys, and of queries and keys, that are of two facts
    gate: Tensor
    sense: Tensor
    found: float  # share of questions that are more like their own fact than like any other


def meet(
    config: RecallConfig,
    weights: Weights,
    pairs: Pairs,
    chance: torch.Generator,
    noise: float = 0.0,
    dropout: float = 0.0,
) -> Met:
    """Return how hard it is to tell, by a question's query, which of all facts it asks for.

    InfoNCE (arXiv 1807.03748), both ways: what memory recalls is a sum over all keys, and a query
    has to be near to its own only; nor may it be near to what is no fact, or a key to a query where
    nothing is asked. What each write takes from every other fact is charged as well (`crowd`).

    Args:
        config: of the layer.
        weights: of the layer, those to learn with gradients.
        pairs: facts as they are told and asked for.
        chance: of the noise.
        noise: on features.
        dropout: share of the whitened directions that are hidden.
    """
    noisy = _noise(config, chance, noise, dropout)
    written = noisy(torch.cat([pairs.told, pairs.other])).bfloat16()
    heard = _some(torch.cat([pairs.told_valid, pairs.other_valid]), chance, 2.0 * dropout)
    asked = noisy(torch.cat([pairs.asked, pairs.silent])).bfloat16()
    valid = _some(torch.cat([pairs.asked_valid, pairs.silent_valid]), chance, 2.0 * dropout)
    with _fast(written):
        judged = recall.judged(weights, config, written, F.linear(written, weights.context), heard)
        keys = unit(F.linear(judged.both[:, 0], weights.write_key))
        nothing = keys.new_zeros(1, config.values, config.keys)
        around = F.linear(asked, weights.context)
        found = recall.read(weights, nothing, asked[:, -1:], around, valid)
    count = len(pairs.told)
    keys, queries = keys.float(), found.query[:, 0].float()
    alike = queries @ keys.T
    likeness = alike / TEMPERATURE
    own = torch.arange(count, device=keys.device)
    match = F.cross_entropy(likeness[:count], own) + F.cross_entropy(likeness[:, :count].T, own)
    crowd = _crowd(alike) + _crowd(keys @ keys.T)
    sensed = torch.cat([pairs.begins, pairs.starts])
    about = _first(count, len(asked), keys)
    return Met(
        match / 2,
        crowd / 2,
        F.binary_cross_entropy_with_logits(
            judged.gate[:, 0].float(), _first(count, len(keys), keys).float()
        ),
        F.binary_cross_entropy_with_logits(found.asks[sensed, 0].float(), about[sensed].float()),
        float((likeness[:count].argmax(1) == own).float().mean()),
    )


def _crowd(alike: Tensor) -> Tensor:
    """Return the mean square of what is beside the diagonal."""
    beside = alike.square().sum() - alike.diagonal().square().sum()
    return beside / (alike.numel() - min(alike.shape))


def _first(count: int, of: int, like: Tensor) -> Tensor:
    """Return which of some are the first `count`."""
    return torch.arange(of, device=like.device) < count


def _noise(config: RecallConfig, chance: torch.Generator, noise: float, dropout: float) -> Noise:
    """Return what hides the same share of directions in all features, and adds noise to them."""
    device = chance.device
    kept = torch.rand(config.whitened, generator=chance, device=device) >= dropout
    kept = kept / (1.0 - dropout)

    def noisy(x: Tensor) -> Tensor:
        drawn = torch.randn(x.shape, generator=chance, device=device)
        found: Tensor = drawn.mul_(noise).addcmul_(x.float(), kept)
        return found

    return noisy


def _some(valid: Tensor, chance: torch.Generator, share: float) -> Tensor:
    """Return a context in which words are missing, so that no single one decides."""
    return valid & (torch.rand(valid.shape, generator=chance, device=valid.device) >= share)


def _fast(where: Tensor) -> torch.autocast:
    """Let large products be computed in bfloat16, as a server does with the base."""
    return torch.autocast(where.device.type, dtype=torch.bfloat16)


def remember(
    config: RecallConfig,
    weights: Weights,
    batch: Drawn,
    embedding: Tensor,
    noisy: Noise = lambda x: x,
) -> tuple[Tensor, Tensor]:
    """Return the sessions' memories [B, R, N], and the gates of their tokens [B, T]."""
    tokens = batch.seen.shape[1] - config.ahead
    recent = F.pad(noisy(batch.seen), (0, 0, config.behind, 0))
    valid = F.pad(batch.heard, (config.behind, 0))
    names = batch.tokens[:, :tokens]
    with _fast(recent):
        found = recall.judged(weights, config, recent, F.linear(recent, weights.context), valid)
    said = (batch.stated & batch.valid)[:, :tokens]
    rate = torch.where(said, found.rate, 0.0).float()
    # what is not written at all need not be solved for
    count = max(int((rate > 0).sum(1).max()), 1)
    order = (rate > 0).int().sort(dim=1, descending=True, stable=True).indices[:, :count]
    rows = torch.arange(len(rate), device=rate.device)[:, None]
    both, names = found.both.float(), names[rows, order]
    chosen = recall.writes(weights, both[rows, order], rate[rows, order], embedding[names])
    start = both.new_zeros(len(rate), config.values, config.keys)
    gate = F.pad(found.gate.float(), (0, config.ahead))
    return recall.store(weights, start, chosen), gate


def _vocabulary(batch: Drawn, twins: Tensor, size: int, chance: torch.Generator) -> Tensor:
    """Return the tokens that answers choose from, [v], sorted.

    They are all that was told, what is asked for, those that look like it, what the base would
    rather say, and others.
    """
    asked = batch.look == VALUE
    targets = batch.target[asked].unique()
    others = torch.randint(size, (OTHERS,), generator=chance, device=chance.device)
    parts = (targets, twins[targets].flatten(), batch.rivals[asked].flatten(), others)
    every: Tensor = torch.cat((*parts, batch.tokens[batch.told])).unique()
    return every


@torch.no_grad()
def twins(embedding: Tensor, count: int = 4) -> Tensor:
    """Return the tokens whose embeddings are most like each token's, [V, count]."""
    unit_rows = F.normalize(embedding - embedding.mean(0), dim=-1).bfloat16()
    rows = [
        (unit_rows[at : at + 1024] @ unit_rows.T).float().topk(count + 1).indices[:, 1:]
        for at in range(0, len(embedding), 1024)
    ]
    return torch.cat(rows)


@torch.no_grad()
def rivals(hidden: Tensor, embedding: Tensor, count: int = 4) -> Tensor:
    """Return the tokens that a base likes best after each of its hidden states, [r, count]."""
    head = embedding.bfloat16().T
    rows = [
        (hidden[at : at + 1024].bfloat16() @ head).float().topk(count).indices
        for at in range(0, len(hidden), 1024)
    ]
    return torch.cat(rows) if rows else torch.zeros(0, count, dtype=torch.int64)


# --- the run ----------------------------------------------------------------------------------


class Step(NamedTuple):
    """What a step saw."""

    met: float  # share of questions that are most like their own fact, among all of the step's
    copied: float  # share of known values of which every token was the best; nan without sessions
    norm: float  # of the gradient


def begin(weights: Weights, recipe: Recipe) -> Progress:
    """Return a run before its first step."""
    params = {n: t for n, t in weights._asdict().items() if n not in FIXED}
    return Progress(0, params, _rule().init(params), np.random.default_rng(recipe.seed))


def advance(
    config: RecallConfig,
    recipe: Recipe,
    fixed: Weights,
    progress: Progress,
    pool: Pool,
    embedding: Tensor,
    near: Tensor,
) -> tuple[Progress, Step]:
    """Take one step; `near` are `twins` of the embedding."""
    chance = deepcopy(progress.chance)  # a step that is broken off has drawn nothing
    alone = progress.step < recipe.meeting
    pairs = pool.pairs(chance, (PAIRS if alone else FEWER) * recipe.sessions)
    batch = None if alone else pool.draw(chance, recipe.sessions, recipe.stage(progress.step))
    draws = torch.Generator(embedding.device).manual_seed(int(chance.integers(2**31)))
    params = {name: p.detach().requires_grad_() for name, p in progress.params.items()}
    weights = fixed._replace(**params, gain=torch.ones_like(fixed.gain))
    met = meet(config, weights, pairs, draws, recipe.noise, recipe.dropout)
    copied = math.nan
    if batch is None:
        total = met.match + WRITES * met.crowd + met.gate + met.sense
    else:
        found = losses(config, weights, batch, embedding, near, draws, recipe.noise, recipe.dropout)
        total = found.total + BESIDE * (met.match + WRITES * met.crowd) + 0.3 * met.sense
        copied = found.copied
    gradients = torch.autograd.grad(
        total, list(params.values()), allow_unused=True, materialize_grads=True
    )
    clipped, norm = optimisers.clip_by_norm(dict(zip(params, gradients, strict=True)), recipe.clip)
    if not math.isfinite(float(norm)):
        raise ValueError(f"the gradient at step {progress.step} is not finite; lower --rate")
    with torch.no_grad():
        moved, moments = _rule().update(
            clipped, progress.moments, progress.params,
            rate=recipe.at(progress.step) * recipe.rate,
        )  # fmt: skip
        after = optimisers.apply(progress.params, moved)
    then = Progress(progress.step + 1, after, moments, chance)
    return then, Step(met.found, copied, float(norm))


def _rule() -> optimisers.Optimiser:
    return optimisers.named("adamw", decay=0.0, square_retain=0.98)


def trained(fixed: Weights, progress: Progress) -> Weights:
    """Return the layer as a run has it, switched on."""
    return fixed._replace(**progress.params, gain=torch.ones_like(fixed.gain))


def save(
    file: Path, config: RecallConfig, recipe: Recipe, fixed: Weights, progress: Progress
) -> None:
    """Write a run to one file, at once."""
    tensors = {f"layer/{n}": t for n, t in fixed._replace(**progress.params)._asdict().items()}
    tensors |= {f"moments/{n}": t for n, t in optimisers.flatten(progress.moments).items()}
    about = {
        "config": json.dumps(asdict(config)),
        "recipe": json.dumps(asdict(recipe)),
        "step": str(progress.step),
        "chance": json.dumps(progress.chance.bit_generator.state),
    }
    draft = file.with_suffix(".draft")
    save_file({name: t.contiguous() for name, t in tensors.items()}, draft, about)
    os.replace(draft, file)


def load(
    file: Path, device: torch.device | None = None
) -> tuple[RecallConfig, Recipe, Weights, Progress]:
    """Read what `save` wrote, onto a device; onto the CPU where None.

    Raises:
        ValueError: the file is no run.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            about: dict[str, str] = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name).to(device) for name in opened.keys()}  # noqa: SIM118
        config = RecallConfig.from_json(json.loads(about["config"]))
        recipe = Recipe(**json.loads(about["recipe"]))
        layer = Weights(**{name: tensors[f"layer/{name}"] for name in Weights._fields})
        chance = np.random.default_rng()
        chance.bit_generator.state = json.loads(about["chance"])
        moments = optimisers.restore(
            {n.removeprefix("moments/"): t for n, t in tensors.items() if n.startswith("moments/")}
        )
        step = int(about["step"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a run of hope train memory: {error}") from error
    params = {n: t for n, t in layer._asdict().items() if n not in FIXED}
    return config, recipe, layer, Progress(step, params, moments, chance)
