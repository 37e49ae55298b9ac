"""What stands between the network and the policy server: who may ask, how much, how slowly; and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .batching import RETRY_SECONDS, BatchQueue
from .cli import DRAIN_SECONDS, Limits

logger = logging.getLogger("openvla.serving.cli")

# What anyone may read: whether the server lives, and the page, which holds no secret and asks for the token.
OPEN_PATHS = ("/healthz", "/")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
LINGER_SECONDS = 2.0
CLOSING_SECONDS = 10  # for replies that are being written when everything is answered


def error_body(
    message: str, field: str | None = None, id: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return the body of every error: message, field at fault, id under which the log has more, code of its kind."""
    return {"error": {"message": message, "field": field, "id": id, "code": code}}


class Refused(Exception):
    """A request that gets no further than the guard.

    Attributes:
        unread: Whether there may be more of its body.
    """

    unread = True

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}


class Guard:
    """ASGI middleware: checks origin and token, and lets a request in once its body is whole and not too large.

    A body that arrives too slowly is given up, so that no client holds the server by sending byte after byte.

    Args:
        app: Behind it.
        limits: Of bodies.
        token: That requests must carry; None for none.
        host: The address that is listened on. On loopback without a token, other host names are refused: a web page
            may have made its own name point here.
        count: Told of every request that goes no further: "guard", and its status.
    """

    def __init__(
        self, app: Any, limits: Limits, token: str | None, host: str, count: Callable[[str, int | str], None]
    ) -> None:
        self.app, self.limits, self.token, self.count = app, limits, token, count
        self.only_loopback_names = token is None and is_loopback(host)
        self.reading = 0  # bytes of all bodies that are arriving

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self.admit(scope, headers)
            if scope["type"] == "http":
                body = await self.read(headers, receive)
                if body is None:
                    return self.count("guard", "disconnected")
                receive = _replayed(body, receive)
                del body  # whoever takes it may let it go
        except Refused as refused:
            logger.info("%s %d: %s", scope["path"], refused.status, refused)
            self.count("guard", refused.status)
            if scope["type"] == "http" and refused.unread:
                await _discarded(receive)
            return await _refuse(scope, receive, send, refused)
        return await self.app(scope, receive, send)

    def admit(self, scope: dict[str, Any], headers: dict[str, str]) -> None:
        """Raise Refused where the host, the origin or the token is wrong."""
        host = headers.get("host", "")
        if self.only_loopback_names and host and _hostname(f"//{host}") not in LOOPBACK_NAMES:
            raise Refused(403, f"This server answers to {LOOPBACK_NAMES} only, not to the host {host!r}.")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise Refused(403, f"A page of {origin!r} may not use this server; only its own page may.")
        if self.token is None or (scope["type"] == "http" and scope["path"] in OPEN_PATHS):
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        known = kind.lower() in ("bearer", "api-key")  # the second is openpi's
        if not hmac.compare_digest(given.strip().encode(), self.token.encode()) or not known:
            message = "This server needs a token: Authorization: Bearer ..."
            raise Refused(401, message, {"www-authenticate": "Bearer"})

    async def read(self, headers: dict[str, str], receive: Any) -> bytes | None:
        """The whole body; None where the client went away.

        Raises:
            Refused: It is too large or too slow, or too many are arriving.
        """
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.limits.body_bytes:
            raise self._too_large(declared)
        body, more = bytearray(), True
        end = asyncio.get_running_loop().time() + self.limits.body_seconds
        try:
            while True:
                left = end - asyncio.get_running_loop().time()
                try:
                    message = await asyncio.wait_for(receive(), max(left, 0))
                except asyncio.TimeoutError:
                    raise Refused(
                        408, f"The body did not arrive within {self.limits.body_seconds} s; {len(body)} bytes did."
                    ) from None
                if message["type"] == "http.disconnect":
                    return None
                chunk, more = message.get("body", b""), message.get("more_body", False)
                body += chunk
                self.reading += len(chunk)
                if len(body) > self.limits.body_bytes:
                    raise self._too_large(f"more than {len(body)}")
                if self.reading > self.limits.reading_bytes:
                    raise Refused(503, "Too many bodies are arriving; try again.", retry_after())
                if not more:
                    return bytes(body)
        except Refused as refused:
            refused.unread = more and refused.status != 408
            raise
        finally:
            self.reading -= len(body)

    def _too_large(self, got: str) -> Refused:
        return Refused(413, f"The body has {got} bytes; at most {self.limits.body_bytes} are allowed.")


def retry_after() -> dict[str, str]:
    """The header that says when to try again."""
    return {"retry-after": str(RETRY_SECONDS)}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _replayed(body: bytes, receive: Any) -> Any:
    """A ``receive`` that gives a body that was already read, once and in one piece, and then what comes."""
    whole = [body]

    async def again() -> dict[str, Any]:
        if whole:
            return {"type": "http.request", "body": whole.pop(), "more_body": False}
        return await receive()

    return again


async def _discarded(receive: Any) -> None:
    """Read the rest of a refused body for a moment: a client that is still sending would not see the reply."""

    async def rest() -> None:
        while (await receive()).get("more_body", False):
            pass

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(rest(), LINGER_SECONDS)


async def _refuse(scope: dict[str, Any], receive: Any, send: Any, refused: Refused) -> None:
    """The reply to a refused request; its connection is closed, since its body may not have been read."""
    kind = ""
    if scope["type"] == "websocket":
        await receive()  # websocket.connect
        if "websocket.http.response" not in scope.get("extensions", {}):
            return await send({"type": "websocket.close", "code": 1008, "reason": str(refused)})
        kind = "websocket."
    body = json.dumps(error_body(str(refused))).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refused.headers}
    headers["connection"] = "close"
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": f"{kind}http.response.start", "status": refused.status, "headers": encoded})
    return await send({"type": f"{kind}http.response.body", "body": body})


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP, which has no limit of its own for how slowly a request's head may arrive.

    From the moment that a connection opens, or that its last reply is complete and something more arrives, the next
    head has ``header_seconds``.
    """

    limits = Limits()

    def connection_made(self, transport: Any) -> None:
        """A connection: one too many is closed at once."""
        super().connection_made(transport)
        self._head: asyncio.TimerHandle | None = None
        if len(self.connections) > self.limits.connections:
            transport.abort()
        else:
            self._expect()

    def data_received(self, data: bytes) -> None:
        """More of a request."""
        super().data_received(data)
        self._expect()

    def handle_websocket_upgrade(self, event: Any) -> None:
        """From here on it is another protocol's connection."""
        self._forget()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of it."""
        self._forget()
        super().connection_lost(exc)

    def _expect(self) -> None:
        between = self.cycle is None or self.cycle.response_complete
        if not between:
            self._forget()
        elif self._head is None and self.transport.get_protocol() is self:
            self._head = self.loop.call_later(self.limits.header_seconds, self.transport.abort)

    def _forget(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None


class DrainingServer(uvicorn.Server):
    """uvicorn, which on SIGTERM closes its doors at once: this one first answers what was accepted.

    Meanwhile new requests are told to try again, and ``/healthz`` says so. A second signal ends it at once.

    Args:
        config: Of uvicorn.
        queue: Whose requests are answered first.
    """

    def __init__(self, config: uvicorn.Config, queue: BatchQueue) -> None:
        super().__init__(config)
        self.queue = queue
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: Any = None) -> None:
        """Open the doors."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What a signal does."""
        if self.queue.draining or self._loop is None:
            self.should_exit = True
            self.force_exit = sig == signal.SIGINT
            return
        self.queue.draining = True
        self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._drain()))

    async def _drain(self) -> None:
        logger.info("draining: %d requests are being answered, new ones are refused", len(self.queue))
        if not await self.queue.drained(DRAIN_SECONDS):
            logger.error("%d requests were not answered within %.0f s", len(self.queue), DRAIN_SECONDS)
        self.should_exit = True


def server(app: Any, queue: BatchQueue, limits: Limits, host: str, port: int) -> DrainingServer:
    """A server of an ASGI application."""
    protocol = type("Protocol", (TimedProtocol,), {"limits": limits})
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=protocol,
        ws_max_size=limits.body_bytes,
        ws_per_message_deflate=False,  # a small message could unpack to a large one
        timeout_keep_alive=limits.header_seconds,
        timeout_graceful_shutdown=CLOSING_SECONDS,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_config=None,
    )
    return DrainingServer(config, queue)
