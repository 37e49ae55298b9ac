"""FastAPI application of the policy server: its routes and the path of a request from its bytes to the reply."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from ..errors_openvla import OpenVLAError
from ..inference.batches import Prediction
from ..inference.openpi_messages import pack_msgpack
from .batching import BatchQueue, OverloadedError, QueueError
from .cli import Limits
from .metrics import Metrics
from .middleware import Guard, create_server, is_loopback, retry_after
from .policy import BatchedPolicy, Outcome, PredictionError, PreparedRequest, action_details
from .requests import (
    ActRequest,
    RequestError,
    encode_reply,
    parse_json_request,
    parse_msgpack_request,
)
from .schemas import (
    DESCRIPTION,
    ActionDetails,
    ActReply,
    ErrorDetail,
    Health,
    PolicyInfo,
    Responses,
    act_request_body,
    add_referenced_schemas,
    error_body,
    error_responses,
)

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page.html"
PREPARING_THREADS = 4  # number of requests that are decoded at one time, while the model is busy
MAX_WEBSOCKETS = 128  # open at one time
EXPECTED_ERRORS = (OpenVLAError, QueueError, PredictionError)  # their messages are for the client
CLIENT_ERROR_STATUS = 422  # of an OpenVLAError without a status: the same request would fail again


@dataclass
class ActResult:
    """Result of one request.

    Attributes:
        request: The parsed request.
        prediction: The prediction.
        details: The reply, if the request has ``details``.
    """

    request: ActRequest
    prediction: Prediction
    details: ActionDetails | None


class PolicyApp:
    """State that the routes share: the policy, its queue, its metrics.

    Args:
        policy: The policy.
    """

    def __init__(self, policy: BatchedPolicy) -> None:
        self.policy, self.limits, self.info = policy, policy.limits, policy.info().model_dump()
        self.queue: BatchQueue[PreparedRequest, Prediction] = BatchQueue(
            self._predict_batch,
            can_batch=PreparedRequest.can_batch_with,
            max_queue_size=self.limits.max_queue_size,
            max_batch_size=policy.max_batch_size,
            timeout_s=self.limits.timeout_s,
        )
        self.metrics = Metrics(self.queue)
        self._num_websockets = 0
        self._threads = ThreadPoolExecutor(PREPARING_THREADS, thread_name_prefix="prepare")
        self._preparing = asyncio.Semaphore(PREPARING_THREADS)  # wakes waiting requests in order of arrival

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Run the queue from the server's start to its end."""
        self.queue.start()
        yield
        await self.queue.stop()
        self._threads.shutdown()

    def _predict_batch(self, requests: list[PreparedRequest]) -> list[Outcome]:
        outcomes = self.policy.predict_batch(requests)
        self.metrics.observe_batch(outcomes)
        return outcomes

    async def act(self, data: bytes, parse: Callable[[bytes, Limits], ActRequest]) -> ActResult:
        """Parse a request, wait in the queue, and return the result.

        Raises:
            RequestError: The request is invalid.
            QueueError: The request gets no result: the queue is full, or the deadline has passed.
            PredictionError: The model failed.
            OpenVLAError: The model rejects the request, or its output is no action (``NoActionError``).
        """
        run_in_executor = asyncio.get_running_loop().run_in_executor
        entry = self.queue.acquire()
        try:
            async with self._preparing:
                request = await run_in_executor(self._threads, parse, data, self.limits)
                self.queue.set_client(entry, request.client_id, request.latest_only, request.timeout_s)
                prepared = await run_in_executor(self._threads, self.policy.prepare, request)
            del data  # free the largest parts of the request, body and images, while it waits
            request.images.clear()
            prediction = await self.queue.result(entry, prepared)
        finally:
            self.queue.release(entry)
        latency_s = time.monotonic() - entry.arrived
        self.metrics.observe_latency(latency_s)
        details = action_details(prediction, prepared, latency_s) if request.details else None
        return ActResult(request, prediction, details)

    def finish_request(self, route: str) -> None:
        """Count a request that succeeded."""
        self.metrics.count_request(route, 200)

    def fail_request(self, route: str, error: Exception) -> tuple[int, ErrorDetail]:
        """Count and log a request that failed; return the status and the content of its reply.

        An unexpected error is a bug: it is logged with its traceback, and the reply has only the id of the log entry.
        """
        if isinstance(error, EXPECTED_ERRORS):
            status = getattr(error, "status", CLIENT_ERROR_STATUS if isinstance(error, OpenVLAError) else 500)
            detail = ErrorDetail(
                message=str(error),
                field=getattr(error, "field", None),
                id=getattr(error, "id", None),
                code=getattr(error, "code", None),
            )
        else:
            status, error_id = 500, uuid.uuid4().hex[:12]
            logger.error("%s failed, id %s", route, error_id, exc_info=error)
            message = f"The server failed; its log explains it under id {error_id}."
            detail = ErrorDetail(message=message, id=error_id)
        logger.info("%s %d%s: %s", route, status, f" ({detail.field})" if detail.field else "", detail.message)
        self.metrics.count_request(route, status)
        return status, detail

    async def serve_openpi(self, websocket: WebSocket) -> None:
        """Serve openpi's protocol: send the metadata, then a reply to every frame; an error is a text message."""
        if self._num_websockets >= MAX_WEBSOCKETS or self.queue.draining:
            return await websocket.close(1013, "no more connections are accepted")
        self._num_websockets += 1
        try:
            await websocket.accept()
            await websocket.send_bytes(pack_msgpack(self.info))
            previous_total_ms: float | None = None
            while (frame := await websocket.receive())["type"] != "websocket.disconnect":
                started = time.perf_counter()
                if await self._reply_to_frame(websocket, frame.get("bytes"), previous_total_ms):
                    previous_total_ms = (time.perf_counter() - started) * 1000
        except (WebSocketDisconnect, RuntimeError) as error:  # the client disconnected before the reply
            logger.info("websocket closed: %s", error)
        finally:
            self._num_websockets -= 1

    async def _reply_to_frame(self, websocket: WebSocket, frame: bytes | None, previous_total_ms: float | None) -> bool:
        """Send the reply to one frame of openpi's protocol; return False if it is an error."""
        try:
            if frame is None:
                raise RequestError("A frame must be binary, msgpack; got text.", None, 400)
            result = await self.act(frame, parse_msgpack_request)
        except Exception as error:
            _, detail = self.fail_request("websocket", error)
            await websocket.send_text(f"{detail.code}: {detail.message}" if detail.code else detail.message)
            return False
        reply = {} if result.details is None else result.details.model_dump()
        reply["actions"] = np.atleast_2d(result.prediction.actions)
        reply["server_timing"] = {"infer_ms": result.prediction.model_ms}
        if previous_total_ms is not None:
            reply["server_timing"]["prev_total_ms"] = previous_total_ms
        await websocket.send_bytes(pack_msgpack(reply))
        self.finish_request("websocket")
        return True


def build_app(policy: BatchedPolicy, *, token: str | None = None, host: str = "127.0.0.1") -> FastAPI:
    """Return the ASGI application; its ``state.policy_app`` is the ``PolicyApp``.

    Args:
        policy: The policy.
        token: Token that requests must carry; None for none.
        host: Address that the server listens on.
    """
    policy_app = PolicyApp(policy)
    app = FastAPI(
        title="OpenVLA policy server",
        description=DESCRIPTION,
        lifespan=policy_app.lifespan,
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    app.state.policy_app = policy_app
    count_request = policy_app.metrics.count_request
    app.add_middleware(Guard, limits=policy.limits, token=token, host=host, count_request=count_request)

    @app.exception_handler(HTTPException)
    async def handle_http_error(request: Request, error: HTTPException) -> Response:
        """Reply to an unknown path or method."""
        return JSONResponse(error_body(str(error.detail)), error.status_code, error.headers)

    _add_act_route(app, policy_app)
    _add_status_routes(app, policy_app)
    app.websocket("/")(policy_app.serve_openpi)
    app.openapi = _with_referenced_schemas(app.openapi)  # type: ignore[method-assign]  # as FastAPI documents it
    return app


def _with_referenced_schemas(openapi: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Return FastAPI's ``app.openapi`` extended by the schemas of bodies that FastAPI does not parse itself."""

    def extended_openapi() -> dict[str, Any]:
        document = openapi()
        add_referenced_schemas(document)
        return document

    return extended_openapi


def _add_act_route(app: FastAPI, policy_app: PolicyApp) -> None:
    """Add ``POST /act``; its body is parsed by ``parse_json_request`` and only documented by the models."""

    @app.post(
        "/act",
        response_model=ActReply,
        response_description="The action or chunk of actions, in the encoding of the request.",
        responses=error_responses(400, 401, 403, 408, 409, 413, 422, 500, 503, 504),
        openapi_extra=act_request_body(),
    )
    async def act(request: Request) -> Response:
        """Predict the action, or the chunk of actions, for an image and an instruction."""
        try:
            result = await policy_app.act((await request.receive())["body"], parse_json_request)
            if result.details is not None:
                reply = JSONResponse(result.details.model_dump())
            else:
                reply = JSONResponse(encode_reply(result.request, result.prediction.actions))
        except Exception as error:
            status, detail = policy_app.fail_request("/act", error)
            headers = retry_after() if isinstance(error, OverloadedError) else None
            return JSONResponse({"error": detail.model_dump()}, status, headers)
        policy_app.finish_request("/act")
        return reply


def _add_status_routes(app: FastAPI, policy_app: PolicyApp) -> None:
    @app.get(
        "/info",
        response_model=PolicyInfo,
        response_description="The model and the server's limits.",
        responses=error_responses(401, 403),
    )
    async def info() -> Response:
        """Describe the model, its datasets and the server's limits."""
        return JSONResponse(policy_app.info)

    draining: Responses = {503: {"model": Health, "description": "The server is draining."}}

    @app.get(
        "/healthz",
        response_model=Health,
        response_description="The server accepts requests.",
        responses={**error_responses(403), **draining},
    )
    async def healthz() -> Response:
        """Tell if the server accepts requests."""
        is_draining, waiting = policy_app.queue.draining, len(policy_app.queue)
        health = Health(status="draining" if is_draining else "ok", waiting=waiting, model=policy_app.policy.name)
        return JSONResponse(health.model_dump(), 503 if is_draining else 200)

    @app.get(
        "/metrics",
        response_class=PlainTextResponse,
        response_description="Metrics in Prometheus' text format.",
        responses=error_responses(401, 403),
    )
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(policy_app.metrics.text(), media_type=policy_app.metrics.content_type)

    @app.get(
        "/",
        response_class=HTMLResponse,
        response_description="The page.",
        responses=error_responses(403, 404),
    )
    async def page() -> Response:
        """Return a page to try the policy in a browser."""
        if not PAGE.is_file():
            raise HTTPException(404, "This installation has no serving/page.html; POST /act works without it.")
        html = PAGE.read_text(encoding="utf-8")
        return HTMLResponse(html, headers=page_headers(html))


def page_headers(html: str) -> dict[str, str]:
    """Return headers that allow a page its own script and style and requests to this server, and nothing else."""

    def hashes(tag: str) -> str:
        blocks = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks)
        return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"

    content_security_policy = {
        "default-src": "'none'",
        "script-src": hashes("script"),
        "style-src": hashes("style"),
        "img-src": "'self' data: blob:",
        "media-src": "blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in content_security_policy.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def serve(policy: BatchedPolicy, *, host: str, port: int, token: str | None = None) -> None:
    """Serve until a signal, then complete the accepted requests."""
    if not is_loopback(host) and token is None:
        logger.warning("anyone who reaches %s can use this policy: set a token, or listen on 127.0.0.1", host)
    app = build_app(policy, token=token, host=host)
    constrained = ", chooses among action tokens only" if app.state.policy_app.info["constrain_actions"] else ""
    logger.info("%s, %s by default%s", policy.name, policy.policy.unnorm_key, constrained)
    create_server(app, app.state.policy_app.queue, policy.limits, host, port).run()
