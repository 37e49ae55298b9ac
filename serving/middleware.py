"""Layers between the network and the application: access, size and time limits of requests, graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .batching import RETRY_SECONDS, BatchQueue
from .cli import DRAIN_SECONDS, Limits
from .schemas import error_body

logger = logging.getLogger(__name__)

PUBLIC_PATHS = ("/healthz", "/")  # without a token: the page holds no secret and asks for the token
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
LINGER_SECONDS = 2.0
CLOSING_SECONDS = 10  # for replies that are being sent when the queue is empty


class RejectedError(Exception):
    """A request that the guard rejects.

    Attributes:
        status: HTTP status of the reply.
        headers: Additional headers of the reply.
        is_body_unread: True if more of the body may arrive.
    """

    def __init__(
        self, status: int, message: str, headers: dict[str, str] | None = None, is_body_unread: bool = True
    ) -> None:
        super().__init__(message)
        self.status, self.headers, self.is_body_unread = status, headers or {}, is_body_unread


class Guard:
    """ASGI middleware that checks origin and token and passes a request on once its body has arrived.

    The body must arrive within a time limit, so that slow clients cannot occupy the server.

    Args:
        app: The application.
        limits: Limits of bodies.
        token: Token that requests must carry; None for none.
        host: Address that the server listens on. On loopback without a token, other host names are rejected: a web page
            may have pointed a host name of its own to this address (DNS rebinding).
        count_request: Called for every request that is not passed on, with "guard" and the status.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        token: str | None,
        host: str,
        count_request: Callable[[str, int | str], None],
    ) -> None:
        self.app, self.limits, self.token, self.count_request = app, limits, token, count_request
        self.requires_loopback_name = token is None and is_loopback(host)
        self.inflight_bytes = 0  # of all bodies that are being received

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self.check_access(scope, headers)
            if scope["type"] == "http":
                body = await self.read_body(headers, receive)
                if body is None:
                    return self.count_request("guard", "disconnected")
                receive = _receive_body(body, receive)
                del body  # the application may free it
        except RejectedError as error:
            logger.info("%s %d: %s", scope["path"], error.status, error)
            self.count_request("guard", error.status)
            if scope["type"] == "http" and error.is_body_unread:
                await _discard_body(receive)
            return await _send_rejection(scope, receive, send, error)
        return await self.app(scope, receive, send)

    def check_access(self, scope: Scope, headers: dict[str, str]) -> None:
        """Check host, origin and token.

        Raises:
            RejectedError: One of them is not allowed.
        """
        host = headers.get("host", "")
        if self.requires_loopback_name and host and _hostname(f"//{host}") not in LOOPBACK_NAMES:
            raise RejectedError(403, f"This server is available as {LOOPBACK_NAMES} only, not as the host {host!r}.")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise RejectedError(403, f"A page of {origin!r} may not use this server; only its own page may.")
        if self.token is None or (scope["type"] == "http" and scope["path"] in PUBLIC_PATHS):
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        is_known_scheme = scheme.lower() in ("bearer", "api-key")  # the second is openpi's
        if not hmac.compare_digest(token.strip().encode(), self.token.encode()) or not is_known_scheme:
            message = "This server needs a token: Authorization: Bearer ..."
            raise RejectedError(401, message, {"www-authenticate": "Bearer"})

    async def read_body(self, headers: dict[str, str], receive: Receive) -> bytes | None:
        """Return the complete body; None if the client disconnected.

        Raises:
            RejectedError: The body is too large or too slow, or too many bodies are being received.
        """
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.limits.body_bytes:
            raise self._too_large(declared)
        body, more_body = bytearray(), True
        deadline = asyncio.get_running_loop().time() + self.limits.body_seconds
        try:
            while more_body:
                message = await self._receive_before(deadline, receive, len(body))
                if message["type"] == "http.disconnect":
                    return None
                chunk, more_body = message.get("body", b""), message.get("more_body", False)
                body += chunk
                self.inflight_bytes += len(chunk)
                if len(body) > self.limits.body_bytes:
                    raise self._too_large(f"more than {len(body)}", more_body)
                if self.inflight_bytes > self.limits.max_inflight_bytes:
                    raise RejectedError(503, "Too many bodies are arriving; try again.", retry_after(), more_body)
            return bytes(body)
        finally:
            self.inflight_bytes -= len(body)

    async def _receive_before(self, deadline: float, receive: Receive, size: int) -> Message:
        """Return the next message; raise RejectedError at the deadline, after ``size`` bytes of the body."""
        remaining = deadline - asyncio.get_running_loop().time()
        try:
            return await asyncio.wait_for(receive(), max(remaining, 0))
        except asyncio.TimeoutError:
            message = f"The body did not arrive within {self.limits.body_seconds} s; {size} bytes did."
            raise RejectedError(408, message, is_body_unread=False) from None  # waited for the rest long enough

    def _too_large(self, size: str, more_body: bool = True) -> RejectedError:
        message = f"The body has {size} bytes; at most {self.limits.body_bytes} are allowed."
        return RejectedError(413, message, is_body_unread=more_body)


def retry_after() -> dict[str, str]:
    """Return the header that says when to try again."""
    return {"retry-after": str(RETRY_SECONDS)}


def is_loopback(host: str) -> bool:
    """Return True if only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _receive_body(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that first returns a body that was read already, in one message."""
    unread = [body]

    async def receive_again() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await receive()

    return receive_again


async def _discard_body(receive: Receive) -> None:
    """Read the rest of a rejected body for a short time: a client that is still sending would not read the reply."""

    async def read() -> None:
        while (await receive()).get("more_body", False):
            pass

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), LINGER_SECONDS)


async def _send_rejection(scope: Scope, receive: Receive, send: Send, error: RejectedError) -> None:
    """Send the reply to a rejected request and close its connection, since its body may be unread."""
    prefix = ""
    if scope["type"] == "websocket":
        await receive()  # websocket.connect
        if "websocket.http.response" not in scope.get("extensions", {}):
            return await send({"type": "websocket.close", "code": 1008, "reason": str(error)})
        prefix = "websocket."
    body = json.dumps(error_body(str(error))).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    headers["connection"] = "close"
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": f"{prefix}http.response.start", "status": error.status, "headers": encoded})
    return await send({"type": f"{prefix}http.response.body", "body": body})


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP protocol with a time limit for a request's head, which uvicorn does not have.

    ``header_seconds`` are counted from the opening of a connection, or from the first byte after a complete reply.
    """

    limits = Limits()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer; abort the connection if there are too many."""
        super().connection_made(transport)
        self._head_timer: asyncio.TimerHandle | None = None
        if len(self.connections) > self.limits.connections:
            transport.abort()
        else:
            self._update_timer()

    def data_received(self, data: bytes) -> None:
        """Parse data and start or stop the timer."""
        super().data_received(data)
        self._update_timer()

    def handle_websocket_upgrade(self, event: Any) -> None:
        """Stop the timer and pass the connection to the WebSocket protocol."""
        self._stop_timer()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def _update_timer(self) -> None:
        is_between_requests = self.cycle is None or self.cycle.response_complete
        if not is_between_requests:
            self._stop_timer()
        elif self._head_timer is None and self.transport.get_protocol() is self:
            self._head_timer = self.loop.call_later(self.limits.header_seconds, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class DrainingServer(uvicorn.Server):
    """uvicorn server that completes the accepted requests after SIGTERM, before it closes its socket.

    Meanwhile new requests get a 503, and ``/healthz`` says "draining". A second signal stops the server at once.

    Args:
        config: uvicorn's configuration.
        queue: The queue of accepted requests.
    """

    def __init__(self, config: uvicorn.Config, queue: BatchQueue[Any, Any]) -> None:
        super().__init__(config)
        self.queue = queue
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain_task: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal: drain at the first one, exit at the second."""
        if self.queue.draining or self._loop is None:
            self.should_exit = True
            self.force_exit = sig == signal.SIGINT
            return
        self.queue.draining = True
        self._loop.call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
        self._drain_task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        logger.info("draining: %d requests are being completed, new ones are rejected", len(self.queue))
        if not await self.queue.drain(DRAIN_SECONDS):
            logger.error("%d requests were not completed within %.0f s", len(self.queue), DRAIN_SECONDS)
        self.should_exit = True


def create_server(app: ASGIApp, queue: BatchQueue[Any, Any], limits: Limits, host: str, port: int) -> DrainingServer:
    """Return a server for the application; ``run()`` serves until a signal."""
    protocol = type("Protocol", (TimedProtocol,), {"limits": limits})
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=protocol,
        ws_max_size=limits.body_bytes,
        ws_per_message_deflate=False,  # a small message could unpack to a large one
        timeout_keep_alive=limits.header_seconds,  # type: ignore[arg-type]  # asyncio takes fractions of a second
        timeout_graceful_shutdown=CLOSING_SECONDS,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_config=None,
    )
    return DrainingServer(config, queue)
