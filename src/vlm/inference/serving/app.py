"""The endpoint as an ASGI application: its paths, and what stands before them."""

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from transformers import PreTrainedConfig

from vlm.assembly.language_models import max_positions
from vlm.inference.embed import Embedder
from vlm.inference.engine.engine import Engine
from vlm.inference.predict import Predictor
from vlm.inference.serving.chat import ChatEndpoint
from vlm.inference.serving.classify import ClassifyEndpoint
from vlm.inference.serving.embeddings import EmbeddingsEndpoint, HeadSource, StateSource
from vlm.inference.serving.errors import RequestError, show
from vlm.inference.serving.gate import CountingGate, KeyGate, RefusalReason, SiteGate
from vlm.inference.serving.service import JsonEndpoint, Respond, Service

UNSERVED_PATHS = {
    "/v1/chat/completions": (
        "this checkpoint has prediction heads and writes no text; use /v1/classify, or /v1/embeddings"
    ),
    "/v1/classify": "this checkpoint has no prediction heads; use /v1/chat/completions or /v1/embeddings",
    "/v1/embeddings": "this checkpoint has prediction heads, whose states are for these: ask /v1/classify",
    "/v1/completions": "plain prompts are not served; use /v1/chat/completions",
    "/v1/responses": "ask /v1/chat/completions",
}
"""Path that clients may ask -> what to ask where it is not served."""


def make_chat_app(service: Service, engine: Engine, reason: RefusalReason, key: str | None = None) -> Starlette:
    """Return the endpoint of a model that writes.

    Args:
        service: its name and limits.
        engine: writes the answers; it is closed with the application.
        reason: decides which hosts and sites are answered.
        key: the API key; None: none is asked for.
    """
    service.limit_characters(engine.model.positions)
    embeddings = EmbeddingsEndpoint(service, StateSource(engine.model))
    service.metrics.add_gauge("vlm_answers_running", "Answers that are being written", lambda: engine.num_running)
    service.metrics.add_gauge("vlm_answers_waiting", "Answers that wait", lambda: engine.num_waiting)
    paths = {
        "/v1/chat/completions": ChatEndpoint(service, engine, make_fingerprint(engine.model.model.config)).respond,
        "/v1/embeddings": embeddings.respond,
    }

    def close() -> None:
        """Close the engine and the embeddings' worker."""
        engine.close()
        embeddings.close()

    return make_app(service, paths, reason, key, close, lambda: not engine.is_closed)


def make_classify_app(
    service: Service, predictor: Predictor, reason: RefusalReason, key: str | None = None
) -> Starlette:
    """Return the endpoint of a model with prediction heads; arguments as of `make_chat_app`."""
    service.limit_characters(max_positions(predictor.model.config))
    endpoint = ClassifyEndpoint(service, predictor)
    return make_app(service, {"/v1/classify": endpoint.respond}, reason, key, endpoint.close, lambda: True)


def make_embeddings_app(
    service: Service, embedder: Embedder, reason: RefusalReason, key: str | None = None
) -> Starlette:
    """Return the endpoint of a model with a head that embeds; arguments as of `make_chat_app`."""
    service.limit_characters(max_positions(embedder.model.config))
    endpoint = EmbeddingsEndpoint(service, HeadSource(embedder))
    return make_app(service, {"/v1/embeddings": endpoint.respond}, reason, key, endpoint.close, lambda: True)


def make_app(
    service: Service,
    paths: Mapping[str, Respond],
    reason: RefusalReason,
    key: str | None,
    close: Callable[[], object],
    is_running: Callable[[], bool],
) -> Starlette:
    """Return an endpoint with the paths that all models have, and those given."""
    routes = [Route(path, JsonEndpoint(service, respond), methods=["POST"]) for path, respond in paths.items()]
    routes += [
        Route("/v1/models", _list_models(service)),
        Route("/v1/models/{name:path}", _retrieve_model(service)),
        Route("/health", _answer_health(is_running)),
        Route("/metrics", _answer_metrics(service)),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        """Run the app, then close what it uses."""
        yield
        close()
        service.threads.close()

    handlers: dict[int | type[Exception], Callable[..., Awaitable[Response]]] = {
        HTTPException: _refuse_path,
        RequestError: _refuse_request,
    }
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    app.router.redirect_slashes = False
    if key is not None:
        app.add_middleware(KeyGate, key=key)
    app.add_middleware(SiteGate, reason=reason)
    counted = {*paths, "/v1/models", "/health", "/metrics"}
    app.add_middleware(CountingGate, metrics=service.metrics, paths=counted)
    return app


Answer = Callable[[Request], Awaitable[Response]]
"""Answers a request without a body."""


def make_fingerprint(config: PreTrainedConfig) -> str:
    """Return what changes when answers may: a digest of the model's configuration and of the versions."""
    parts = [config.to_json_string(), *map(version, ("small-vlm", "torch", "transformers"))]
    return f"fp_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:12]}"


def _answer_health(is_running: Callable[[], bool]) -> Answer:
    async def answer(request: Request) -> Response:
        """Answer whether the model is running."""
        if is_running():
            return JSONResponse({"status": "ok"})
        return await _refuse_request(request, RequestError("the model has ended", status=503, code="unavailable"))

    return answer


def _answer_metrics(service: Service) -> Answer:
    async def answer(request: Request) -> Response:
        """Answer with all metrics in the text format of Prometheus."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return answer


def _describe_model(service: Service) -> dict[str, object]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "vlm"}


def _list_models(service: Service) -> Answer:
    async def answer(request: Request) -> Response:
        """Answer with the list of models, which has one entry."""
        return JSONResponse({"object": "list", "data": [_describe_model(service)]})

    return answer


def _retrieve_model(service: Service) -> Answer:
    async def answer(request: Request) -> Response:
        """Answer with the description of the named model."""
        service.check_model(request.path_params["name"])
        return JSONResponse(_describe_model(service))

    return answer


async def _refuse_request(request: Request, error: RequestError) -> Response:
    return JSONResponse(error.to_dict(), error.status, error.headers)


async def _refuse_path(request: Request, error: HTTPException) -> Response:
    path = request.url.path
    message = f"{request.method} {show(path, 80)}: "
    if error.status_code == 405:
        message += f"allowed is {(error.headers or {}).get('Allow', 'another method')}"
        refusal = RequestError(message, status=405, code="method_not_allowed", headers=error.headers)
    else:
        message += UNSERVED_PATHS.get(path, "unknown path")
        refusal = RequestError(message, status=error.status_code, code="unknown_url")
    return await _refuse_request(request, refusal)
