"""Puts the pieces together; the only place where exceptions become answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

import torch
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from hope_runtime.config import ConfigError, HopeConfig
from hope_runtime.engine import Engine
from hope_runtime.model import Hope
from hope_runtime.storage import Storage
from hope_runtime.tokenizer import Tokenizer
from memory_store import MemoryStore, StoreError
from server import socket
from server.connection import invalid
from server.errors import ApiError, answer
from server.measured import MeasuredStore
from server.metrics import Metrics
from server.residency import Residency
from server.routes import chat, operations, responses, sessions
from server.security import BodyLimit, BodyLimits, Gate, Guard
from server.service import Card, Service
from server.sessions import Sessions
from server.settings import Settings
from server.tenure import Tenures
from server.turns import WHY_NOT_DURABLE, Limits, Turns, can_wait
from server.worker import Worker

log = logging.getLogger(__name__)

PATIENCE = 2.0  # seconds to wait for another server to let go of a session
WATCH_S = 10.0


@asynccontextmanager
async def serving(
    settings: Settings,
    card: Card,
    model: Hope,
    tokenizer: Tokenizer,
    engine: Engine,
    store: MemoryStore,
) -> AsyncIterator[FastAPI]:
    """Run the device thread and yield the application; wind both down on leaving.

    The caller owns the store. Raises StoreError when it does not answer.
    """
    metrics = Metrics(model.config)
    measured = MeasuredStore(store, metrics)
    promised = await measured.durability()
    if settings.wait == "durable" and not can_wait(promised):
        raise ConfigError(f"--wait durable: {WHY_NOT_DURABLE.format(promised)}")
    residency = Residency(
        measured,
        model.config,
        model.dtype,
        card.fingerprint,
        budget=settings.host_memory_mib << 20,
        storage=_storage(settings, model.config),
        evicted=metrics.evicted,
        regressed=metrics.regressed,
    )
    tenures = Tenures(
        measured,
        metrics,
        owner=settings.owner,
        seconds=settings.lease_seconds,
        patience=min(PATIENCE, settings.lease_seconds),
    )
    metrics.describe(version("hope-server"), torch.__version__, card.fingerprint)
    metrics.watch(engine, residency, weights=model.bytes)
    async with Worker(engine, metrics.observe) as worker:
        turns = Turns(
            worker,
            measured,
            residency,
            tenures,
            tokenizer,
            metrics,
            limits=Limits(settings.max_input_tokens, settings.turns_waiting),
            learning=settings.learning,
            promised=lambda: measured.promised,
        )
        sessions = Sessions(measured, residency, turns)
        gate = Gate(settings.api_keys, settings.origins)
        service = Service(settings, card, gate, measured, residency, turns, metrics, sessions)
        watch = asyncio.create_task(_watch(measured), name="store-watch")
        try:
            yield create_app(service)
        finally:
            watch.cancel()
            await turns.drain(settings.shutdown_timeout)


def _storage(settings: Settings, config: HopeConfig) -> Storage:
    try:
        return Storage.parse(settings.storage, [level.name for level in config.levels])
    except ValueError as error:
        raise ConfigError(f"--{error}") from None


async def _watch(store: MeasuredStore) -> None:
    """Go on reading what the store promises: its settings may change while we serve."""
    while True:
        await asyncio.sleep(WATCH_S)
        try:
            await store.durability()
        except StoreError as error:
            log.warning("the store does not tell what it promises: %s", error)


def create_app(service: Service) -> FastAPI:
    """Return the application over a service that runs."""
    app = FastAPI(title="HOPE Server", version=version("hope-server"))
    app.state.service = service
    for part in (responses, chat, sessions, operations, socket):
        app.include_router(part.router)
    app.add_middleware(BodyLimit, limits=BodyLimits.of(service.settings))
    app.add_middleware(Guard, gate=service.gate, refused=service.metrics.refused)

    async def refuse(_: Request, error: Exception) -> Response:
        said = answer(error)
        headers = {"Retry-After": f"{said.retry_after:.0f}"} if said.retry_after else None
        content = {"error": said.detail.model_dump()}
        return JSONResponse(content, status_code=said.status, headers=headers)

    for kind in (ApiError, StoreError, Exception):
        app.add_exception_handler(kind, refuse)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _unrouted)
    return app


def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        said = ApiError(400, "invalid_json", f"the body is not JSON: {first['ctx']['error']}")
    elif isinstance(first.get("input"), bytes):  # nobody has tried to read it as JSON
        message = "the body must be JSON, sent with `Content-Type: application/json`"
        said = ApiError(400, "invalid_json", message)
    else:
        said = invalid(error.errors())
    return JSONResponse({"error": said.detail.model_dump()}, status_code=said.status)


def _unrouted(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed", 413: "message_too_large"}
    code = codes.get(error.status_code, "invalid_request")
    said = ApiError(error.status_code, code, str(error.detail))
    return JSONResponse({"error": said.detail.model_dump()}, status_code=said.status)
