"""Health, metrics, models, and the web page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, JSONResponse

from memory_store import StoreError
from server import asks, wire
from server.errors import ApiError
from server.metrics import CONTENT_TYPE
from server.service import service

router = APIRouter()

PAGE = Path(__file__).parent.parent / "page"
# the page loads nothing from elsewhere, and nothing that a model says can become code
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/health/live")
async def live(request: Request) -> wire.Health:
    """The process answers."""
    return wire.Health(status="ok", model=service(request).card.name)


@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """Turns can be taken: the model is loaded and the store answers (else 503)."""
    served = service(request)
    if served.turns.draining:
        health = wire.Health(status="draining", model=served.card.name)
        return JSONResponse(health.model_dump(), status_code=503)
    try:
        found = await served.store.durability()
    except StoreError as error:
        health = wire.Health(status="store_unavailable", model=served.card.name, store=str(error))
        return JSONResponse(health.model_dump(), status_code=503)
    health = wire.Health(
        status="ok", model=served.card.name, durability=found.mode, store=found.engine
    )
    return JSONResponse(health.model_dump())


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(service(request).metrics.render(), media_type=CONTENT_TYPE)


@router.get("/v1/models")
async def models(request: Request) -> wire.ModelList:
    """The one model that is served."""
    return wire.ModelList(data=[_card(request)])


@router.get("/v1/models/{model:path}")
async def model(model: str, request: Request) -> wire.ModelCard:
    """One model by name."""
    asks.check_model(model, service(request).card.name)
    return _card(request)


def _card(request: Request) -> wire.ModelCard:
    card = service(request).card
    config = card.config
    attends, remembers = bool(config.attention_blocks), bool(config.memory_blocks)
    memory = asdict(config.memory) if remembers and config.memory else None
    return wire.ModelCard(
        id=card.name,
        created=card.loaded,
        fingerprint=card.fingerprint,
        window=config.window if attends else None,
        sinks=config.sinks if attends else None,
        memory=memory and {"blocks": config.memory_blocks, **memory},
        dtype=card.dtype,
        device=card.device,
        levels=[asdict(level) for level in config.levels],
    )


@router.get("/", include_in_schema=False)
async def page() -> Response:
    return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)


@router.get("/page/{name}", include_in_schema=False)
async def page_file(name: str) -> Response:
    file = PAGE / name
    if file.parent != PAGE or not file.is_file():
        raise ApiError(404, "not_found", f"the page has no file {name!r}")
    return FileResponse(file, headers=PAGE_HEADERS)
