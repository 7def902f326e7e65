"""The routes. Each is a few lines over `Service`; the guard stands before all of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, Response

from .. import __version__
from ..chatbot import Chatbot
from .chat import respond
from .guard import PAGE, Guard, Keys
from .refusals import explain, response
from .schema import ChatRequest, Question, check_model
from .service import Service
from .settings import Settings

STATIC = Path(__file__).parent / "static"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; media-src blob:; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def create_app(bot: Chatbot, settings: Settings) -> FastAPI:
    """The server as an ASGI application. `bot` belongs to it from here on, and reads what `settings.limits` allow.

    Its threads start and end with the application's lifespan; `app.state.service` is what the routes share.
    """
    service = Service(bot, settings)
    keys = None if settings.api_keys is None else Keys.read(settings.api_keys)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        try:
            yield
        finally:
            service.close()

    # The usual pages of documentation load scripts from a foreign host; /openapi.json is the whole of it.
    app = FastAPI(title="LLaVA-Interleave", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(Guard, settings=settings, keys=keys, metrics=service.metrics)

    @app.exception_handler(HTTPException)
    @app.exception_handler(RequestValidationError)
    async def refused(_: Request, error: Exception) -> JSONResponse:
        return response(service.metrics.refused(explain(error)))

    model = {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "llava-interleave",
        "context_length": bot.model.config.text.context,
        "tokens_per_image": bot.model.config.vision.grid**2,
        "video_frames": bot.processor.num_frames,
    }

    for path, name in PAGE.items():
        app.add_api_route(path, _page(name), include_in_schema=False)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether the process is worth keeping: 503 once the engine has given up."""
        failed = service.worker.failed
        return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Whether another request would be taken now: 503 while the queue is full, and during a shutdown."""
        if service.trouble:
            raise service.trouble
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served, with its context and what an image takes of it."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        """The model by its name."""
        check_model(name, service.name)
        return model

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """Answer messages with images, videos and views; with `stream` a piece at a time."""
        return respond(service, asked, request.state.key)

    @app.post("/v1/messages/count")
    async def count(asked: Question, request: Request) -> dict[str, Any]:
        """Tokens of each part, the context that is left and the memory needed, before anything is computed."""
        return dataclasses.asdict(await service.count(asked, request.state.key))

    @app.post("/v1/files")
    async def upload(file: UploadFile, purpose: Annotated[str, Form()], request: Request) -> dict[str, Any]:
        """Keep an image or a video for several questions, which name it by its id."""
        data, key = await file.read(), request.state.key
        return await service.aside(lambda: service.files.put(key, data, file.filename or "", purpose))

    @app.get("/v1/files")
    async def files(request: Request) -> dict[str, Any]:
        """The files of this API key."""
        return {"object": "list", "data": service.files.list(request.state.key), "has_more": False}

    @app.get("/v1/files/{name}")
    async def one_file(name: str, request: Request) -> dict[str, Any]:
        """What is known of a file."""
        return service.files.get(request.state.key, name).told(name)

    @app.delete("/v1/files/{name}")
    async def delete(name: str, request: Request) -> dict[str, Any]:
        """Forget a file."""
        service.files.delete(request.state.key, name)
        return {"id": name, "object": "file", "deleted": True}

    return app


def _page(name: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return FileResponse(STATIC / name, headers=PAGE_HEADERS)

    return page
