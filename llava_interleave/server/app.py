"""The routes. Each is a few lines over `Service`; the guard stands before all of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import FastAPI, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
)
from starlette.routing import Match, Route

from .. import __version__
from ..chat import Chatbot
from ..processing import Estimate
from . import docs_page, responses
from .api_errors import response, to_api_error
from .chat_completions import respond, respond_explained
from .metrics import PROMETHEUS, Metrics
from .middleware import DOCS, PAGE, ApiKeys, GuardMiddleware
from .requests import ChatRequest, ExplainRequest, PromptRequest, adapter_of
from .service import Service
from .settings import Settings
from .uploads import Files

T = TypeVar("T")
STATIC = Path(__file__).parent / "web"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; media-src blob:; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Shared(Protocol):
    """What the routes of refusals and of files share."""

    files: Files
    metrics: Metrics

    async def aside(self, work: Callable[[], T]) -> T: ...


def create_app(bot: Chatbot, settings: Settings) -> FastAPI:
    """The server as an ASGI application. `bot` belongs to it from here on, and reads what `settings.limits` allow.

    Its threads start and end with the application's lifespan; `app.state.service` is what the routes share.
    """
    service = Service(bot, settings)
    keys = None if settings.api_keys is None else ApiKeys.read(settings.api_keys)
    app = application(service)
    app.add_middleware(GuardMiddleware, settings=settings, keys=keys, metrics=service.metrics)
    return app


def application(service: Service) -> FastAPI:
    """The routes, with nothing before them: a guard has to be added."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        try:
            yield
        finally:
            service.close()

    # The usual pages of documentation load scripts from a foreign host: /docs is our own.
    app = FastAPI(
        title="LLaVA-Interleave",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=responses.REFUSED,
    )
    app.state.service = service
    for routes in (refusal_routes, _pages, _state, _models, _answers, file_routes):
        routes(app, service)
    return app


def refusal_routes(app: FastAPI, service: Shared) -> None:
    """What FastAPI itself refuses, in our form."""

    @app.exception_handler(HTTPException)
    @app.exception_handler(RequestValidationError)
    async def refused(request: Request, error: Exception) -> JSONResponse:
        told = response(service.metrics.refused(to_api_error(error)))
        if told.status_code == 405:
            there = [
                route
                for route in app.routes
                if isinstance(route, Route) and route.matches(request.scope)[0] != Match.NONE
            ]
            told.headers["Allow"] = ", ".join(
                sorted({method for route in there for method in route.methods or ()})
            )
        return told


def _pages(app: FastAPI, _: Service) -> None:
    for path, name in PAGE.items():
        app.add_api_route(path, _page(name), include_in_schema=False)

    written = functools.cache(lambda: docs_page.reference(app.openapi()))

    @app.get(DOCS, include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(written(), headers=PAGE_HEADERS | docs_page.HEADERS)


def _state(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=responses.State)
    async def health() -> JSONResponse:
        """Whether the process is worth keeping: 503 once the engine has given up."""
        failed = service.worker.failed
        return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    @app.get("/ready", response_model=responses.State)
    async def ready() -> dict[str, str]:
        """Whether another request would be taken now: 503 while the queue is full, and during a shutdown."""
        if service.trouble:
            raise service.trouble
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.metrics.text(), media_type=PROMETHEUS)


def _models(app: FastAPI, service: Service) -> None:
    bot = service.bot

    def model(adapter: str | None) -> dict[str, Any]:
        return {
            "id": adapter or service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "llava-interleave",
            "parent": adapter and service.name,
            "context_length": bot.model.config.text.context,
            "tokens_per_image": bot.model.config.vision.grid**2,
            "video_frames": bot.processor.num_frames,
        }

    @app.get("/v1/models", response_model=responses.Models)
    async def models() -> dict[str, Any]:
        """The model that is served and its adapters, with the context and what an image takes of it."""
        return {"object": "list", "data": [model(adapter) for adapter in (None, *bot.adapters)]}

    @app.get("/v1/models/{name:path}", response_model=responses.ModelInfo)
    async def one_model(name: str) -> dict[str, Any]:
        """The model or an adapter by its name."""
        return model(adapter_of(name, service.name, bot.adapters))


def _answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", responses=responses.ANSWERS)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """Answer messages with images, videos and views; with `stream` a piece at a time."""
        return respond(service, asked, request.state.key)

    @app.post("/v1/messages/count")
    async def count(asked: PromptRequest, request: Request) -> Estimate:
        """Tokens of each part, the context that is left and the memory needed, before anything is computed."""
        return await service.count(asked, request.state.key)

    @app.post("/v1/messages/explain", responses={200: {"model": responses.Explanation}})
    async def explain_answer(asked: ExplainRequest, request: Request) -> Response:
        """Which image an answer leaned on: shares, what its absence changes, maps of what was attended to."""
        return respond_explained(service, asked, request.state.key)


def file_routes(app: FastAPI, service: Shared) -> None:
    """Uploads."""

    @app.post("/v1/files", response_model=responses.File)
    async def upload(
        file: UploadFile, purpose: Annotated[str, Form()], request: Request
    ) -> dict[str, Any]:
        """Keep an image or a video for several questions, which name it by its id."""
        data, key = await file.read(), request.state.key
        return await service.aside(
            lambda: service.files.put(key, data, file.filename or "", purpose)
        )

    @app.get("/v1/files", response_model=responses.Files)
    async def files(request: Request) -> dict[str, Any]:
        """The files of this API key."""
        return {"object": "list", "data": service.files.list(request.state.key), "has_more": False}

    @app.get("/v1/files/{name}", response_model=responses.File)
    async def one_file(name: str, request: Request) -> dict[str, Any]:
        """What is known of a file."""
        return service.files.get(request.state.key, name).told(name)

    @app.delete("/v1/files/{name}", response_model=responses.Deleted)
    async def delete(name: str, request: Request) -> dict[str, Any]:
        """Forget a file."""
        service.files.delete(request.state.key, name)
        return {"id": name, "object": "file", "deleted": True}


def _page(name: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return FileResponse(STATIC / name, headers=PAGE_HEADERS)

    return page
