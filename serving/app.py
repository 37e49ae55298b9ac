"""The policy server's application: its routes, from a request's bytes to the reply's."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import re
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from ..decoding_openvla import NoActionError
from . import openapi as schema
from .batching import BatchQueue, Overloaded, QueueError
from .cli import Limits
from .metrics import Metrics
from .middleware import Guard, error_body, is_loopback, retry_after, server
from .policy import Answer, AnswerError, Prepared, ServedPolicy
from .requests import ActRequest, RequestError, pack_reply, read_json, read_msgpack, reply_of

logger = logging.getLogger("openvla.serving.cli")

PAGE = Path(__file__).parent / "page.html"
PREPARING_THREADS = 4  # requests that are decoded at one time, while the model is busy
WEBSOCKETS = 128  # open at one time
NORMAL_ERRORS = (RequestError, QueueError, AnswerError, NoActionError)
NO_ACTION_STATUS = 422  # the same request would have no action again


class PolicyApp:
    """What the routes share: the policy, its queue, its metrics.

    Args:
        served: The policy.
    """

    def __init__(self, served: ServedPolicy) -> None:
        self.served, self.limits, self.info = served, served.limits, served.info()
        self.metrics = Metrics()
        self.websockets = 0
        self._threads = ThreadPoolExecutor(PREPARING_THREADS, thread_name_prefix="prepare")
        self._preparing = asyncio.Semaphore(PREPARING_THREADS)  # of all who wait for it the first comes first
        self.queue: BatchQueue[Prepared, Answer] = BatchQueue(
            self._answered,
            joins=Prepared.joins,
            places=self.limits.waiting,
            batch=served.batch,
            deadline=self.limits.deadline,
        )

    @contextlib.asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """The time between the server's start and its end."""
        self.queue.start()
        self.metrics.watch(self.queue)
        yield
        await self.queue.stop()
        self._threads.shutdown()

    def _answered(self, batch: list[Prepared]) -> list[Answer | AnswerError | NoActionError]:
        answers = self.served.answer(batch)
        self.metrics.answered(answers)
        return answers

    async def act(
        self, data: bytes, read: Callable[[bytes, Limits], ActRequest]
    ) -> tuple[ActRequest, Answer, dict[str, Any] | None]:
        """From a request's bytes to its answer, and ``details`` where it asks for them.

        Raises:
            RequestError: The request is refused.
            QueueError: It is not answered.
            AnswerError: The model failed.
            NoActionError: What it gave is no action.
        """
        in_thread = asyncio.get_running_loop().run_in_executor
        place = self.queue.enter()
        try:
            async with self._preparing:
                request = await in_thread(self._threads, read, data, self.limits)
                self.queue.identify(place, request.client_id, request.latest_only, request.deadline)
                prepared = await in_thread(self._threads, self.served.prepare, request)
            del data  # as the pictures, the largest part of a request: it should not be held while it waits
            request.images.clear()
            answer = await self.queue.result(place, prepared)
        finally:
            self.queue.leave(place)
        latency = time.monotonic() - place.arrived
        self.metrics.latency.observe(latency)
        return request, answer, self.served.details(answer, prepared.unnorm_key, latency) if request.details else None

    def over(self, route: str, error: Exception | None = None) -> tuple[int, dict[str, Any] | None]:
        """Count and log the end of a request; its status, and the body where it is an error."""
        if error is None:
            self.metrics.count(route, 200)
            return 200, None
        identity = getattr(error, "id", None)
        if not isinstance(error, NORMAL_ERRORS):
            identity = uuid.uuid4().hex[:12]
            logger.error("%s failed, id %s", route, identity, exc_info=error)
            error = RuntimeError(f"The server failed; its log explains it under id {identity}.")
        status, field = getattr(error, "status", 500), getattr(error, "field", None)
        if isinstance(error, NoActionError):
            status = NO_ACTION_STATUS
        logger.info("%s %d%s: %s", route, status, f" ({field})" if field else "", error)
        self.metrics.count(route, status)
        return status, error_body(str(error), field, identity, getattr(error, "code", None))

    async def openpi(self, websocket: WebSocket) -> None:
        """A client of openpi: the metadata, then an answer for every frame; an error is a text message, as there."""
        if self.websockets >= WEBSOCKETS or self.queue.draining:
            return await websocket.close(1013, "no more connections are taken")
        self.websockets += 1
        total: float | None = None
        try:
            await websocket.accept()
            await websocket.send_bytes(pack_reply(self.info))
            while True:
                frame = await websocket.receive()
                if frame["type"] == "websocket.disconnect":
                    return None
                started = time.perf_counter()
                try:
                    if frame.get("bytes") is None:
                        raise RequestError("A frame must be binary, msgpack; got text.", None, 400)
                    _, answer, details = await self.act(frame["bytes"], read_msgpack)
                except Exception as error:
                    said = self.over("websocket", error)[1]["error"]
                    await websocket.send_text(f"{said['code']}: {said['message']}" if said["code"] else said["message"])
                    continue
                timing = {"infer_ms": answer.model_ms} | ({} if total is None else {"prev_total_ms": total})
                reply = {**(details or {}), "actions": np.atleast_2d(answer.output.actions), "server_timing": timing}
                await websocket.send_bytes(pack_reply(reply))
                self.over("websocket")
                total = (time.perf_counter() - started) * 1000
        except (WebSocketDisconnect, RuntimeError) as error:  # the client went away while it was answered
            logger.info("websocket closed: %s", error)
        finally:
            self.websockets -= 1
        return None


def build_app(served: ServedPolicy, *, token: str | None = None, host: str = "127.0.0.1") -> FastAPI:
    """The ASGI application; its ``state.policy_app`` holds the queue.

    Args:
        served: The policy.
        token: That requests must carry; None for none.
        host: The address that will be listened on.
    """
    shared = PolicyApp(served)
    app = FastAPI(
        title="OpenVLA policy server",
        lifespan=shared.running,
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    app.state.policy_app = shared
    app.add_middleware(Guard, limits=served.limits, token=token, host=host, count=shared.metrics.count)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        """No such path, or not this method."""
        return JSONResponse(error_body(str(error.detail)), error.status_code, error.headers)

    @app.post("/act", **schema.ACT)
    async def act(request: Request) -> Response:
        """The action, or the chunk of actions, for an image and an instruction."""
        try:
            asked, answer, details = await shared.act((await request.receive())["body"], read_json)
            reply = JSONResponse(details if details is not None else reply_of(asked, answer.output.actions))
        except Exception as error:
            status, body = shared.over("/act", error)
            return JSONResponse(body, status, retry_after() if isinstance(error, Overloaded) else None)
        shared.over("/act")
        return reply

    @app.get("/info", **schema.INFO)
    async def info() -> Response:
        """The model, its datasets, and what this server takes."""
        return JSONResponse(shared.info)

    @app.get("/healthz", **schema.HEALTHZ)
    async def healthz() -> Response:
        """Whether the server takes requests."""
        status = "draining" if shared.queue.draining else "ok"
        body = {"status": status, "waiting": len(shared.queue), "model": served.name}
        return JSONResponse(body, 503 if shared.queue.draining else 200)

    @app.get("/metrics", **schema.METRICS)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(shared.metrics.text(), media_type=shared.metrics.content_type)

    @app.get("/", **schema.PAGE)
    async def page() -> Response:
        """A page to try the model by hand."""
        if not PAGE.is_file():
            raise HTTPException(404, "This installation has no assets/page.html; POST /act works without it.")
        text = PAGE.read_text(encoding="utf-8")
        return HTMLResponse(text, headers=page_headers(text))

    app.websocket("/")(shared.openpi)
    return app


def page_headers(text: str) -> dict[str, str]:
    """Headers that let a page run its own script and style and talk to this server, and nothing else."""

    def digests(tag: str) -> str:
        blocks = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", text, re.DOTALL)
        found = (base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks)
        return " ".join(f"'sha256-{digest}'" for digest in found) or "'none'"

    policy = {
        "default-src": "'none'",
        "script-src": digests("script"),
        "style-src": digests("style"),
        "img-src": "'self' data: blob:",
        "media-src": "blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def serve(served: ServedPolicy, *, host: str, port: int, token: str | None = None) -> None:
    """Serve until a signal, then answer what was accepted."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if not is_loopback(host) and token is None:
        logger.warning("anyone who reaches %s can use this policy: give a token, or keep to 127.0.0.1", host)
    app = build_app(served, token=token, host=host)
    chosen = ", chooses among action tokens only" if served.info()["constrain_actions"] else ""
    logger.info("%s, %s by default%s", served.name, served.policy.unnorm_key, chosen)
    server(app, app.state.policy_app.queue, served.limits, host, port).run()
