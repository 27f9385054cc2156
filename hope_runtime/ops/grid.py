"""The grid of chunks that a stream lies on, whatever the calls that it comes in.

Boundaries are absolute: a session that is `phase` tokens into its chunk when a call begins meets
the next one after `chunk - phase` tokens, and nothing happens where the call itself ends.

Axes: B sessions, H heads, T tokens, N head width, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

State = TypeVar("State")
Part = Callable[[State, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, State]]


def walk(
    part: Part[State],
    state: State,
    x: Tensor,
    q: Tensor,
    phase: Tensor,
    chunk: int,
    lengths: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Cut a call at the boundaries of its chunks and pass one part after the other.

    Args:
        part: takes the state, x and q [B, H, C, N] of tokens of one chunk, which of them are
            each session's own [B, 1, C] (the others must leave the state alone), and whose
            chunk ends with them [B]; returns y [B, H, C, N] and the state.
        state: the sessions' states.
        x: [B, H, T, N], at least one token.
        q: [B, H, T, N].
        phase: tokens that each session is into its chunk, [B], 0 <= phase < chunk.
        chunk: tokens of a chunk.
        lengths: how many of the T tokens are each session's own, [B]; all where None.

    Returns:
        y [B, H, T, N], and the states after each session's own tokens.
    """
    tokens = x.shape[-2]
    own = torch.full_like(phase, tokens) if lengths is None else lengths
    aligned = bool((phase == phase[0]).all())
    first = int(phase.min())
    end = max(int((phase + own).max()), first + 1)
    place = None
    if not aligned:  # lay every session out on the grid of its chunks
        place = (torch.arange(first, end, device=x.device) - phase[:, None]).clamp(0, tokens - 1)
        x, q = taken(x, place), taken(q, place)
    found = []
    for start, stop in pieces(first, end, chunk):
        here = slice(start - first, stop - first)
        where = torch.arange(start, stop, device=x.device) - phase[:, None]
        valid = ((where >= 0) & (where < own[:, None]))[:, None]
        boundary = -(-stop // chunk) * chunk
        y, state = part(state, x[:, :, here], q[:, :, here], valid, phase + own >= boundary)
        found.append(y)
    y = torch.cat(found, -2)
    steps = torch.arange(tokens, device=x.device) + (phase - first)[:, None]
    if place is not None or end - first < tokens:
        y = taken(y, steps.clamp(max=end - first - 1))
    return y, state


def pieces(first: int, end: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Cut [first, end) at the multiples of `chunk`.

    >>> list(pieces(3, 10, 4))
    [(3, 4), (4, 8), (8, 10)]
    """
    while first < end:
        stop = min((first // chunk + 1) * chunk, end)
        yield first, stop
        first = stop


def taken(x: Tensor, places: Tensor) -> Tensor:
    """Return x [B, H, T, N] at each session's own `places` [B, P]: [B, H, P, N]."""
    index = places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1])
    return x.gather(2, index)
