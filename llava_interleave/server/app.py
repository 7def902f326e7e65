"""The routes. Each is a few lines over `Service`; the middleware comes before all of them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

from fastapi import FastAPI, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Match, Route

from .. import __version__
from ..chat import Chatbot
from ..errors import Unsupported
from ..processing import Estimate
from . import openai_types as openai
from .api_errors import ApiError, error_response, to_api_error
from .api_keys import ApiKeys
from .chat_completions import respond, respond_attribution, respond_prefill
from .metrics import PROMETHEUS, Metrics
from .middleware import GuardMiddleware
from .models import ModelSpec, ServedModels
from .service import Service
from .settings import MB, Settings
from .uploads import Files
from .web_files import WEB_FILES, WEB_HEADERS

T = TypeVar("T")
API_ROUTES = (
    "/v1/chat/completions",
    "/v1/files",
    "/v1/messages/attribution",
    "/v1/messages/count",
    "/v1/messages/prefill",
    "/v1/models",
)


class Shared(Protocol):
    """State of the routes that a gateway of replicas has, too."""

    files: Files
    metrics: Metrics

    async def run_in_pool(self, key: str, function: Callable[[], T]) -> T: ...


def create_app(bot: Chatbot | Mapping[str, ModelSpec], settings: Settings) -> FastAPI:
    """The server as an ASGI application of one model, or of several by name.

    It owns `bot`, and sets its limits to `settings.limits`.

    Its threads live as long as the application's lifespan. `app.state.service` is the state of its
    routes.
    """
    keys = None if settings.api_keys is None else ApiKeys.read(settings.api_keys)

    def is_exclusive() -> bool:
        return keys is None or len(keys.names) == 1

    service = (
        ServedModels(bot, settings, is_exclusive)
        if isinstance(bot, Mapping)
        else Service(bot, settings, is_exclusive)
    )
    app = create_routes(service)
    add_guard(app, settings, keys, service.metrics)
    return app


def add_guard(app: FastAPI, settings: Settings, keys: ApiKeys | None, metrics: Metrics) -> None:
    """Authentication, limits, access log and traces. Raises Unsupported without the extra otel."""
    tracing = None
    if settings.otlp_traces_endpoint is not None:
        try:
            from .tracing import Tracing
        except ModuleNotFoundError as error:
            raise Unsupported(
                f"{error.name} is missing: pip install 'llava-interleave[serve,otel]'"
            ) from error
        tracing = Tracing.to_endpoint(settings.otlp_traces_endpoint)
    app.state.keys, app.state.tracing = keys, tracing
    app.add_middleware(
        GuardMiddleware, settings=settings, keys=keys, metrics=metrics, tracing=tracing
    )


def create_routes(service: Service | ServedModels) -> FastAPI:
    """The routes without authentication and limits: a middleware has to be added."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.close()

    # FastAPI's /docs loads scripts from a foreign host, into the origin where the web UI has its
    # API key.
    app = FastAPI(
        title="LLaVA-Interleave",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=openai.ERROR_RESPONSES,
    )
    app.state.service = service
    add_error_handlers(app, service)
    for path, file in WEB_FILES.items():
        app.add_api_route(path, _web_file(file), include_in_schema=False)
    _add_state_routes(app, service)
    _add_model_routes(app, service)
    _add_message_routes(app, service)
    add_file_routes(app, service)
    return app


def add_error_handlers(app: FastAPI, service: Shared) -> None:
    """FastAPI's own errors in our form."""
    routes = [*API_ROUTES, "/health", "/ready", "/metrics", "/openapi.json"]

    @app.exception_handler(HTTPException)
    @app.exception_handler(RequestValidationError)
    async def handle(request: Request, error: Exception) -> Response:
        api_error = to_api_error(error)
        if isinstance(error, RequestValidationError) and _is_undecoded(error):
            kind = request.headers.get("content-type") or "missing"
            api_error = ApiError(
                415,
                "unsupported_media_type",
                f"the Content-Type is {kind[:100]}; send application/json",
            )
        if api_error.code == "not_found":
            api_error = ApiError(
                404,
                "not_found",
                f"no route {request.url.path[:200]}; the routes are {', '.join(routes)}",
            )
        response = error_response(service.metrics.count_error(api_error))
        if response.status_code == 405:
            methods = {
                method
                for route in app.routes
                if isinstance(route, Route) and route.matches(request.scope)[0] != Match.NONE
                for method in route.methods or ()
            }
            response.headers["Allow"] = ", ".join(sorted(methods))
        return response


def _is_undecoded(error: RequestValidationError) -> bool:
    """Whether the body was not read as JSON, for its Content-Type."""
    first = error.errors()[0]
    return first["loc"] == ("body",) and isinstance(first.get("input"), bytes)


def _web_file(file: Path) -> Callable[[], Awaitable[Response]]:
    async def web_file() -> Response:
        return FileResponse(file, headers=WEB_HEADERS)

    return web_file


def _add_state_routes(app: FastAPI, service: Service | ServedModels) -> None:
    @app.get("/health")
    async def health(response: Response) -> openai.Status:
        """Liveness: 503 once the engine has failed for good."""
        if service.failed:
            response.status_code = 503
            return openai.Status(status="failed")
        return openai.Status(status="ok")

    @app.get("/ready")
    async def ready() -> openai.Status:
        """Readiness: 503 while a further request would be refused."""
        if error := service.unavailable():
            raise error
        return openai.Status(status="ready")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics.text(), media_type=PROMETHEUS)


def _add_model_routes(app: FastAPI, service: Service | ServedModels) -> None:
    settings = service.settings
    limits = openai.ModelLimits(
        max_tokens=settings.max_tokens,
        n=settings.max_choices,
        body_bytes=settings.max_body_mb * MB,
        media=settings.max_media,
        media_bytes=settings.media_mb * MB,
        frames=settings.video_frames,
        pixels=settings.image_megapixels * MB,
        files_bytes=settings.files_mb * MB,
    )

    def infos() -> list[openai.ModelInfo]:
        return [
            openai.ModelInfo(
                **dict(card),
                created=service.created,
                max_model_len=card.context_length,
                limits=limits,
            )
            for card in service.cards()
        ]

    @app.get("/v1/models")
    async def models() -> openai.ModelList:
        """The models and adapters, with the context length and the tokens of an image."""
        return openai.ModelList(data=infos())

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> openai.ModelInfo:
        """A model or an adapter by name."""
        found = infos()
        for info in found:
            if info.id == name:
                return info
        raise openai.unknown_model(name, *(info.id for info in found))


def _add_message_routes(app: FastAPI, service: Service | ServedModels) -> None:
    @app.post("/v1/chat/completions", responses=openai.CHAT_RESPONSES)
    async def chat(body: openai.ChatRequest, request: Request) -> Response:
        """Answer messages with images, videos and views; with `stream` as server-sent events."""
        return respond(service, body, request.state.key)

    @app.post("/v1/messages/count")
    async def count(body: openai.PromptRequest, request: Request) -> Estimate:
        """Tokens of each part, context left and memory needed, without generating."""
        return await service.count(body, request.state.key)

    @app.post("/v1/messages/prefill", responses={200: {"model": openai.Prefill}})
    async def prefill(body: openai.PromptRequest, request: Request) -> Response:
        """Compute the beginning of a coming question, at lowest priority and without an answer."""
        return respond_prefill(service, body, request.state.key)

    @app.post("/v1/messages/attribution", responses={200: {"model": openai.AttributionResponse}})
    async def attribution(body: openai.AttributionRequest, request: Request) -> Response:
        """Which image an answer used: shares, leave-one-out changes, attention maps."""
        return respond_attribution(service, body, request.state.key)


def add_file_routes(app: FastAPI, service: Shared) -> None:
    """Uploads."""

    @app.post("/v1/files")
    async def upload(
        file: UploadFile, purpose: Annotated[str, Form()], request: Request
    ) -> openai.File:
        """Upload an image or a video; requests refer to it by its id."""
        data, key = await file.read(), request.state.key
        return await service.run_in_pool(
            key, lambda: service.files.put(key, data, file.filename or "", purpose)
        )

    @app.get("/v1/files")
    async def files(request: Request) -> openai.FileList:
        """The uploads of this API key."""
        return openai.FileList(data=service.files.list(request.state.key))

    @app.get("/v1/files/{name}")
    async def one_file(name: str, request: Request) -> openai.File:
        """An upload by its id."""
        return service.files.get(request.state.key, name).info(name)

    @app.delete("/v1/files/{name}")
    async def delete(name: str, request: Request) -> openai.FileDeleted:
        """Delete an upload."""
        service.files.delete(request.state.key, name)
        return openai.FileDeleted(id=name)
