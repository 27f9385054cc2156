"""Servers without a process, for what is done a hundred times: what tests of `server` use."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import safetensors.numpy
import torch

from hope_runtime.model import Hope
from hope_runtime.tokenizer import Role
from memory_store import RedisStore, SessionKey
from server.settings import LOCAL
from server.turn import Ended, Words
from tests.server.conftest import Builder, House

RATES = ((Role.USER, 1.0), (Role.ASSISTANT, 1.0))
EXACT = {"storage": "fp32"}


def builder(dtype: torch.dtype = torch.float32) -> Builder:
    """Return what opens houses whose model computes in this precision."""
    made = Builder()
    if dtype is not torch.float32:
        weights = made.checkpoint.weights
        made.model = Hope(made.config, weights, device=torch.device("cpu"), dtype=dtype)
    return made


@asynccontextmanager
async def redis(url: str, **options: Any) -> AsyncIterator[RedisStore]:
    store = await RedisStore.open(url, **options)
    try:
        yield store
    finally:
        await store.close()


async def say(house: House, session: str, text: str, most: int = 16, **asked: Any) -> Ended:
    """Have a turn that is learned from both sides, with all that follows."""
    return told(await house.turn(text, session, most, rates=RATES, **asked))[1]


def told(happenings: list[Any]) -> tuple[str, Ended]:
    """Return the reply and the end of a turn that is over."""
    [ended] = [each for each in happenings if isinstance(each, Ended)]
    return "".join(each.text for each in happenings if isinstance(each, Words)), ended


async def exported(house: House, session: str) -> bytes:
    """Return all of a session as the one file that a client gets."""
    async with house.client() as client:
        answer = await client.get(f"/v1/sessions/{session}/export")
        assert answer.status_code == 200, answer.text
        return answer.content


async def memory(house: House, session: str) -> tuple[dict[str, bytes], Any]:
    """Return what the session is to the model, to the bit: every tensor, and the facts."""
    try:
        tensors = safetensors.numpy.load(await exported(house, session))
        held = {name: each.tobytes() + str(each.shape).encode() for name, each in tensors.items()}
    except KeyError:  # numpy knows no bfloat16
        snapshot = await house.store.load(
            SessionKey(LOCAL, session), fingerprint=house.service.card.fingerprint
        )
        held = dict(snapshot.blobs)
    head = await house.head(session)
    return held, head.meta["state"]
