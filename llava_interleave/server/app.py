"""The routes. Each is a few lines over `Service`; the middleware comes before all of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import FastAPI, Form, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Match, Route

from .. import __version__
from ..chat import Chatbot
from ..errors import Unsupported
from ..processing import Estimate
from . import openai_types as openai
from .answer_stream import CancelOnDisconnect, respond, respond_json, send_events
from .api_errors import ApiError, error_response, to_api_error
from .api_keys import ApiKeys
from .batch_files import BatchFiles
from .batches import ENDPOINTS, Batches
from .chat_completions import ChatCompletionStream
from .completions import TextCompletionStream
from .live import LiveQuestion, LiveSessions
from .metrics import PROMETHEUS, Metrics
from .middleware import GuardMiddleware
from .models import ModelSpec, ServedModels
from .process import trim_heap_regularly
from .responses import ResponseStream
from .service import Service
from .settings import MB, Settings
from .tables import TableStream, find
from .uploads import Files
from .web_files import WEB_FILES, WEB_HEADERS

T = TypeVar("T")
API_ROUTES = (
    *ENDPOINTS,
    "/v1/batches",
    "/v1/files",
    "/v1/images/find",
    "/v1/images/table",
    "/v1/live",
    "/v1/messages/attribution",
    "/v1/messages/count",
    "/v1/messages/prefill",
    "/v1/models",
)


class Shared(Protocol):
    """State of the routes that a gateway of replicas has, too."""

    files: Files
    metrics: Metrics
    batches: Batches | None

    async def run_in_pool(self, key: str, function: Callable[[], T]) -> T: ...


class _JsonRequest(Request):
    """Parses JSON with pydantic's parser: a base64 image of megabytes in a fraction of the time,
    for which the interpreter's lock is held.

    It does not copy a body that comes as one message, and lets the event loop serve other requests
    before each pass over it.
    """

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            parts, more = [], True
            while more:
                message = await self.receive()
                parts.append(message.get("body", b""))
                more = message.get("more_body", False)
            self._body = b"".join(parts)
        return self._body

    async def json(self) -> Any:
        await asyncio.sleep(0)
        try:
            return from_json(await self.body())
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error


class _JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_json


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


def create_routes(service: Service | ServedModels, *, with_batches: bool = True) -> FastAPI:
    """The routes without authentication and limits: a middleware has to be added.

    with_batches: and with live sessions, which a replica of a cluster has not either.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        trimming = asyncio.create_task(trim_heap_regularly())
        batches = service.batches = Batches(service) if with_batches else None
        service.live = LiveSessions(service) if with_batches else None
        if batches:
            batches.start()
        try:
            yield
        finally:
            trimming.cancel()
            if batches:
                await batches.close()
            service.close()

    # FastAPI's /docs loads scripts from a foreign host, into the origin where the web UI has its
    # API key.
    app = FastAPI(
        title="LLaVA-Interleave",
        version=__version__,
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=openai.ERROR_RESPONSES,
    )
    app.state.service = service
    app.router.route_class = _JsonRoute
    add_error_handlers(app, service)
    for path, file in WEB_FILES.items():
        app.add_api_route(path, _web_file(file), include_in_schema=False)
    _add_state_routes(app, service)
    _add_model_routes(app, service)
    _add_message_routes(app, service)
    add_file_routes(app, service)
    _add_batch_routes(app, service)
    _add_live_routes(app, service)
    _add_table_routes(app, service)
    _add_preview_route(app, service)
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

    @app.get("/openapi.json", include_in_schema=False)
    async def schema(request: Request) -> Response:
        """The schema of the API; making it takes a second, for which no other request waits."""
        return JSONResponse(await service.run_in_pool(request.state.key, app.openapi))

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
    @app.post("/v1/chat/completions", responses=openai.stream_responses(openai.ChatCompletion))
    async def chat(body: openai.ChatRequest, request: Request) -> Response:
        """Answer messages with images, videos and views; with `stream` as server-sent events."""
        return respond(service, ChatCompletionStream, body, request.state.key)

    @app.post("/v1/responses", responses=openai.stream_responses(openai.ResponseObject))
    async def responses(body: openai.ResponsesRequest, request: Request) -> Response:
        """OpenAI's Responses API without tools and storage; with `stream` as its events."""
        return respond(service, ResponseStream, body, request.state.key)

    @app.post("/v1/completions", responses=openai.stream_responses(openai.TextCompletion))
    async def completions(body: openai.CompletionRequest, request: Request) -> Response:
        """Continue raw prompts, without a chat template and without images."""
        return respond(service, TextCompletionStream, body, request.state.key)

    @app.post("/v1/messages/count")
    async def count(body: openai.PromptRequest, request: Request) -> Estimate:
        """Tokens of each part, context left and memory needed, without generating."""
        return await service.count(body, request.state.key)

    @app.post("/v1/messages/prefill", responses={200: {"model": openai.Prefill}})
    async def prefill(body: openai.PromptRequest, request: Request) -> Response:
        """Compute the beginning of a coming question, at lowest priority and without an answer."""
        return respond_json(lambda: service.prefill(body, request.state.key))

    @app.post("/v1/messages/attribution", responses={200: {"model": openai.AttributionResponse}})
    async def attribution(body: openai.AttributionRequest, request: Request) -> Response:
        """Which image an answer used: shares, leave-one-out changes, attention maps."""
        return respond_json(lambda: service.attribute_answer(body, request.state.key))


def _add_live_routes(app: FastAPI, service: Service | ServedModels) -> None:
    def sessions() -> LiveSessions:
        if service.live is None:
            raise ApiError(501, "unsupported", "a server with --ray has no live sessions")
        return service.live

    @app.post("/v1/live")
    async def create(body: openai.LiveRequest, request: Request) -> openai.Live:
        """A session that frames are appended to."""
        return await sessions().create(body, request.state.key)

    @app.post("/v1/live/{name}/frames")
    async def see(
        name: str,
        file: UploadFile,
        request: Request,
        at: Annotated[float | None, Form(ge=0, le=1e9, allow_inf_nan=False)] = None,
    ) -> openai.LiveFrames:
        """Append a frame, an image, and prefill it at lowest priority. at: its time in seconds."""
        data = await file.read()
        return await sessions().see(name, request.state.key, data, at)

    @app.post(
        "/v1/live/{name}/chat/completions", responses=openai.stream_responses(openai.ChatCompletion)
    )
    async def ask(name: str, body: LiveQuestion, request: Request) -> Response:
        """Chat completions whose first user message begins with the frames of now."""
        key = request.state.key
        question = sessions().question(name, key, body)
        return respond(service, ChatCompletionStream, question, key)

    @app.delete("/v1/live/{name}")
    async def delete(name: str, request: Request) -> openai.LiveDeleted:
        """End a session."""
        sessions().delete(name, request.state.key)
        return openai.LiveDeleted(id=name)


def _add_preview_route(app: FastAPI, service: Service | ServedModels) -> None:
    @app.get("/v1/files/{name}/preview", response_class=Response)
    async def preview(
        name: str, request: Request, size: Annotated[int, Query(ge=16, le=2048)] = 288
    ) -> Response:
        """An image as WebP of at most `size` pixels a side, where a browser cannot decode it."""
        data = await service.state.preview(request.state.key, name, size)
        headers = {"X-Content-Type-Options": "nosniff"}
        return Response(data, headers=headers, media_type="image/webp")


def _add_table_routes(app: FastAPI, service: Service | ServedModels) -> None:
    @app.post("/v1/images/table", responses=openai.stream_responses(openai.TableResult))
    async def table(body: openai.TableRequest, request: Request) -> Response:
        """Ask the same questions about each image alone; with `stream` rows as events."""
        stream = TableStream(service, body, request.state.key)
        if not body.stream:
            return respond_json(stream.whole)
        return CancelOnDisconnect(lambda _, __, send: send_events(stream, send))

    @app.post("/v1/images/find", responses={200: {"model": openai.FindResult}})
    async def found(body: openai.FindRequest, request: Request) -> Response:
        """Rank images by the probability that the answer to a yes/no question is yes."""
        return respond_json(lambda: find(service, body, request.state.key))


def _batches(service: Shared) -> Batches:
    """The batches of a server; raises ApiError in a cluster."""
    if service.batches is None:
        raise ApiError(
            501, "unsupported", "a server with --ray has no batches; use llava batch --ray"
        )
    return service.batches


def _add_batch_routes(app: FastAPI, service: Shared) -> None:
    @app.post("/v1/batches")
    async def create(body: openai.BatchRequest, request: Request) -> openai.Batch:
        """Answer the requests of an uploaded file (purpose batch) at lowest priority."""
        return await _batches(service).create(body, request.state.key)

    @app.get("/v1/batches")
    async def listed(
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> openai.BatchList:
        """The batches of this API key, newest first."""
        return _batches(service).list(request.state.key, after, limit)

    @app.get("/v1/batches/{name}")
    async def one_batch(name: str, request: Request) -> openai.Batch:
        """A batch by its id."""
        return _batches(service).get(request.state.key, name)

    @app.post("/v1/batches/{name}/cancel")
    async def cancel(name: str, request: Request) -> openai.Batch:
        """End a batch; what is done is in its files."""
        return await _batches(service).cancel(request.state.key, name)


def add_file_routes(app: FastAPI, service: Shared) -> None:
    """Uploads."""

    @app.post("/v1/files")
    async def upload(
        file: UploadFile, purpose: Annotated[str, Form()], request: Request
    ) -> openai.File:
        """Upload an image or a video, which requests refer to by its id, or a batch's requests."""
        data, key = await file.read(), request.state.key
        files = _batches(service).files if purpose == "batch" else service.files
        return await service.run_in_pool(
            key, lambda: files.put(key, data, file.filename or "", purpose)
        )

    def batch_files(key: str, name: str) -> BatchFiles | None:
        found = service.batches.files if service.batches else None
        return found if found and found.has(key, name) else None

    @app.get("/v1/files")
    async def files(request: Request) -> openai.FileList:
        """The uploads of this API key, and the files of its batches."""
        key = request.state.key
        of_batches = service.batches.files.list(key) if service.batches else []
        return openai.FileList(data=[*service.files.list(key), *of_batches])

    @app.get("/v1/files/{name}")
    async def one_file(name: str, request: Request) -> openai.File:
        """A file by its id."""
        key = request.state.key
        if found := batch_files(key, name):
            return found.get(key, name)
        return service.files.get(key, name).info(name)

    @app.get("/v1/files/{name}/content", response_class=FileResponse)
    async def content(name: str, request: Request) -> Response:
        """The content of a file."""
        key = request.state.key
        headers = {"X-Content-Type-Options": "nosniff", "Content-Disposition": "attachment"}
        if found := batch_files(key, name):
            kind = "application/jsonl"
            return FileResponse(found.path(key, name), headers=headers, media_type=kind)
        data = service.files.get(key, name).data
        return Response(data, headers=headers, media_type="application/octet-stream")

    @app.delete("/v1/files/{name}")
    async def delete(name: str, request: Request) -> openai.FileDeleted:
        """Delete a file."""
        key = request.state.key
        if service.batches and service.batches.files.has(key, name):
            service.batches.delete_file(key, name)
        else:
            service.files.delete(key, name)
        return openai.FileDeleted(id=name)
