"""The memory layer of a pre-trained model: what the user said of himself, and where it is read.

It stands beside a frozen base. What blocks in the middle of it make of a token is whitened; a
token of the user's that states something is written, with all that was said around it for a key
and itself for a value, into one matrix a session by the gated delta rule (`ops/delta.py`):

    S_t = retain_t S_{t-1} (I - rate_t k_t k_t^T) + rate_t v_t k_t^T

A token is written once the next `ahead` are known: "I got sick from peanuts, that is my allergy"
says only at its end what the peanuts are. What is read is compared with the value of every token,
and added to the base's logits behind one outer scalar: at zero the base is what it was, bit for
bit.

Axes: B sessions, T tokens, W = behind + ahead tokens of context, F features, Z of them whitened,
A width of the local attention, N width of a key, R width of a value, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_runtime.config import RecallConfig
from hope_runtime.ops import delta
from hope_runtime.ops.collapsed import unit

NAME = "recall."  # what the names of its tensors begin with
CHUNK = 64  # tokens whose writes are solved for together
HIDDEN = -1e9  # of attention to what is not there; no row is all of it, and none becomes NaN
NOTHING = -1  # the token where there is none
CROWDING = 1 / 3  # what was never told is read louder by this power of what is held
LEAST = 0.05  # of a token, that counts as written: less is what others leave there
LOUD = 2.0  # times as loud as trained, amid noise, an answer is said: the base has half the say


class Weights(NamedTuple):
    """What training learned of the layer, shared by all sessions; numbers in float32."""

    mean: Tensor  # [F]
    scale: Tensor  # [F]
    basis: Tensor  # [Z - E, F]: whitens what the blocks made of a token
    token_mean: Tensor  # [width]
    token_basis: Tensor  # [E, width]: whitens its own embedding
    context: Tensor  # [2A, Z]: keys and values of the local attention
    writer: Tensor  # [A, Z]: its queries, where a token is written
    reader: Tensor  # [A, Z]: and where memory is read
    writer_bias: Tensor  # [heads, W + 1]: by distance, from `behind` back to `ahead` on
    reader_bias: Tensor  # [heads, W]: from W - 1 back to the token itself
    write_key: Tensor  # [N, Z + A]
    read_key: Tensor  # [N, Z + A]
    value: Tensor  # [R, width]
    gate: Tensor  # [G, 2Z + A]: does the token state something?
    gate_bias: Tensor  # [G]
    gate_out: Tensor  # [1, G]
    rate_bias: Tensor  # [1]
    fading: Tensor  # [1]: what writing takes from the rest, before softplus
    sense: Tensor  # [M, Z + A]: is the user asking for something about himself?
    sense_bias: Tensor  # [M]
    sense_out: Tensor  # [1, M]
    sense_out_bias: Tensor  # [1]
    strength: Tensor  # []: the logarithm of the logits for a read that is exactly a token's value
    gain: Tensor  # []: the outer scalar
    spaced: Tensor  # [V] int32: the token that says the same after a space
    opens: Tensor  # [V] bool: a word that follows this token has no space before it


def shapes(
    config: RecallConfig, width: int, vocabulary: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor of `Weights`, for a base of this width."""
    z, around, behind = config.whitened, config.attention, config.behind + config.ahead
    features, keys, values = 2 * width, config.keys, config.values
    gate, hidden, heads = config.gate, config.hidden, config.heads
    yield "mean", (features,)
    yield "scale", (features,)
    yield "basis", (z - config.own, features)
    yield "token_mean", (width,)
    yield "token_basis", (config.own, width)
    yield "context", (2 * around, z)
    yield "writer", (around, z)
    yield "reader", (around, z)
    yield "writer_bias", (heads, behind + 1)
    yield "reader_bias", (heads, behind)
    yield "write_key", (keys, z + around)
    yield "read_key", (keys, z + around)
    yield "value", (values, width)
    yield "gate", (gate, 2 * z + around)
    yield "gate_bias", (gate,)
    yield "gate_out", (1, gate)
    yield "rate_bias", (1,)
    yield "fading", (1,)
    yield "sense", (hidden, z + around)
    yield "sense_bias", (hidden,)
    yield "sense_out", (1, hidden)
    yield "sense_out_bias", (1,)
    yield "strength", ()
    yield "gain", ()
    yield "spaced", (vocabulary,)
    yield "opens", (vocabulary,)


class Facts(NamedTuple):
    """What sessions hold: the memory, and the last W tokens, which are still to be seen."""

    matrix: Tensor  # [B, R, N]
    recent: Tensor  # [B, W, Z]
    around: Tensor  # [B, W, 2A], `context` of `recent`
    tokens: Tensor  # [B, W] int64; NOTHING before a session's first
    stated: Tensor  # [B, W] bool: said by someone who is learned from

    def session(self, row: int) -> Facts:
        """Return one session of a batch as a batch of one; a copy."""
        return Facts(*(t[row : row + 1].clone() for t in self))


class Found(NamedTuple):
    """What a token's read found; all [B, T, ...]."""

    read: Tensor  # [R], S q
    query: Tensor  # [N], q
    asks: Tensor  # a logit: the user is asking for something about himself


def empty(sessions: int, config: RecallConfig, like: Tensor) -> Facts:
    """Return what sessions hold that have read nothing, on the device of `like`."""
    context = config.behind + config.ahead
    exact = torch.float32

    def zeros(*shape: int, dtype: torch.dtype = exact) -> Tensor:
        return torch.zeros(sessions, *shape, dtype=dtype, device=like.device)

    return Facts(
        matrix=zeros(config.values, config.keys),
        recent=zeros(context, config.whitened),
        around=zeros(context, 2 * config.attention),
        tokens=zeros(context, dtype=torch.int64) + NOTHING,
        stated=zeros(context, dtype=torch.bool),
    )


def whitened(weights: Weights, features: Tensor, embedded: Tensor) -> Tensor:
    """Return [..., Z] for what two blocks made of tokens, [..., F], and their embeddings."""
    seen = ((features.float() - weights.mean) / weights.scale).clamp(-5.0, 5.0)
    own = F.linear(embedded.float() - weights.token_mean, weights.token_basis)
    return torch.cat([F.linear(seen, weights.basis), own], -1)


def written(weights: Weights, before: Tensor, ids: Tensor) -> Tensor:
    """Return the ids that tokens are written as: as within a sentence, where they begin a message.

    An answer needs the name with its space; "Rex is my dog" has it without.
    """
    return torch.where(weights.opens[before.clamp(min=0)], weights.spaced[ids].long(), ids)


def values(weights: Weights, embedded: Tensor) -> Tensor:
    """Return what is written for a token, [..., R], of length one."""
    return unit(F.linear(embedded.float() - weights.token_mean, weights.value))


def local(query: Tensor, context: Tensor, valid: Tensor, bias: Tensor) -> Tensor:
    """Let query i look at context i to i + L - 1.

    Args:
        query: [B, T, A].
        context: keys and values, [B, T + L - 1, 2A].
        valid: which of the context there is, [B, T + L - 1].
        bias: by head and place in the window, [heads, L].

    Returns:
        [B, T, A].
    """
    heads, window = bias.shape
    tokens = query.shape[1]
    block = min(CHUNK, tokens)
    blocks = -(-tokens // block)
    spare = blocks * block - tokens
    span = block + window - 1
    query = F.pad(query, (0, 0, 0, spare)).unflatten(1, (blocks, block)).unflatten(-1, (heads, -1))
    keys, held = (
        part.unflatten(-1, (heads, -1)) for part in F.pad(context, (0, 0, 0, spare)).chunk(2, -1)
    )
    keys, held = (part.unfold(1, span, block) for part in (keys, held))  # [B, n, heads, ., span]
    seen = F.pad(valid, (0, spare)).unfold(1, span, block)  # [B, n, span]
    place = (
        torch.arange(span, device=query.device) - torch.arange(block, device=query.device)[:, None]
    )
    near = (place >= 0) & (place < window)
    by_place = bias.index_select(1, place.clamp(0, window - 1).flatten()).unflatten(1, place.shape)
    offsets = torch.where(near, by_place, HIDDEN)  # [heads, block, span]
    scores = query.transpose(2, 3) @ keys / keys.shape[-2] ** 0.5 + offsets
    weight = torch.where(seen[:, :, None, None], scores, HIDDEN).softmax(-1)
    found: Tensor = (weight @ held.transpose(-1, -2)).transpose(2, 3).flatten(3).flatten(1, 2)
    return found[:, :tokens]


class Judged(NamedTuple):
    """What is known of tokens before they are written, [B, T, ...]."""

    both: Tensor  # [Z + A]: the token before, and what was said around: what keys are made of
    gate: Tensor  # a logit: the token states something
    rate: Tensor


class Written(NamedTuple):
    """What tokens write: keys [B, T, N], values [B, T, R], and how much, [B, T]."""

    keys: Tensor
    values: Tensor
    rate: Tensor


def judged(
    weights: Weights, config: RecallConfig, recent: Tensor, around: Tensor, valid: Tensor
) -> Judged:
    """Judge the tokens in the middle of a context: of W + T, those at `behind` to `behind` + T.

    Args:
        weights: of the layer.
        config: of the layer.
        recent: whitened tokens, [B, W + T, Z].
        around: `context` of them.
        valid: which of them there are, [B, W + T].
    """
    tokens = recent.shape[1] - config.behind - config.ahead
    own = recent[:, config.behind : config.behind + tokens]
    before = recent[:, config.behind - 1 : config.behind - 1 + tokens]
    seen = local(F.linear(own, weights.writer), around, valid, weights.writer_bias)
    hidden = F.silu(F.linear(torch.cat([own, before, seen], -1), weights.gate, weights.gate_bias))
    gate = (F.linear(hidden, weights.gate_out) + weights.rate_bias)[..., 0]
    rate = torch.sigmoid(gate)
    # below the floor nothing is written: idle chat does not even wear the memory down
    return Judged(torch.cat([before, seen], -1), gate, torch.where(rate < config.floor, 0.0, rate))


def writes(weights: Weights, both: Tensor, rate: Tensor, embedded: Tensor) -> Written:
    """Return what judged tokens write, whose embeddings are [B, T, width]."""
    keys = unit(F.linear(both, weights.write_key))
    return Written(keys, values(weights, embedded), rate)


def store(weights: Weights, matrix: Tensor, written: Written) -> Tensor:
    """Return the memory [B, R, N] after all writes, in order."""
    for start in range(0, written.rate.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        rate, keys = written.rate[:, part], written.keys[:, part]
        retain = (-F.softplus(weights.fading) * rate).exp()
        writes = rate[..., None] * written.values[:, part]
        _, matrix = delta.chunk(matrix, keys, keys, retain, retain * rate, writes)
    return matrix


def advance(
    weights: Weights,
    config: RecallConfig,
    held: Facts,
    features: Tensor,
    tokens: Tensor,
    stated: Tensor,
    embed: Callable[[Tensor], Tensor],
    lengths: Tensor | None = None,
) -> Facts:
    """Return what sessions hold after T more tokens.

    Args:
        weights: of the layer.
        config: of the layer.
        held: what they held.
        features: what the two blocks made of the tokens, [B, T, F].
        tokens: their ids, [B, T].
        stated: which may be written, [B, T]: said by someone who is learned from.
        embed: gives the embeddings of ids.
        lengths: how many of the T are each session's own, [B]; all where None.
    """
    count, context = tokens.shape[1], config.behind + config.ahead
    fresh = whitened(weights, features, embed(tokens))
    recent = torch.cat([held.recent, fresh], 1)
    around = torch.cat([held.around, F.linear(fresh, weights.context)], 1)
    ids = torch.cat([held.tokens, tokens], 1)
    said = torch.cat([held.stated, stated], 1)
    place = torch.arange(context + count, device=ids.device)
    own = context + (torch.full_like(ids[:, 0], count) if lengths is None else lengths)
    valid = (ids != NOTHING) & (place < own[:, None])
    at = slice(config.behind, config.behind + count)
    due = said[:, at] & (place[at] + config.ahead < own[:, None])
    matrix = held.matrix
    if bool(due.any()):
        ours = ids.clamp(min=0)
        names = written(weights, ids[:, config.behind - 1 : config.behind - 1 + count], ours[:, at])
        found = judged(weights, config, recent, around, valid)
        rate = torch.where(due, found.rate, 0.0)
        matrix = store(weights, matrix, writes(weights, found.both, rate, embed(names)))
    last = own[:, None] - context + place[:context]
    session = torch.arange(len(ids), device=ids.device)[:, None]
    return Facts(matrix, *(t[session, last] for t in (recent, around, ids, said)))


def read(weights: Weights, matrix: Tensor, own: Tensor, around: Tensor, valid: Tensor) -> Found:
    """Read the memory at T tokens.

    Args:
        weights: of the layer.
        matrix: the memory, [B, R, N].
        own: the tokens, whitened, [B, T, Z].
        around: `context` of them and of the W - 1 before the first, [B, T + W - 1, 2A].
        valid: which of these there are.
    """
    seen = local(F.linear(own, weights.reader), around, valid, weights.reader_bias)
    both = torch.cat([own, seen], -1)
    query = unit(F.linear(both, weights.read_key))
    sensed = F.linear(
        F.silu(F.linear(both, weights.sense, weights.sense_bias)),
        weights.sense_out,
        weights.sense_out_bias,
    )
    return Found(query @ matrix.mT, query, sensed[..., 0])


def likeness(read: Tensor, codes: Tensor) -> Tensor:
    """Return how like what was read, [..., R], is to the value of every token, [..., V].

    The value of one token alone, written at a rate of one, is like itself by 1. What was never told
    recalls a little of everything, which is like nothing.

    Args:
        read: S q, [..., R].
        codes: the tokens' `values`, [V, R].
    """
    return F.linear(read.to(codes.dtype), codes).float()


def familiar(alike: Tensor, matrix: Tensor, codes: Tensor) -> Tensor:
    """Return how likely it is that something was told for what was read, [...].

    That is how like it is to the likeliest token's value. It counts the less the more the memory
    holds: what was never told recalls a little of everything, which is more where more was told.
    And the less the more there is of that very token, |S^T v|: what was written often or for sure
    is read by any question, what was written once and weakly by its own only
    (docs/decisions/0025-known-amid-much.md).

    Args:
        alike: the `likeness` of what was read, [..., V].
        matrix: the memories that it was read from, S, [..., R, N].
        codes: the tokens' `values`, v, [V, R].
    """
    best, token = alike.max(-1)
    held = torch.linalg.matrix_norm(matrix).clamp(min=1.0)  # one token, written whole, or more
    written = (codes[token].to(matrix.dtype)[..., None, :] @ matrix)[..., 0, :].norm(dim=-1)
    found: Tensor = best / (held * written.clamp(min=LEAST)).pow(CROWDING)
    return found


def recalled(weights: Weights, logits: Tensor, alike: Tensor, loud: float = 1.0) -> Tensor:
    """Return logits, [..., V], with what was read, by its `likeness` to every token.

    `loud`: how many times as loud as was trained.
    """
    return logits + loud * weights.gain * weights.strength.exp() * alike


def last(weights: Weights, held: Facts) -> Found:
    """Read the memory at each session's last token; [B, 1, ...]."""
    return read(weights, held.matrix, held.recent[:, -1:], held.around, held.tokens != NOTHING)
